//! `GET /v1.0/subscribe/{bus}/{topic}`: a topic as server-sent events, for browsers and curl.
//!
//! Each connection has a subscription of its own, which the bus forgets a minute after the connection is gone. The next
//! event is pulled when the connection has room for it, so a slow reader costs no memory; an event is acknowledged when
//! the connection has taken it, and a reader that comes back says with `Last-Event-ID` what it has seen.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use duet_events::bus::{
    ConsumeError, Consumer, Delivery, EventBus, Settle, Start, SubscriptionSpec,
};
use duet_events::cloudevent::encode_structured;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::buses::Buses;
use super::problem::Problem;
use super::publish::options::decoded;
use super::publish::store;
use crate::drain::Drain;
use crate::http::body::Body;
use crate::http::browser::is_local_origin;

/// Events that the bus may have open for one reader.
const IN_FLIGHT: u32 = 8;
/// Readers at once.
const MAX_READERS: usize = 64;
/// The bus forgets the subscription this long after the reader is gone.
const IDLE_EXPIRY: Duration = Duration::from_secs(60);
/// A comment tells both ends that the other is there.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// A reader that has taken nothing for so long is given up: as long as it is there, its topic keeps everything after what
/// it has taken. One that comes back goes on from there.
const STALL: Duration = Duration::from_secs(120);
/// Between two tries while the bus is away.
const PAUSE: Duration = Duration::from_millis(500);
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Serves readers.
#[derive(Debug)]
pub(super) struct Streams {
    buses: Arc<Buses>,
    /// `<namespace>/<service>`.
    owner: String,
    drain: Drain,
    readers: Arc<Semaphore>,
}

/// One reader.
struct Reader {
    bus: Arc<dyn EventBus>,
    spec: SubscriptionSpec,
    /// Position of the youngest event so far. One that was published for later comes after younger ones.
    furthest: u64,
    frames: mpsc::Sender<Bytes>,
    stop: CancellationToken,
    _turn: OwnedSemaphorePermit,
}

/// Why a consumer ended.
enum End {
    /// The reader is gone, or takes nothing, or we are about to be gone.
    Over,
    /// Consume again.
    Broken,
}

impl Streams {
    pub(super) fn new(buses: Arc<Buses>, owner: String, drain: Drain) -> Self {
        Self { buses, owner, drain, readers: Arc::new(Semaphore::new(MAX_READERS)) }
    }

    /// Answers a reader; `rest` is what follows `/v1.0/subscribe/`.
    pub(super) async fn answer<B: Sync>(
        &self,
        rest: &str,
        request: &Request<B>,
    ) -> Result<Response<Body>, Problem> {
        if *request.method() != Method::GET {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            return Err(Problem::new(status, "ERR_METHOD_NOT_ALLOWED", "subscribe with GET"));
        }
        if self.drain.inbound.is_cancelled() {
            return Err(busy("this sidecar is going away"));
        }
        let turn = Arc::clone(&self.readers).try_acquire_owned();
        let turn = turn.map_err(|_full| busy("too many readers"))?;
        let spec = self.spec(rest, request)?;
        self.buses.check(&spec.bus)?;
        let bus = self.buses.bus(&spec.bus);
        let consumer = bus.consume(spec.clone()).await.map_err(|error| refused(&error))?;
        // One: what is not taken is not pulled.
        let (frames, taken) = mpsc::channel(1);
        let stop = self.drain.inbound.clone();
        let furthest = match spec.start {
            Start::Position(next) => next.saturating_sub(1),
            Start::Latest | Start::Earliest | Start::Time(_) => 0,
        };
        let reader = Reader { bus, spec, furthest, frames, stop, _turn: turn };
        self.drain.inbound_tasks.spawn(reader.run(consumer));
        Ok(response(request.headers(), taken))
    }

    fn spec<B>(&self, rest: &str, request: &Request<B>) -> Result<SubscriptionSpec, Problem> {
        let (bus, topic) = store::target(rest)?;
        let name = format!("{}.sse.{}", self.owner, Uuid::new_v4());
        let mut spec = SubscriptionSpec::new(&name, &bus, &topic)
            .map_err(|error| bad(error.field, &error.to_string()))?;
        spec.max_in_flight = IN_FLIGHT;
        spec.max_attempts = None;
        spec.idle_expiry = Some(IDLE_EXPIRY);
        for pair in request.uri().query().unwrap_or_default().split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "start" => spec.start = start(&decoded(value)?)?,
                "filter" => spec.filter = Some(decoded(value)?).filter(|cel| !cel.is_empty()),
                "" => {}
                _ => return Err(bad(name, "is not a parameter; known are start and filter")),
            }
        }
        // A browser that lost its connection repeats the URL; where it was counts more than where it began.
        if let Some(last) = request.headers().get(LAST_EVENT_ID).filter(|last| !last.is_empty()) {
            let last = last.to_str().ok().and_then(|last| last.parse::<u64>().ok());
            let last = last.ok_or_else(|| bad("Last-Event-ID", "is not the id of an event"))?;
            spec.start = Start::Position(last.saturating_add(1));
        }
        Ok(spec)
    }
}

