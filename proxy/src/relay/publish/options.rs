//! What a publisher asks for beside its event: Dapr's `metadata`, the same for HTTP, bulk and gRPC.

use std::time::Duration;

use duet_events::cloudevent::{DELIVER_AT, EnvelopeError, Event, PARTITION_KEY};
use http::StatusCode;
use jiff::{SignedDuration, Timestamp};

use super::super::problem::Problem;

/// Longest value that becomes an attribute: of a bulk or a batch, each event gets a copy.
const MAX_VALUE_BYTES: usize = 1024;
/// What an event may be published for: longer than anybody waits, and far from the calendar's end.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);

/// A checked set of options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::relay) struct Options {
    /// The body is opaque data, even if it looks like an envelope.
    pub(in crate::relay) raw_payload: bool,
    /// An envelope that lacks what it must have gets it, as Dapr does.
    pub(in crate::relay) fill_envelope: bool,
    ttl: Option<Duration>,
    expire_with_deadline: bool,
    partition_key: Option<String>,
    deliver: Option<Deliver>,
    // Dapr's `cloudevent.*`: the attributes of the envelope that a plain body is wrapped into.
    id: Option<String>,
    source: Option<String>,
    event_type: Option<String>,
    trace_parent: Option<String>,
    trace_state: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deliver {
    At(Timestamp),
    After(Duration),
}

impl Options {
    /// Those of a publish over gRPC that asks for nothing: SDKs send envelopes by it that Dapr completes.
    pub(in crate::relay) fn of_grpc() -> Self {
        Self { fill_envelope: true, ..Self::default() }
    }

    /// Reads the `metadata.` parameters of a query string. Others are not ours, but for one that lacks the word: an event
    /// that its publisher wants to expire, or to come later, would do neither.
    ///
    /// # Errors
    /// 400 with the name of the parameter.
    pub(in crate::relay) fn from_query(query: &str) -> Result<Self, Problem> {
        let mut options = Self::default();
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decoded(name)?, decoded(value)?);
            if let Some(key) = name.strip_prefix("metadata.") {
                options.set(key, &value).map_err(|reason| refuse(&name, &reason))?;
            } else if OURS.contains(&name.as_str()) {
                let reason = format!("means nothing; write metadata.{name}");
                return Err(refuse(&name, &reason));
            }
        }
        options.check()
    }

    /// Reads a map of metadata, as Dapr's gRPC API and bulk entries carry it, over what `self` has.
    ///
    /// # Errors
    /// 400 with the name of the key.
    pub(in crate::relay) fn with<'a>(
        mut self,
        metadata: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, Problem> {
        for (key, value) in metadata {
            self.set(key, value).map_err(|reason| refuse(key, &reason))?;
        }
        self.check()
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "ttlInSeconds" => {
                let seconds = value.parse::<u64>().ok().filter(|seconds| *seconds > 0);
                let ttl = seconds
                    .ok_or_else(|| format!("{value:?} is not a number of seconds, such as 60"))?;
                self.ttl = Some(bounded(Duration::from_secs(ttl))?);
            }
            "rawPayload" => self.raw_payload = flag(value)?,
            "expireWithDeadline" => self.expire_with_deadline = flag(value)?,
            "partitionKey" => self.partition_key = Some(filled(value)?),
            "deliverAt" => {
                let at = value.parse().map_err(|_err| {
                    format!("{value:?} is not a time as in RFC 3339, such as 2026-01-31T12:00:00Z")
                })?;
                self.deliver = Some(Deliver::At(at));
            }
            "deliverAfter" => {
                let after = duet_api::duration::parse(value).map_err(|error| error.to_string())?;
                self.deliver = Some(Deliver::After(bounded(after)?));
            }
            "cloudevent.id" => self.id = Some(filled(value)?),
            "cloudevent.source" => self.source = Some(filled(value)?),
            "cloudevent.type" => self.event_type = Some(filled(value)?),
            "cloudevent.traceparent" | "cloudevent.traceid" => {
                self.trace_parent = Some(filled(value)?);
            }
            "cloudevent.tracestate" => self.trace_state = Some(filled(value)?),
            // What Dapr's runtime and SDKs add by themselves, and what says nothing that the request does not.
            _ if KNOWN_ELSEWHERE.iter().any(|known| key.eq_ignore_ascii_case(known)) => {}
            _ => return Err("is not supported".to_owned()),
        }
        Ok(())
    }

    fn check(self) -> Result<Self, Problem> {
        if self.ttl.is_some() && self.expire_with_deadline {
            return Err(refuse("expireWithDeadline", "is given beside ttlInSeconds"));
        }
        Ok(self)
    }

    /// Gives the event what was asked for. `wrapped`: the body was no envelope, so Dapr's overrides apply. `deadline`: what
    /// is left of the call that the event belongs to.
    ///
    /// # Errors
    /// When a value cannot be an attribute, or is not a time where it has to be one.
    pub(in crate::relay) fn apply(
        &self,
        mut event: Event,
        wrapped: bool,
        deadline: Option<Duration>,
        now: Timestamp,
    ) -> Result<Event, EnvelopeError> {
        if wrapped {
            let names = [&self.id, &self.source, &self.event_type].map(Option::as_deref);
            if let [id, source, kind] = names
                && names.iter().any(Option::is_some)
            {
                event = event.renamed(id, source, kind)?;
            }
            let trace = [("traceparent", &self.trace_parent), ("tracestate", &self.trace_state)];
            for (name, value) in trace {
                if let Some(value) = value {
                    event = event.with_attribute(name, value)?;
                }
            }
        }
        let deadline = deadline.filter(|_| self.expire_with_deadline);
        if let Some(ttl) = self.ttl.or(deadline) {
            event = event.expiring(after(now, ttl));
        }
        match self.deliver {
            Some(Deliver::At(at)) => event = event.with_attribute(DELIVER_AT, &at.to_string())?,
            Some(Deliver::After(wait)) => event = event.delayed(after(now, wait)),
            None => {}
        }
        if let Some(key) = &self.partition_key {
            event = event.with_attribute(PARTITION_KEY, key)?;
        }
        event.check_schedule()?;
        Ok(event)
    }
}

