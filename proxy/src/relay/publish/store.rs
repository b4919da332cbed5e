//! From checked events to durable ones, whichever way they were published: HTTP, bulk or gRPC.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use duet_events::bus::{PublishError, PublishErrorKind};
use duet_events::cloudevent::{
    EnvelopeError, Event, WrapContext, decode, decode_filling, decode_opaque,
};
use duet_events::outbox::Accepted;
use http::{HeaderMap, StatusCode};
use http_body::Body as HttpBody;
use http_body_util::BodyExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::super::buses::Buses;
use super::super::metrics::EventMetrics;
use super::super::problem::Problem;
use super::options::Options;

/// Longest name of a bus or topic.
const MAX_NAME_BYTES: usize = 255;
/// Most events of one request: an event takes more in memory than in a body.
pub(in crate::relay) const MAX_ENTRIES: usize = 10_000;
/// A publisher must send its whole body within this time.
pub(in crate::relay) const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Where an accepted publish lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::relay) enum Done {
    /// On the bus.
    Bus,
    /// In the outbox on this machine's disk.
    Outbox,
}

impl Done {
    /// For the metric and the header.
    pub(in crate::relay) fn label(self) -> &'static str {
        match self {
            Self::Bus => "bus",
            Self::Outbox => "outbox",
        }
    }
}

/// Takes what the application publishes.
#[derive(Debug)]
pub(in crate::relay) struct Publishing {
    buses: Arc<Buses>,
    metrics: EventMetrics,
    source: String,
    max_body_bytes: usize,
    /// Bytes of publishes that are on their way.
    room: Arc<Semaphore>,
}

impl Publishing {
    /// `source` is the one of plain bodies; `in_flight_bytes` bounds what all publishes together hold in memory.
    pub(in crate::relay) fn new(
        buses: Arc<Buses>,
        metrics: EventMetrics,
        source: String,
        (max_body_bytes, in_flight_bytes): (usize, usize),
    ) -> Self {
        let room = Arc::new(Semaphore::new(in_flight_bytes));
        Self { buses, metrics, source, max_body_bytes, room }
    }

    /// Stores all of the events or none, and only then says so. Counts the outcome.
    ///
    /// # Errors
    /// What the answer to the publisher is.
    pub(in crate::relay) async fn store(
        &self,
        bus: &str,
        topic: &str,
        events: Vec<Event>,
    ) -> Result<Done, Problem> {
        let stored = self.try_store(bus, topic, events).await;
        match &stored {
            Ok(done) => self.count(bus, topic, done.label()),
            Err(problem) => self.count_refused(bus, topic, problem),
        }
        stored
    }

    /// Counts a publish that did not get as far as [`Self::store`].
    pub(in crate::relay) fn count_refused(&self, bus: &str, topic: &str, problem: &Problem) {
        self.count(bus, topic, label(problem.status));
    }

    async fn try_store(&self, bus: &str, topic: &str, events: Vec<Event>) -> Result<Done, Problem> {
        let publisher = self.buses.publisher(bus, topic)?;
        if events.is_empty() {
            return Ok(Done::Bus);
        }
        match publisher.publish(topic, events).await {
            Ok(Accepted::Stored(_)) => Ok(Done::Bus),
            Ok(Accepted::Spooled) => Ok(Done::Outbox),
            Err(error) => Err(refused(error)),
        }
    }

    fn count(&self, bus: &str, topic: &str, outcome: &'static str) {
        let bus = if self.buses.knows(bus) { bus } else { "unknown" };
        self.metrics.published(bus, topic, outcome);
    }

    /// Checks that publishes to the topic are taken at all, before anything is read.
    ///
    /// # Errors
    /// When the bus is unknown, takes declared topics only and this is none, or policies forbid the publish.
    pub(in crate::relay) fn check(&self, bus: &str, topic: &str) -> Result<(), Problem> {
        self.buses.publisher(bus, topic).map(drop)
    }

