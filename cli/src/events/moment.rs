//! Moments, as people say them on the command line.

use std::fmt;

use jiff::Timestamp;
use serde_json::{Value, json};

/// Where a topic or a subscription goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Earliest,
    Latest,
    Position(u64),
    Time(Timestamp),
}

impl From {
    /// # Errors
    /// When it is none of them.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("earliest", _) => Ok(Self::Earliest),
            ("latest", _) => Ok(Self::Latest),
            (_, Ok(position)) => Ok(Self::Position(position)),
            (_, Err(_)) => time(text).map(Self::Time).map_err(|error| {
                format!("{error}; earliest, latest or a position would do as well")
            }),
        }
    }

    /// As the control plane takes it.
    pub(super) fn json(self) -> Value {
        match self {
            Self::Earliest => json!("earliest"),
            Self::Latest => json!("latest"),
            Self::Position(position) => json!({ "position": position }),
            Self::Time(time) => json!({ "time": time.to_string() }),
        }
    }
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Earliest => f.write_str("earliest"),
            Self::Latest => f.write_str("latest"),
            Self::Position(position) => write!(f, "{position}"),
            Self::Time(time) => write!(f, "{time}"),
        }
    }
}

/// A time of RFC 3339, in whatever zone it says, or so long ago.
///
/// # Errors
/// When it is neither.
pub(super) fn time(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago = duet_api::duration::parse(text).map_err(|_error| {
        format!(
            "{text:?} is neither a time such as 2026-01-31T12:00:00Z nor so long ago, such as 1h30m"
        )
    })?;
    Timestamp::now().checked_sub(ago).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_read_as_they_are_written() {
        let time: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        for (text, from, sent) in [
            ("earliest", From::Earliest, json!("earliest")),
            ("latest", From::Latest, json!("latest")),
            ("7", From::Position(7), json!({"position": 7})),
            ("2026-01-31T12:00:00Z", From::Time(time), json!({"time": "2026-01-31T12:00:00Z"})),
        ] {
            let read = From::parse(text).unwrap();
            assert_eq!((read, read.to_string().as_str(), read.json()), (from, text, sent));
        }
        assert_eq!(From::parse("2026-01-31T14:00:00+02:00"), Ok(From::Time(time)));
        // Without a zone it could be anywhere's.
        for bad in ["noon", "2026-01-31", "2026-01-31T12:00:00", "-1", ""] {
            let error = From::parse(bad).unwrap_err();
            assert!(error.contains(&format!("{bad:?}")) && error.contains("earliest"), "{error}");
        }
    }

    #[test]
    fn a_duration_is_so_long_ago() {
        let hour = std::time::Duration::from_secs(3600);
        let before = Timestamp::now().checked_sub(hour).unwrap();
        let read = time("1h").unwrap();
        let after = Timestamp::now().checked_sub(hour).unwrap();
        assert!(before <= read && read <= after, "{before} {read} {after}");
    }
}
