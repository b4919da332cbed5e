//! Events for an application that speaks HTTP/2: what a connection that ends, and one that takes no more requests, cost.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// An attempt that is spent is a dead letter.
const RESOURCES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: reader}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: read}
spec:
  topic: news
  subscriber: {service: reader, path: /news}
  delivery: {ackTimeout: 2s}
  retry: {maxAttempts: 1, backoff: 50ms, maxBackoff: 200ms}
";

// RFC 9113 section 6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const MAX_CONCURRENT_STREAMS: u8 = 3;
const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;
// RFC 7541, appendix A.
const OK: u8 = 0x88;
const NOT_FOUND: u8 = 0x8d;

/// What an application does with an event.
#[derive(Clone, Copy)]
enum Does {
    Answers,
    /// Ends the connection without a word.
    Closes,
    /// Says that it has looked at all but this one, why, and ends the connection.
    GoesAway(u32),
    Refuses,
}

#[derive(Clone)]
struct Script {
    /// Told an event's id, and how often it has come.
    does: fn(&str, usize) -> Does,
    /// Requests at once.
    limit: Option<u32>,
    /// For each event.
    takes: Duration,
}

/// An application that speaks HTTP/2 frame by frame.
struct Raw {
    port: u16,
    seen: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Raw {
    /// Port 0 is any.
    async fn start(port: u16, script: Script) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let all = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            // What is open ends with the application.
            let mut connections = JoinSet::new();
            loop {
                let stream = BufReader::new(listener.accept().await.unwrap().0);
                connections.spawn(connection(stream, script.clone(), Arc::clone(&all)));
            }
        });
        Self { port, seen, task }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// `None` at the end of the connection.
async fn connection(
    mut stream: BufReader<TcpStream>,
    script: Script,
    seen: Arc<Mutex<Vec<String>>>,
) -> Option<()> {
    stream.read_exact(&mut [0; 24]).await.ok()?;
    let limit =
        script.limit.map(|limit| [&[0, MAX_CONCURRENT_STREAMS], &limit.to_be_bytes()[..]].concat());
    stream.write_all(&frame(SETTINGS, 0, 0, &limit.unwrap_or_default())).await.ok()?;
    let mut bodies: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, id @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut payload).await.ok()?;
        let (id, last) = (u32::from_be_bytes(id), flags & END_STREAM > 0);
        let answer = match kind {
            SETTINGS if flags & ACK == 0 => frame(SETTINGS, ACK, 0, &[]),
            // Asks for something else.
            HEADERS if last => frame(HEADERS, END_HEADERS | END_STREAM, id, &[NOT_FOUND]),
            HEADERS if script.limit == Some(0) => {
                frame(RST_STREAM, 0, id, &REFUSED_STREAM.to_be_bytes())
            }
            DATA if script.limit != Some(0) => {
                bodies.entry(id).or_default().extend(payload);
                match last {
                    true => event(&bodies.remove(&id)?, id, &script, &seen).await,
                    false => Vec::new(),
                }
            }
            _ => Vec::new(),
        };
        stream.write_all(&answer).await.ok()?;
        let heard = kind == DATA && last && script.limit != Some(0);
        if heard && matches!(answer.get(3), None | Some(&GOAWAY)) {
            return None;
        }
    }
}

/// The id of an event, over HTTP or as the first field of a `TopicEventRequest`. `None`: gRPC asks something else.
fn id(body: &[u8]) -> Option<String> {
    if let Ok(event) = serde_json::from_slice::<serde_json::Value>(body) {
        return Some(event["id"].as_str().unwrap().to_owned());
    }
    let [0x0a, length, rest @ ..] = body.get(5..)? else { return None };
    Some(String::from_utf8(rest[..usize::from(*length)].to_vec()).unwrap())
}

/// The end of an answer over gRPC.
fn status(stream: u32, begins: &[u8], code: &[u8]) -> Vec<u8> {
    // Neither indexed nor compressed.
    let length = u8::try_from(code.len()).unwrap();
    let header = [begins, b"\x00\x0bgrpc-status", &[length], code].concat();
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &header)
}

/// What it says to an event.
async fn event(body: &[u8], stream: u32, script: &Script, seen: &Mutex<Vec<String>>) -> Vec<u8> {
    let Some(id) = id(body) else {
        return status(stream, &[OK], b"12");
    };
    let times = {
        let mut seen = seen.lock().unwrap();
        seen.push(id.clone());
        seen.iter().filter(|one| **one == id).count()
    };
    tokio::time::sleep(script.takes).await;
    match (script.does)(&id, times) {
        Does::Answers if body.starts_with(b"{") => {
            frame(HEADERS, END_HEADERS | END_STREAM, stream, &[OK])
        }
        Does::Answers => {
            let (head, message) = (frame(HEADERS, END_HEADERS, stream, &[OK]), [0; 5]);
            [head, frame(DATA, 0, stream, &message), status(stream, &[], b"0")].concat()
        }
        Does::Closes => Vec::new(),
        Does::GoesAway(reason) => {
            let last = stream - 2;
            let payload = [last.to_be_bytes(), reason.to_be_bytes()].concat();
            frame(GOAWAY, 0, 0, &payload)
        }
        Does::Refuses => frame(RST_STREAM, 0, stream, &REFUSED_STREAM.to_be_bytes()),
    }
}