    /// The events of a body: `headers` has at least its `Content-Type`. `deadline` is what is left of the call that the
    /// publisher is working on.
    ///
    /// # Errors
    /// When an envelope is not valid.
    pub(in crate::relay) fn read(
        &self,
        (bus, topic): (&str, &str),
        headers: &HeaderMap,
        body: Bytes,
        options: &Options,
        deadline: Option<Duration>,
    ) -> Result<Vec<Event>, Problem> {
        let now = jiff::Timestamp::now();
        let context = WrapContext { source: &self.source, bus, topic, now };
        let wrapped = options.raw_payload || is_plain(headers);
        let events = if options.raw_payload {
            decode_opaque(headers, body, &context).map(|event| vec![event])
        } else if options.fill_envelope {
            decode_filling(headers, body, &context)
        } else {
            decode(headers, body, &context)
        };
        let mut events = events.map_err(|error| malformed(&error))?;
        if events.len() > MAX_ENTRIES {
            let text = format!("the batch has more than {MAX_ENTRIES} events");
            return Err(Problem::new(StatusCode::BAD_REQUEST, "ERR_PUBSUB_EVENTS_SER", text));
        }
        // A plain body's event has it already.
        if !wrapped {
            for event in &mut events {
                event.fill_trace(headers);
            }
        }
        let events = events.into_iter();
        let applied = events.map(|event| options.apply(event, wrapped, deadline, now));
        applied.collect::<Result<_, _>>().map_err(|error| malformed(&error))
    }

    /// Reads a body within all bounds. What it takes in memory is given back when the [`Held`] is dropped.
    ///
    /// # Errors
    /// 413 when it is too large, 408 when it is too slow, 429 when others have taken the room.
    pub(in crate::relay) async fn body<B>(&self, body: B) -> Result<Held, Problem>
    where
        B: HttpBody<Data = Bytes, Error: std::fmt::Display> + Unpin,
    {
        let read = tokio::time::timeout(BODY_TIMEOUT, self.collect(body)).await;
        read.unwrap_or_else(|_elapsed| {
            let text = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "ERR_MALFORMED_REQUEST", text))
        })
    }

    async fn collect<B>(&self, mut body: B) -> Result<Held, Problem>
    where
        B: HttpBody<Data = Bytes, Error: std::fmt::Display> + Unpin,
    {
        let mut held = Held { room: self.take_room(0)?, bytes: BytesMut::new() };
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                let text = format!("the body ended early: {error}");
                Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text)
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if held.bytes.len() + data.len() > self.max_body_bytes {
                let text = format!("the body is larger than {} bytes", self.max_body_bytes);
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                return Err(Problem::new(status, "ERR_BODY_TOO_LARGE", text));
            }
            held.room.merge(self.take_room(data.len())?);
            held.bytes.extend_from_slice(&data);
        }
        Ok(held)
    }

    /// Room for this many bytes, until dropped.
    ///
    /// # Errors
    /// 429 while others have it.
    pub(in crate::relay) fn take_room(
        &self,
        bytes: usize,
    ) -> Result<OwnedSemaphorePermit, Problem> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        Arc::clone(&self.room).try_acquire_many_owned(bytes).map_err(|_full| {
            let text = "too many bytes are being published at once";
            let status = StatusCode::TOO_MANY_REQUESTS;
            let mut problem = Problem::new(status, "ERR_PUBSUB_FULL", text);
            problem.retry_after = Some(1);
            problem
        })
    }
}

/// A body in memory, and the room that it takes.
#[derive(Debug)]
pub(in crate::relay) struct Held {
    bytes: BytesMut,
    room: OwnedSemaphorePermit,
}

impl Held {
    /// The body, and what has to live as long as its events do.
    pub(in crate::relay) fn split(self) -> (Bytes, OwnedSemaphorePermit) {
        (self.bytes.freeze(), self.room)
    }
}

/// Checks that the body is the event itself: a subscriber would not be told of an encoding, and could not undo it.
///
/// # Errors
/// 415 when the body is encoded.
pub(super) fn check_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    let mut encodings = headers.get_all(http::header::CONTENT_ENCODING).iter();
    let Some(encoding) =
        encodings.find(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
    else {
        return Ok(());
    };
    let text = format!("a body with Content-Encoding {encoding:?} is not read; send it without");
    Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "ERR_MALFORMED_REQUEST", text))
}

/// Neither an envelope in the body nor one in the headers.
fn is_plain(headers: &HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let enveloped = kind.is_some_and(|kind| {
        kind.trim_start().to_ascii_lowercase().starts_with("application/cloudevents")
    });
    !enveloped && !headers.keys().any(|name| name.as_str().starts_with("ce-"))
}

/// The metric's word for a refusal.
fn label(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST | StatusCode::UNSUPPORTED_MEDIA_TYPE => "invalid",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::FORBIDDEN => "denied",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        StatusCode::TOO_MANY_REQUESTS => "full",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        _ => "failed",
    }
}

