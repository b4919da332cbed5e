//! A subscription as the bus and the sidecar use it: checked, with defaults filled in.

use std::num::NonZeroU32;
use std::time::Duration;

use duet_api::proto;

/// Longest name of a bus, topic or subscription, in bytes.
pub(crate) const MAX_NAME_BYTES: usize = 255;

/// A checked subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscriptionSpec {
    /// Unique on its bus, such as `shop/fulfil`.
    pub name: String,
    /// Name of the bus.
    pub bus: String,
    /// Name of the topic.
    pub topic: String,
    /// Path of the subscriber's endpoint; the bus itself does not look at it.
    pub path: String,
    /// Deliveries open at once, for each consumer: 1 to 10 000. Default: 64.
    pub max_in_flight: u32,
    /// Bound on one answer of the app. Default: 30 s.
    pub ack_timeout: Duration,
    /// Total tries, `None` for no bound. Default: 10.
    pub max_attempts: Option<NonZeroU32>,
    /// Wait before the second try; doubles. Default: 1 s.
    pub backoff: Duration,
    /// Longest wait. Default: 5 min.
    pub max_backoff: Duration,
    /// Where events go that cannot be handled. Default: `<topic>.dead-letter`.
    pub dead_letter_topic: String,
    /// Where the subscription starts if it does not exist yet. Default: latest.
    pub start: Start,
    /// Deliver the bare data instead of a `CloudEvent`.
    pub raw_payload: bool,
}

/// Where a new subscription starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// With events published after it was declared.
    #[default]
    Latest,
    /// With everything that the topic still holds.
    Earliest,
}

/// Why a subscription cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("subscription {name:?}: {field} {reason}")]
pub struct SubscriptionError {
    /// The subscription, as far as it is known.
    pub name: String,
    /// The field, in the spelling of the resource.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl SubscriptionSpec {
    /// A subscription with every default.
    ///
    /// # Errors
    /// When a name cannot be used.
    pub fn new(name: &str, bus: &str, topic: &str) -> Result<Self, SubscriptionError> {
        proto::Subscription {
            name: name.to_owned(),
            bus: bus.to_owned(),
            topic: topic.to_owned(),
            max_attempts: 10,
            ..proto::Subscription::default()
        }
        .try_into()
    }
}

impl TryFrom<proto::Subscription> for SubscriptionSpec {
    type Error = SubscriptionError;

    fn try_from(raw: proto::Subscription) -> Result<Self, SubscriptionError> {
        let start = raw.start();
        let name = raw.name;
        let error = |field: &'static str, reason: String| SubscriptionError {
            name: name.chars().take(MAX_NAME_BYTES).collect(),
            field,
            reason,
        };
        let dead_letter_topic = match raw.dead_letter_topic {
            empty if empty.is_empty() => format!("{}.dead-letter", raw.topic),
            named => named,
        };
        let names =
            [("name", &name), ("topic", &raw.topic), ("deadLetterTopic", &dead_letter_topic)];
        for (field, value) in names {
            check_name(value).map_err(|reason| error(field, reason.to_owned()))?;
        }
        if dead_letter_topic == raw.topic {
            return Err(error("deadLetterTopic", "is the topic itself".to_owned()));
        }
        let max_in_flight = max_in_flight(raw.max_in_flight)
            .map_err(|reason| error("delivery.maxInFlight", reason))?;
        let positive = |field, value, default| {
            duration(value, default).map_err(|reason| error(field, reason.to_owned()))
        };
        let ack_timeout = positive("delivery.ackTimeout", raw.ack_timeout, 30)?;
        let backoff = positive("retry.backoff", raw.backoff, 1)?;
        let max_backoff = positive("retry.maxBackoff", raw.max_backoff, 300)?;
        if max_backoff < backoff {
            return Err(error("retry.maxBackoff", "is below retry.backoff".to_owned()));
        }
        Ok(Self {
            bus: raw.bus,
            topic: raw.topic,
            path: raw.path,
            max_in_flight,
            ack_timeout,
            max_attempts: NonZeroU32::new(raw.max_attempts),
            backoff,
            max_backoff,
            dead_letter_topic,
            start: match start {
                proto::Start::Latest => Start::Latest,
                proto::Start::Earliest => Start::Earliest,
            },
            raw_payload: raw.raw_payload,
            name,
        })
    }
}