impl Reader {
    async fn run(mut self, consumer: Consumer) {
        let mut consumer = Some(consumer);
        let hello = Bytes::from_static(b"retry: 1000\n\n");
        if self.frames.send(hello).await.is_err() {
            return;
        }
        loop {
            let end = match consumer.take() {
                Some(consumer) => self.consume(consumer).await,
                None => match self.bus.consume(self.spec.clone()).await {
                    Ok(again) => {
                        consumer = Some(again);
                        continue;
                    }
                    Err(error) if error.is_retryable() => End::Broken,
                    Err(error) => {
                        tracing::warn!(%error, subscription = self.spec.name, "a reader's stream ends");
                        return;
                    }
                },
            };
            if matches!(end, End::Over) {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = self.frames.closed() => return,
                () = self.stop.cancelled() => return,
            }
        }
    }

    async fn consume(&mut self, mut consumer: Consumer) -> End {
        let settler = consumer.settler();
        // Handed to the connection, which may not have taken it yet.
        let mut handed: Option<u64> = None;
        loop {
            // There is room when the frame before has been taken.
            let permit = tokio::select! {
                permit = timeout(STALL, self.frames.reserve()) => match permit {
                    Ok(Ok(permit)) => permit,
                    Ok(Err(_gone)) => return End::Over,
                    Err(_elapsed) => {
                        let subscription = &self.spec.name;
                        tracing::info!(subscription, "a reader takes nothing; its stream ends");
                        return End::Over;
                    }
                },
                () = self.stop.cancelled() => return End::Over,
            };
            if let Some(taken) = handed.take() {
                settler.settle(taken, Settle::Ack);
            }
            tokio::select! {
                next = consumer.next() => match next {
                    Some(Ok(delivery)) => {
                        self.furthest = self.furthest.max(delivery.position);
                        self.spec.start = Start::Position(self.furthest.saturating_add(1));
                        handed = Some(delivery.id);
                        permit.send(frame(&delivery, &self.spec, self.furthest));
                    }
                    Some(Err(error)) => {
                        tracing::info!(%error, subscription = self.spec.name, "no events for a reader for now");
                        return End::Broken;
                    }
                    None => return End::Broken,
                },
                () = tokio::time::sleep(HEARTBEAT) => permit.send(Bytes::from_static(b":\n\n")),
                () = self.frames.closed() => return End::Over,
                () = self.stop.cancelled() => return End::Over,
            }
        }
    }
}

/// `latest`, `earliest`, a position or a time.
fn start(text: &str) -> Result<Start, Problem> {
    match text {
        "" | "latest" => return Ok(Start::Latest),
        "earliest" => return Ok(Start::Earliest),
        _ => {}
    }
    if let Ok(position) = text.parse() {
        return Ok(Start::Position(position));
    }
    let time: Result<jiff::Timestamp, _> = text.parse();
    let time = time.map_err(|_err| {
        bad("start", "is neither latest nor earliest, nor a position, nor a time as in RFC 3339")
    })?;
    Ok(Start::Time(u64::try_from(time.as_millisecond()).unwrap_or_default()))
}

/// One event, and from where a reader that lost its connection goes on. A line break within the data (JSON may have them
/// between its tokens) starts another `data:` line.
fn frame(delivery: &Delivery, spec: &SubscriptionSpec, furthest: u64) -> Bytes {
    let extra = [("pubsubname", spec.bus.as_str()), ("topic", spec.topic.as_str())];
    let event = encode_structured(&delivery.event, &extra);
    let mut frame = Vec::with_capacity(event.len() + 128);
    frame.extend_from_slice(format!("id: {furthest}\n").as_bytes());
    frame.extend_from_slice(format!("event: {}\n", delivery.event.event_type()).as_bytes());
    for line in event.split(|byte| matches!(byte, b'\n' | b'\r')).filter(|line| !line.is_empty()) {
        frame.extend_from_slice(b"data: ");
        frame.extend_from_slice(line);
        frame.push(b'\n');
    }
    frame.push(b'\n');
    frame.into()
}