/// The bus and the topic that a path ends with. As in Dapr, everything after the bus is the topic, slashes too.
///
/// # Errors
/// 400 when one of them cannot be one.
pub(in crate::relay) fn target(path: &str) -> Result<(String, String), Problem> {
    let bad = |text: String| Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text);
    let decoded = |text: &str| {
        let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
        let decoded = decoded.map_err(|_err| bad(format!("{text:?} is not UTF-8")))?;
        Ok::<_, Problem>(decoded.into_owned())
    };
    let (bus, topic) = path.split_once('/').unwrap_or((path, ""));
    let (bus, topic) = (decoded(bus)?, decoded(topic)?);
    if bus.is_empty() || topic.is_empty() || bus.contains('/') {
        return Err(bad("the path ends with /{bus}/{topic}".to_owned()));
    }
    check_name(&bus)?;
    check_name(&topic)?;
    Ok((bus, topic))
}

/// Checks a bus's or topic's name.
///
/// # Errors
/// 400 when it cannot be one.
pub(in crate::relay) fn check_name(name: &str) -> Result<(), Problem> {
    // As the bus itself has it: what is accepted into the outbox must not be refused later.
    let odd = |c: char| c.is_control() || c.is_whitespace();
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(odd) {
        let text = format!(
            "a bus or topic has a name of 1 to {MAX_NAME_BYTES} bytes, without white space and control characters"
        );
        return Err(Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text));
    }
    Ok(())
}

fn malformed(error: &EnvelopeError) -> Problem {
    let status = match error.is_unsupported_format() {
        true => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        false => StatusCode::BAD_REQUEST,
    };
    let mut problem = Problem::new(status, "ERR_PUBSUB_CLOUD_EVENTS_SER", error.to_string());
    problem.attribute = error.attribute().map(str::to_owned);
    problem
}

fn refused(error: PublishError) -> Problem {
    let (status, code, retry_after) = match error.kind {
        PublishErrorKind::UnknownBus => (StatusCode::NOT_FOUND, "ERR_PUBSUB_NOT_FOUND", None),
        PublishErrorKind::UnknownTopic => (StatusCode::NOT_FOUND, "ERR_TOPIC_NOT_FOUND", None),
        PublishErrorKind::Denied => (StatusCode::FORBIDDEN, "ERR_PUBSUB_FORBIDDEN", None),
        PublishErrorKind::Invalid => (StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", None),
        PublishErrorKind::Full => (StatusCode::TOO_MANY_REQUESTS, "ERR_PUBSUB_FULL", Some(1)),
        PublishErrorKind::Unavailable => {
            (StatusCode::SERVICE_UNAVAILABLE, "ERR_PUBSUB_PUBLISH_MESSAGE", Some(1))
        }
        PublishErrorKind::Internal => {
            (StatusCode::INTERNAL_SERVER_ERROR, "ERR_PUBSUB_PUBLISH_MESSAGE", None)
        }
    };
    let mut problem = Problem::new(status, code, error.message);
    problem.retry_after = retry_after;
    problem
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_is_encoded_is_not_read() {
        let check = |encodings: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for encoding in encodings {
                let value = http::HeaderValue::from_static(encoding);
                headers.append(http::header::CONTENT_ENCODING, value);
            }
            check_encoding(&headers)
        };
        assert!(check(&[]).is_ok() && check(&["identity"]).is_ok() && check(&["Identity"]).is_ok());
        for encodings in [&["gzip"][..], &["identity", "br"], &["identity, gzip"]] {
            let refused = check(encodings).unwrap_err();
            assert_eq!(refused.status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{encodings:?}");
        }
    }

    #[test]
    fn the_topic_is_all_that_follows_the_bus() {
        for (path, bus, topic) in [
            ("default/orders", "default", "orders"),
            ("default/sensors/kitchen/temperature", "default", "sensors/kitchen/temperature"),
            ("default/a%2Fb/c", "default", "a/b/c"),
            ("default//a/", "default", "/a/"),
            ("b%C3%BCs/t%23", "büs", "t#"),
        ] {
            assert_eq!(target(path).unwrap(), (bus.to_owned(), topic.to_owned()), "{path}");
        }
        let long = format!("default/{}", "x/".repeat(128));
        for path in
            ["", "default", "default/", "/orders", "a%2Fb/t", "default/%ff", "default/a%20b", &long]
        {
            assert_eq!(target(path).unwrap_err().status, StatusCode::BAD_REQUEST, "{path}");
        }
    }
}