impl From<SubscriptionSpec> for proto::Subscription {
    fn from(spec: SubscriptionSpec) -> Self {
        let start = match spec.start {
            Start::Latest => proto::Start::Latest,
            Start::Earliest => proto::Start::Earliest,
        };
        Self {
            name: spec.name,
            bus: spec.bus,
            topic: spec.topic,
            path: spec.path,
            max_in_flight: spec.max_in_flight,
            ack_timeout: wire(spec.ack_timeout),
            max_attempts: spec.max_attempts.map_or(0, NonZeroU32::get),
            backoff: wire(spec.backoff),
            max_backoff: wire(spec.max_backoff),
            dead_letter_topic: spec.dead_letter_topic,
            start: start.into(),
            raw_payload: spec.raw_payload,
        }
    }
}

/// What any name on a bus must be: something that can be printed, of a sane length.
pub(crate) fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("is missing");
    }
    if name.len() > MAX_NAME_BYTES {
        return Err("is longer than 255 bytes");
    }
    if name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("contains white space or control characters");
    }
    Ok(())
}

fn max_in_flight(raw: u32) -> Result<u32, String> {
    match raw {
        0 => Ok(64),
        1..=10_000 => Ok(raw),
        _ => Err(format!("must be 1 to 10000, not {raw}")),
    }
}

/// Absent or zero means the default: none of these durations makes sense as zero.
fn duration(raw: Option<prost_types::Duration>, default_s: u64) -> Result<Duration, &'static str> {
    let given = match raw {
        None => Duration::ZERO,
        Some(raw) => from_wire(raw).ok_or("is negative or malformed")?,
    };
    Ok(if given.is_zero() { Duration::from_secs(default_s) } else { given })
}

/// A duration off the wire. (The library's own conversion overflows on extreme values.)
pub(crate) fn from_wire(raw: prost_types::Duration) -> Option<Duration> {
    let seconds = u64::try_from(raw.seconds).ok()?;
    let nanos = u32::try_from(raw.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}

/// A duration for the wire; one too long for it is absent, which means the default.
pub(crate) fn wire(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> proto::Subscription {
        proto::Subscription { name: "shop/a".into(), topic: "t".into(), ..Default::default() }
    }

    fn seconds(seconds: i64) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds, nanos: 0 })
    }

    #[test]
    fn absent_fields_get_the_documented_defaults() {
        let spec = SubscriptionSpec::new("shop/a", "default", "t").unwrap();
        assert_eq!((spec.max_in_flight, spec.max_attempts), (64, NonZeroU32::new(10)));
        assert_eq!(spec.ack_timeout, Duration::from_secs(30));
        assert_eq!(spec.backoff, Duration::from_secs(1));
        assert_eq!(spec.max_backoff, Duration::from_secs(300));
        assert_eq!(spec.dead_letter_topic, "t.dead-letter");
        assert_eq!(spec.start, Start::Latest);
        assert_eq!(SubscriptionSpec::try_from(raw()).unwrap().max_attempts, None, "0: no bound");
    }

    #[test]
    fn the_wire_form_round_trips() {
        let spec = SubscriptionSpec {
            start: Start::Earliest,
            raw_payload: true,
            max_in_flight: 3,
            backoff: Duration::from_millis(1),
            ..SubscriptionSpec::new("shop/a", "default", "t").unwrap()
        };
        assert_eq!(SubscriptionSpec::try_from(proto::Subscription::from(spec.clone())), Ok(spec));
    }

    #[test]
    fn bad_fields_are_named() {
        type Spoil = fn(&mut proto::Subscription);
        let cases: [(&str, Spoil); 9] = [
            ("name", |raw| raw.name.clear()),
            ("name", |raw| raw.name.push('\n')),
            ("topic", |raw| raw.topic.clear()),
            ("topic", |raw| raw.topic = "x".repeat(256)),
            ("deadLetterTopic", |raw| raw.dead_letter_topic = "t".into()),
            ("delivery.maxInFlight", |raw| raw.max_in_flight = 10_001),
            ("delivery.ackTimeout", |raw| raw.ack_timeout = seconds(-1)),
            ("retry.backoff", |raw| raw.backoff = seconds(i64::MIN)),
            ("retry.maxBackoff", |raw| raw.backoff = seconds(301)),
        ];
        for (field, spoil) in cases {
            let mut raw = raw();
            spoil(&mut raw);
            assert_eq!(SubscriptionSpec::try_from(raw).unwrap_err().field, field);
        }
    }
}