/// Keys that change when, whether or as what an event is delivered.
const OURS: [&str; 6] = [
    "ttlInSeconds",
    "rawPayload",
    "expireWithDeadline",
    "partitionKey",
    "deliverAt",
    "deliverAfter",
];

/// Keys without a meaning here that are no reason to refuse: they repeat what the request says elsewhere.
const KNOWN_ELSEWHERE: [&str; 5] =
    ["content-type", "contentType", "pubsubName", "traceparent", "tracestate"];

fn after(now: Timestamp, wait: Duration) -> Timestamp {
    let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
    now.checked_add(wait).unwrap_or(Timestamp::MAX)
}

fn bounded(wait: Duration) -> Result<Duration, String> {
    if wait > LONGEST { Err("is longer than a hundred years".to_owned()) } else { Ok(wait) }
}

/// As Go's `strconv.ParseBool`, which Dapr uses.
pub(in crate::relay) fn flag(value: &str) -> Result<bool, String> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{value:?} is neither true nor false")),
    }
}

fn filled(value: &str) -> Result<String, String> {
    if value.is_empty() {
        return Err("is empty".to_owned());
    }
    if value.len() > MAX_VALUE_BYTES {
        return Err(format!("is longer than {MAX_VALUE_BYTES} bytes"));
    }
    Ok(value.to_owned())
}

/// A piece of a query string: `+` is a space, and `%` escapes are UTF-8.
pub(in crate::relay) fn decoded(text: &str) -> Result<String, Problem> {
    let spaced = text.replace('+', " ");
    let decoded = percent_encoding::percent_decode_str(&spaced).decode_utf8();
    decoded.map(Into::into).map_err(|_err| refuse(text, "is not UTF-8"))
}

