//! The parts of a `Subscription` that have a form of their own: where it starts, where its events go, how many at once.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::duration;
use crate::resource::meta::label;

/// The service and path that events are posted to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Subscriber {
    /// Name of a service in the subscription's namespace.
    #[serde(deserialize_with = "label")]
    pub service: String,
    /// Absolute path on it. Empty: only what a route matches is delivered.
    #[serde(default, deserialize_with = "path")]
    pub path: String,
}

/// A path for some of the events.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventRoute {
    /// CEL.
    #[serde(rename = "match")]
    pub matches: String,
    /// Absolute path on the service.
    #[serde(deserialize_with = "path")]
    pub path: String,
}

fn path<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let path = String::deserialize(input)?;
    let printable = path.bytes().all(|b| b.is_ascii_graphic());
    if path.starts_with('/') && printable && !path.contains('#') {
        return Ok(path);
    }
    Err(D::Error::custom(format!("{path:?} is not an absolute path such as /events/orders")))
}

/// Several events in one request, as Dapr's bulk subscribe does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Bulk {
    /// Most events of a request: 2 to 10 000. Default: 100.
    #[serde(deserialize_with = "max")]
    pub max: u32,
    /// Longest wait for more events once there is one. Default: 1 s.
    #[serde(deserialize_with = "duration::required")]
    pub wait: Duration,
}

impl Default for Bulk {
    fn default() -> Self {
        Self { max: 100, wait: Duration::from_secs(1) }
    }
}

fn max<'de, D: Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    match u32::deserialize(input)? {
        n @ 2..=10_000 => Ok(n),
        n => Err(D::Error::custom(format!("max must be 2 to 10000, not {n}"))),
    }
}

/// Where a new subscription starts: `latest`, `earliest`, `{time: …}` or `{position: …}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// With events published after it was declared.
    #[default]
    Latest,
    /// With everything that the topic still holds.
    Earliest,
    /// With events published at or after this time.
    Time(Timestamp),
    /// With this position of the topic, from 1.
    Position(u64),
}

impl<'de> Deserialize<'de> for Start {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_any(StartVisitor)
    }
}

struct StartVisitor;

impl<'de> Visitor<'de> for StartVisitor {
    type Value = Start;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("latest, earliest, {time: 2026-01-31T12:00:00Z} or {position: 1}")
    }

    fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Start, E> {
        match word {
            "latest" => Ok(Start::Latest),
            "earliest" => Ok(Start::Earliest),
            _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Start, A::Error> {
        let start = match map.next_key::<String>()?.as_deref() {
            Some("time") => Start::Time(map.next_value_seed(TimeSeed)?),
            Some("position") => Start::Position(map.next_value()?),
            Some(other) => return Err(A::Error::unknown_field(other, &["time", "position"])),
            None => return Err(A::Error::custom("a time or a position is missing")),
        };
        match map.next_key::<String>()? {
            None => Ok(start),
            Some(_) => Err(A::Error::custom("either a time or a position, not more")),
        }
    }
}

/// The message of the time library alone would not say what is wanted.
struct TimeSeed;

impl<'de> serde::de::DeserializeSeed<'de> for TimeSeed {
    type Value = Timestamp;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Timestamp, D::Error> {
        let text = String::deserialize(input)?;
        text.parse().map_err(|_error| {
            D::Error::custom(format!(
                "{text:?} is not an RFC 3339 time such as 2026-01-31T12:00:00Z"
            ))
        })
    }
}