async fn publish(sidecar: &Sidecar, id: &str) {
    let url = format!(
        "http://{}/v1.0/publish/default/news?metadata.cloudevent.id={id}",
        sidecar.ports.api
    );
    assert_eq!(http::client().post(url).body("x").send().await.unwrap().status(), 204);
}

async fn outcomes(sidecar: &Sidecar, outcome: &str) -> f64 {
    let name = "duet_event_deliveries_total";
    metrics::sum(sidecar.ports.metrics, name, &[("outcome", outcome)]).await
}

async fn reach(sidecar: &Sidecar, outcome: &str, count: f64) {
    eventually(&format!("{outcome}: {count}"), SOON, async || {
        (outcomes(sidecar, outcome).await >= count).then_some(())
    })
    .await;
}

async fn reader(control_plane: &ControlPlane, port: u16, protocol: &str) -> Sidecar {
    Sidecar::ready(control_plane, Options::service("reader", port).protocol(protocol)).await
}

#[tokio::test]
async fn a_kept_connection_that_ends_as_an_event_comes_spends_no_attempt() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let does = |id: &str, times| match id {
        _ if times > 1 => Does::Answers,
        "closes" => Does::Closes,
        "stops" => Does::GoesAway(0),
        "breaks" => Does::GoesAway(INTERNAL_ERROR),
        "refuses" => Does::Refuses,
        _ => Does::Answers,
    };
    let app = Raw::start(0, Script { does, limit: None, takes: Duration::ZERO }).await;
    let reader = reader(&control_plane, app.port, "h2c").await;
    let events = ["1", "closes", "2", "stops", "3", "breaks", "4", "refuses"];
    let mut acked = 0.0;
    for id in events {
        publish(&reader, id).await;
        acked += 1.0;
        reach(&reader, "ack", acked).await;
    }
    let twice = |id: &str| if id.len() > 1 { 2 } else { 1 };
    let expected: Vec<_> = events.iter().flat_map(|id| vec![*id; twice(id)]).collect();
    assert_eq!(app.seen(), expected);
    for outcome in ["retry", "release", "dead_letter"] {
        assert!(outcomes(&reader, outcome).await < 1.0, "{outcome}");
    }
}

#[tokio::test]
async fn an_event_that_ends_every_connection_spends_its_attempts() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let does = |id: &str, _| match id {
        "closes" => Does::Closes,
        "breaks" => Does::GoesAway(INTERNAL_ERROR),
        _ => Does::Answers,
    };
    let app = Raw::start(0, Script { does, limit: None, takes: Duration::ZERO }).await;
    let reader = reader(&control_plane, app.port, "h2c").await;
    let mut done = 0.0;
    for id in ["closes", "breaks"] {
        publish(&reader, "good").await;
        publish(&reader, id).await;
        done += 1.0;
        reach(&reader, "dead_letter", done).await;
    }
    // By the connection that was there, and by a new one.
    let count = |id: &str| app.seen().iter().filter(|seen| *seen == id).count();
    assert!(
        (1..=2).contains(&count("closes")) && (1..=2).contains(&count("breaks")),
        "{:?}",
        app.seen()
    );
}

async fn takes_turns(protocol: &str) {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    // The later ones wait for longer than an event may take.
    let takes = Duration::from_millis(600);
    let app = Raw::start(0, Script { does: |_, _| Does::Answers, limit: Some(1), takes }).await;
    let reader = reader(&control_plane, app.port, protocol).await;
    for id in 0..8 {
        publish(&reader, &id.to_string()).await;
    }
    reach(&reader, "ack", 8.0).await;
    let mut seen = app.seen();
    seen.sort();
    assert_eq!(seen, ["0", "1", "2", "3", "4", "5", "6", "7"]);
    assert!(outcomes(&reader, "dead_letter").await < 1.0);
}

async fn takes_none(protocol: &str) {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let script = Script { does: |_, _| Does::Answers, limit: Some(0), takes: Duration::ZERO };
    let app = Raw::start(0, script.clone()).await;
    let reader = reader(&control_plane, app.port, protocol).await;
    publish(&reader, "1").await;
    reach(&reader, "release", 2.0).await;
    assert!(outcomes(&reader, "dead_letter").await < 1.0);
    let port = app.port;
    drop(app);
    let app = eventually("the port is free", SOON, async || {
        let free = TcpListener::bind(("127.0.0.1", port)).await.ok();
        drop(free?);
        Some(Raw::start(port, Script { limit: None, ..script.clone() }).await)
    })
    .await;
    reach(&reader, "ack", 1.0).await;
    assert_eq!(app.seen(), ["1"]);
}

#[tokio::test]
async fn an_event_that_waits_for_its_turn_spends_no_attempt_and_has_all_its_time_then() {
    tokio::join!(takes_turns("h2c"), takes_turns("grpc"));
}

#[tokio::test]
async fn an_application_that_takes_no_request_spends_no_attempt() {
    tokio::join!(takes_none("h2c"), takes_none("grpc"));
}