fn refuse(name: &str, reason: &str) -> Problem {
    let name: String = name.chars().take(64).collect();
    let text = format!("{name:?} {reason}");
    let mut problem = Problem::new(StatusCode::BAD_REQUEST, "ERR_PUBSUB_REQUEST_METADATA", text);
    problem.attribute = Some(name);
    problem
}

#[cfg(test)]
mod tests {
    use duet_events::cloudevent::EXPIRY_TIME;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn event() -> Event {
        Event::new("1", "/s", "t").unwrap()
    }

    #[test]
    fn metadata_becomes_attributes() {
        let query = "metadata.ttlInSeconds=60&x=1&metadata.partitionKey=a+b%2Fc&metadata.deliverAfter=30s\
             &metadata.rawPayload=true&metadata.cloudevent.type=mine";
        let options = Options::from_query(query).unwrap();
        assert!(options.raw_payload);
        let wrapped = options.apply(event(), true, None, now()).unwrap();
        assert_eq!(wrapped.attribute(EXPIRY_TIME), Some("2026-01-01T00:01:00Z"));
        assert_eq!(wrapped.attribute(DELIVER_AT), Some("2026-01-01T00:00:30Z"));
        assert_eq!(wrapped.attribute(PARTITION_KEY), Some("a b/c"));
        assert_eq!(wrapped.event_type(), "mine");
        let own = options.apply(event(), false, None, now()).unwrap();
        assert_eq!(own.event_type(), "t", "an envelope of its own stays as it is");
    }

    #[test]
    fn a_deadline_bounds_the_event_only_when_asked() {
        let left = Some(Duration::from_millis(1500));
        let plain = Options::default().apply(event(), true, left, now()).unwrap();
        assert_eq!(plain.attribute(EXPIRY_TIME), None);
        let asked = Options::from_query("metadata.expireWithDeadline=true").unwrap();
        let bounded = asked.apply(event(), true, left, now()).unwrap();
        assert_eq!(bounded.attribute(EXPIRY_TIME), Some("2026-01-01T00:00:01.5Z"));
        let unbounded = asked.apply(event(), true, None, now()).unwrap();
        assert_eq!(unbounded.attribute(EXPIRY_TIME), None, "the call has no deadline");
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (query, name) in [
            ("metadata.ttlInSeconds=0", "metadata.ttlInSeconds"),
            ("metadata.ttlInSeconds=soon", "metadata.ttlInSeconds"),
            ("metadata.ttlInSeconds=99999999999999", "metadata.ttlInSeconds"),
            ("metadata.rawPayload=maybe", "metadata.rawPayload"),
            ("metadata.deliverAt=tomorrow", "metadata.deliverAt"),
            ("metadata.deliverAfter=-1s", "metadata.deliverAfter"),
            ("metadata.partitionKey=", "metadata.partitionKey"),
            (&format!("metadata.partitionKey={}", "k".repeat(1025)), "metadata.partitionKey"),
            ("metadata.priority=1", "metadata.priority"),
            ("ttlInSeconds=60", "ttlInSeconds"),
            ("metadata.ttlInSeconds=1&metadata.expireWithDeadline=true", "expireWithDeadline"),
        ] {
            let problem = Options::from_query(query).unwrap_err();
            assert_eq!(problem.attribute.as_deref(), Some(name), "{query}");
            assert_eq!(problem.status, StatusCode::BAD_REQUEST);
        }
        assert!(Options::from_query("metadata.content-type=text%2Fplain").is_ok());
    }

    #[test]
    fn an_envelope_with_a_bad_schedule_is_refused() {
        let event = event().with_attribute(EXPIRY_TIME, "later").unwrap();
        let error = Options::default().apply(event, false, None, now()).unwrap_err();
        assert_eq!(error.attribute(), Some(EXPIRY_TIME));
    }
}
