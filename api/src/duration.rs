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

/// Writes a duration as [`parse`] reads it, in units as large as possible: `1m30s`, `500ms`, `7d`. What is finer than a
/// millisecond is left out.
#[must_use]
pub fn format(duration: Duration) -> String {
    const DAY: u64 = 86_400;
    let seconds = duration.as_secs();
    let millis = u64::from(duration.subsec_millis());
    if seconds.is_multiple_of(DAY) && seconds > 0 && millis == 0 {
        return format!("{}d", seconds / DAY);
    }
    let parts =
        [(seconds / 3600, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s"), (millis, "ms")];
    let given = parts.iter().filter(|(number, _)| *number > 0);
    let text: String = given.map(|(number, unit)| format!("{number}{unit}")).collect();
    if text.is_empty() { "0s".to_owned() } else { text }
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
    fn durations_are_written_as_people_write_them() {
        let cases = [
            (0, "0s"),
            (25, "25ms"),
            (15_000, "15s"),
            (90_000, "1m30s"),
            (300_000, "5m"),
            (5_400_001, "1h30m1ms"),
            (604_800_000, "7d"),
            (90_000_000, "25h"),
        ];
        for (millis, text) in cases {
            let duration = Duration::from_millis(millis);
            assert_eq!(format(duration), text);
            assert_eq!(parse(text).unwrap(), duration);
        }
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in ["", "1", "-1s", "1.5s", "s", "1 s", "100000s", "1s1s1s1s1s", "1y", "1sec", "١s"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
