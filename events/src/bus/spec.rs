//! A subscription as the bus and the sidecar use it: checked, with defaults filled in.

use std::num::NonZeroU32;
use std::time::Duration;

use duet_api::proto;

/// Longest name of a bus, topic or subscription, in bytes.
pub(crate) const MAX_NAME_BYTES: usize = 255;
/// Most routes of a subscription.
const MAX_ROUTES: usize = 64;
/// Longest filter or match of a route, in bytes.
pub const MAX_EXPRESSION_BYTES: usize = 2048;
/// Longest path, in bytes.
const MAX_PATH_BYTES: usize = 2048;

/// A checked subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a setting of its own, as people write it"
)]
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
    /// Deliver the data as bytes, without what the event says of it. Only an application's own subscriptions ask for it.
    pub raw_payload: bool,
    /// Events with the same partition key are delivered in publish order, one at a time. Default: false.
    pub ordered: bool,
    /// CEL: events for which it is not true are done without a delivery. Evaluated by whoever serves the bus.
    pub filter: Option<String>,
    /// The first that matches says the path; `path` is for events that match none.
    pub routes: Vec<Route>,
    /// Every replica gets every event, by a subscription of its own.
    pub broadcast: bool,
    /// The sidecar remembers handled (`source`, `id`) pairs.
    pub once: bool,
    /// Several events in one request. `None`: one by one.
    pub bulk: Option<Bulk>,
    /// Without a consumer for this long, the subscription is forgotten. `None`: never.
    pub idle_expiry: Option<Duration>,
    /// A resource says all this, and not only a consumer. Never read off the wire: whoever serves the bus knows.
    pub declared: bool,
}

/// Where events go that match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// CEL.
    pub matches: String,
    /// Path of the subscriber's endpoint.
    pub path: String,
}

/// Bounds of a bulk delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bulk {
    /// Most events of one request: 1 to 10 000. One is a bulk all the same, as an application of Dapr may want it.
    pub max: u32,
    /// Longest wait for more events once there is one.
    pub wait: Duration,
}

/// Where a new subscription starts, or an old one is moved to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// With events published after it was declared.
    #[default]
    Latest,
    /// With everything that the topic still holds.
    Earliest,
    /// With events published at or after this time, in milliseconds since the epoch.
    Time(u64),
    /// With this position.
    Position(u64),
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

    /// Why this cannot be had of a subscription on `topic`. A move costs it what waits for it there, so only a resource
    /// moves one: a consumer may have come upon the name of somebody else's.
    pub(crate) fn cannot_leave(&self, topic: &str) -> Option<String> {
        (topic != self.topic && !self.declared).then(|| {
            format!("it is on topic {topic:?}, and only a resource moves it to {:?}", self.topic)
        })
    }
}

impl TryFrom<proto::Subscription> for SubscriptionSpec {
    type Error = SubscriptionError;

    fn try_from(raw: proto::Subscription) -> Result<Self, SubscriptionError> {
        let start = start(&raw);
        let name = raw.name;
        let error = |field: &'static str, reason: String| SubscriptionError {
            name: name.chars().take(MAX_NAME_BYTES).collect(),
            field,
            reason,
        };
        let dead_letter_topic = dead_letter_topic(raw.dead_letter_topic, &raw.topic);
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
        let start = start.map_err(|reason| error("start", reason.to_owned()))?;
        let bulk = bulk(raw.bulk_max, raw.bulk_wait).map_err(|(field, why)| error(field, why))?;
        let idle_expiry = raw.idle_expiry.map(|raw| from_wire(raw).ok_or("is negative"));
        let idle_expiry =
            idle_expiry.transpose().map_err(|reason| error("idleExpiry", reason.to_owned()))?;
        check_texts(&raw.path, &raw.filter, &raw.routes)
            .map_err(|(field, why)| error(field, why))?;
        let routes =
            raw.routes.into_iter().map(|route| Route { matches: route.r#match, path: route.path });
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
            start,
            raw_payload: raw.raw_payload,
            ordered: raw.ordered,
            filter: Some(raw.filter).filter(|filter| !filter.is_empty()),
            routes: routes.collect(),
            broadcast: raw.broadcast,
            once: raw.once,
            bulk,
            idle_expiry,
            declared: false,
            name,
        })
    }
}

