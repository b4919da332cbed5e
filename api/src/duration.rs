//! Durations as people write them: Gateway API's form (GEP-2257: `1h30m`, `500ms`), plus `d` for days.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// Why a string is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a duration: write 1 to 4 numbers of up to 5 digits, each with a unit of d, h, m, s or ms, such as 500ms or 1h30m"
)]
pub struct DurationError(String);

/// Parses a duration such as `2s`, `500ms`, `1h30m` or `7d`. `0s` is valid and usually disables.
///
/// # Errors
/// When the string has another form; fractions, signs and missing units included.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let error = || DurationError(text.chars().take(64).collect());
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut groups = 0;
    while !rest.is_empty() {
        groups += 1;
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        if digits == 0 || digits > 5 || groups > 4 {
            return Err(error());
        }
        let number: u64 = number.parse().map_err(|_err| error())?;
        total += match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number * 60),
            "h" => Duration::from_secs(number * 3600),
            "d" => Duration::from_secs(number * 86_400),
            _ => return Err(error()),
        };
        rest = tail;
    }
    if groups == 0 { Err(error()) } else { Ok(total) }
}

/// For `#[serde(deserialize_with)]` on an optional field.
///
/// # Errors
/// When the value is not a string of the form above.
pub fn option<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Duration>, D::Error> {
    required(input).map(Some)
}

/// For `#[serde(deserialize_with)]` on a required field.
///
/// # Errors
/// When the value is not a string of the form above.
pub fn required<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    parse(&String::deserialize(input)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_api_forms_parse() {
        assert_eq!(parse("0s").unwrap(), Duration::ZERO);
        assert_eq!(parse("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse("1h30m").unwrap(), Duration::from_secs(5400));
        assert_eq!(parse("7d").unwrap(), Duration::from_secs(604_800));
        assert_eq!(parse("99999h99999m99999s99999ms").unwrap().as_secs(), 366_096_438);
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in ["", "1", "-1s", "1.5s", "s", "1 s", "100000s", "1s1s1s1s1s", "1y", "1sec", "١s"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
