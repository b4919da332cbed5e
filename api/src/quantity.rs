//! Byte counts as Kubernetes writes quantities: `65536`, `64Ki`, `1Gi`, `10M`.

use serde::{Deserialize, Deserializer};

/// Why a string is not a byte count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a byte count: write a whole number, optionally with k, M, G, T, Ki, Mi, Gi or Ti"
)]
pub struct QuantityError(String);

/// Parses a byte count.
///
/// # Errors
/// When the string has another form or the count does not fit 63 bits.
pub fn parse(text: &str) -> Result<u64, QuantityError> {
    let error = || QuantityError(text.chars().take(64).collect());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_err| error())?;
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(error()),
    };
    number.checked_mul(factor).filter(|n| *n < 1 << 63).ok_or_else(error)
}

/// Writes a byte count as [`parse`] reads it, in the largest binary unit that it is a multiple of: `64Ki`, `65537`.
#[must_use]
pub fn format(bytes: u64) -> String {
    let units = [("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    let unit = units.iter().find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    match unit {
        Some((name, shift)) => format!("{}{name}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// A count as a YAML number or a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Raw {
    Number(u64),
    Text(String),
}

/// For `#[serde(deserialize_with)]` on an optional field.
///
/// # Errors
/// When the value is neither a whole number nor a string of the form above.
pub fn option<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    let raw = Raw::deserialize(input).map_err(|_err| {
        serde::de::Error::custom("expected a byte count such as 65536, 64Ki or 1Gi")
    })?;
    match raw {
        Raw::Number(n) => Ok(Some(n)),
        Raw::Text(text) => parse(&text).map(Some).map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_parse_with_and_without_units() {
        assert_eq!(parse("65536").unwrap(), 65_536);
        assert_eq!(parse("64Ki").unwrap(), 65_536);
        assert_eq!(parse("1Gi").unwrap(), 1 << 30);
        assert_eq!(parse("10M").unwrap(), 10_000_000);
    }

    #[test]
    fn counts_are_written_as_people_write_them() {
        for text in ["0", "1", "64Ki", "65537", "1536Ki", "1Gi", "3Ti"] {
            assert_eq!(format(parse(text).unwrap()), text);
        }
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in ["", "Gi", "1.5Gi", "-1", "1GB", "9999999999Ti"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