impl From<SubscriptionSpec> for proto::Subscription {
    fn from(spec: SubscriptionSpec) -> Self {
        let (start, start_time, start_position) = match spec.start {
            Start::Latest => (proto::Start::Latest, None, 0),
            Start::Earliest => (proto::Start::Earliest, None, 0),
            Start::Time(ms) => (proto::Start::Time, Some(timestamp(ms)), 0),
            Start::Position(position) => (proto::Start::Position, None, position),
        };
        let routes = spec.routes.into_iter();
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
            start_time,
            start_position,
            ordered: spec.ordered,
            filter: spec.filter.unwrap_or_default(),
            routes: routes
                .map(|route| proto::EventRoute { r#match: route.matches, path: route.path })
                .collect(),
            broadcast: spec.broadcast,
            once: spec.once,
            bulk_max: spec.bulk.map_or(0, |bulk| bulk.max),
            bulk_wait: spec.bulk.and_then(|bulk| wire(bulk.wait)),
            idle_expiry: spec.idle_expiry.and_then(wire),
        }
    }
}

fn dead_letter_topic(named: String, topic: &str) -> String {
    if named.is_empty() { format!("{topic}{}", super::dead_letter::SUFFIX) } else { named }
}

fn start(raw: &proto::Subscription) -> Result<Start, &'static str> {
    Ok(match raw.start() {
        proto::Start::Latest => Start::Latest,
        proto::Start::Earliest => Start::Earliest,
        proto::Start::Position => Start::Position(raw.start_position),
        proto::Start::Time => {
            let time = raw.start_time.ok_or("has no time")?;
            let seconds = u64::try_from(time.seconds).map_err(|_negative| "is before 1970")?;
            let millis = u64::try_from(time.nanos).unwrap_or_default() / 1_000_000;
            Start::Time(seconds.saturating_mul(1000).saturating_add(millis))
        }
    })
}

fn timestamp(ms: u64) -> prost_types::Timestamp {
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    let nanos = i32::try_from(ms % 1000).unwrap_or_default() * 1_000_000;
    prost_types::Timestamp { seconds, nanos }
}

fn bulk(
    max: u32,
    wait: Option<prost_types::Duration>,
) -> Result<Option<Bulk>, (&'static str, String)> {
    match max {
        0 => Ok(None),
        1..=10_000 => {
            let wait = match wait {
                None => Duration::from_secs(1),
                Some(raw) => {
                    from_wire(raw).ok_or_else(|| ("bulk.wait", "is negative".to_owned()))?
                }
            };
            Ok(Some(Bulk { max, wait }))
        }
        _ => Err(("bulk.max", format!("must be at most 10000, not {max}"))),
    }
}

/// Bounds what is kept for each consumer, and what it takes to compile it.
fn check_texts(
    path: &str,
    filter: &str,
    routes: &[proto::EventRoute],
) -> Result<(), (&'static str, String)> {
    let long = |text: &str, most: usize| {
        (text.len() > most).then(|| format!("{} bytes, more than {most}", text.len()))
    };
    if let Some(long) = long(path, MAX_PATH_BYTES) {
        return Err(("subscriber.path", format!("has {long}")));
    }
    if let Some(long) = long(filter, MAX_EXPRESSION_BYTES) {
        return Err(("filter", format!("has {long}")));
    }
    if routes.len() > MAX_ROUTES {
        return Err(("routes", format!("has {} entries, more than {MAX_ROUTES}", routes.len())));
    }
    for (number, route) in routes.iter().enumerate() {
        if let Some(long) = long(&route.r#match, MAX_EXPRESSION_BYTES) {
            return Err(("routes", format!("has a match of {long}, at {number}")));
        }
        if let Some(long) = long(&route.path, MAX_PATH_BYTES) {
            return Err(("routes", format!("has a path of {long}, at {number}")));
        }
    }
    Ok(())
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
mod tests;