fn response(asked: &HeaderMap, taken: mpsc::Receiver<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::Feed(taken));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = asked.get(header::ORIGIN).filter(|origin| is_local_origin(origin)) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    }
    response
}

fn refused(error: &ConsumeError) -> Problem {
    match error {
        ConsumeError::Denied { .. } => {
            Problem::new(StatusCode::FORBIDDEN, "ERR_PUBSUB_SUBSCRIBE", error.to_string())
        }
        // The filter, most likely: all else was looked at before.
        ConsumeError::Refused { .. } => {
            Problem::new(StatusCode::BAD_REQUEST, "ERR_PUBSUB_SUBSCRIBE", error.to_string())
        }
        ConsumeError::Unavailable { .. } | ConsumeError::Internal { .. } => {
            busy(&error.to_string())
        }
    }
}

fn busy(text: &str) -> Problem {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let mut problem = Problem::new(status, "ERR_PUBSUB_SUBSCRIBE", text);
    problem.retry_after = Some(1);
    problem
}

fn bad(name: &str, reason: &str) -> Problem {
    let text = format!("{name} {reason}");
    let mut problem = Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text);
    problem.attribute = Some(name.chars().take(64).collect());
    problem
}

#[cfg(test)]
mod tests {
    use duet_events::Event;
    use duet_events::bus::{ConsumerBackend, PublishError, Published};
    use futures::future::BoxFuture;
    use futures::stream::{self, StreamExt as _};

    use super::*;

    /// A bus with one event after the other.
    #[derive(Debug)]
    struct Endless;

    struct Nobody;

    impl ConsumerBackend for Nobody {
        fn settle(&self, _: u64, _: Settle) -> bool {
            true
        }
        fn retire(&self) {}
        fn close(&self) {}
    }

    impl EventBus for Endless {
        fn publish<'a>(
            &'a self,
            _: &'a str,
            _: Vec<Event>,
        ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
            unreachable!("readers only read")
        }

        fn consume(&self, _: SubscriptionSpec) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
            let deliveries = stream::iter(1..).map(|id| {
                let event = Event::new(id.to_string(), "/s", "t").unwrap();
                Ok(Delivery { id, position: id, attempt: 1, generation: 0, event, path: None })
            });
            Box::pin(async { Ok(Consumer::new(deliveries, Arc::new(Nobody))) })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_given_up_and_one_that_is_slow_is_not() {
        let spec = SubscriptionSpec::new("a/b", "default", "x").unwrap();
        let consumer = Endless.consume(spec.clone()).await.unwrap();
        let (frames, mut taken) = mpsc::channel(1);
        let turn = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let (bus, stop) = (Arc::new(Endless), CancellationToken::new());
        let reader = Reader { bus, spec, furthest: 0, frames, stop, _turn: turn };
        let reader = tokio::spawn(reader.run(consumer));
        for _ in 0..10 {
            tokio::time::sleep(STALL - Duration::from_secs(1)).await;
            assert!(taken.recv().await.is_some());
        }
        let before = tokio::time::Instant::now();
        timeout(STALL * 2, reader).await.expect("it ends").unwrap();
        assert_eq!(before.elapsed().as_secs(), STALL.as_secs());
    }

    #[test]
    fn starts_are_read() {
        assert_eq!(start("latest").unwrap(), Start::Latest);
        assert_eq!(start("7").unwrap(), Start::Position(7));
        assert_eq!(start("1970-01-01T00:00:01Z").unwrap(), Start::Time(1000));
        assert_eq!(start("yesterday").unwrap_err().attribute.as_deref(), Some("start"));
    }

    #[test]
    fn line_breaks_in_the_data_do_not_end_the_event() {
        let event = Event::new("1", "/s", "t").unwrap().with_data("{\n\"a\":\r\n1}");
        let delivery =
            Delivery { id: 1, position: 5, attempt: 1, generation: 0, event, path: None };
        let spec = SubscriptionSpec::new("a/b", "default", "x").unwrap();
        let frame = String::from_utf8(frame(&delivery, &spec, delivery.position).to_vec()).unwrap();
        let data: Vec<&str> =
            frame.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let event: serde_json::Value = serde_json::from_str(&data.join("\n")).unwrap();
        assert_eq!(event["data"]["a"], 1);
        assert!(frame.starts_with("id: 5\nevent: t\n") && frame.ends_with("\n\n"));
        assert_eq!(frame.matches("\n\n").count(), 1);
    }
}
