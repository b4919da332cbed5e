//! Connections between an application and the event relay of its sidecar: what ends them, and what it costs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

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
  retry: {maxAttempts: 3, backoff: 50ms, maxBackoff: 200ms}
";

const NOT_FOUND: &[u8] = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";

/// Reads one message: its head in lower case, and its body. `None` at the end of the connection.
async fn message(stream: &mut BufReader<TcpStream>) -> Option<(String, String)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, String::from_utf8(body).unwrap()))
}

/// What an application does with an event.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    /// Answers, and keeps the connection.
    Answers,
    /// Answers as if it kept the connection, and closes it.
    Closes,
    /// Nothing.
    Hangs,
    /// Ends, with all its connections.
    Dies,
    /// Says that nobody serves this.
    Refuses,
}

/// An application that speaks for itself.
struct Raw {
    port: u16,
    seen: Arc<Mutex<Vec<(String, String)>>>,
    task: JoinHandle<()>,
}

impl Raw {
    /// `does` is told an event's id. Port 0 is any.
    async fn start(port: u16, does: fn(&str) -> Does) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::default();
        let task = tokio::spawn(serve(listener, does, Arc::clone(&seen)));
        Self { port, seen, task }
    }

    /// Id and attempt of each event that came.
    fn seen(&self) -> Vec<(String, String)> {
        self.seen.lock().unwrap().clone()
    }

    /// Waits for an event.
    async fn sees(&self, id: &str, attempt: &str) {
        eventually(&format!("attempt {attempt} of {id}"), SOON, async || {
            self.seen().contains(&(id.to_owned(), attempt.to_owned())).then_some(())
        })
        .await;
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends when the application dies. What it has open ends with it.
async fn serve(
    listener: TcpListener,
    does: fn(&str) -> Does,
    seen: Arc<Mutex<Vec<(String, String)>>>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let stream = accepted.unwrap().0;
                connections.spawn(connection(BufReader::new(stream), does, Arc::clone(&seen)));
            }
            Some(died) = connections.join_next() => if died.unwrap() { return },
        }
    }
}

/// Whether the application died of it.
async fn connection(
    mut stream: BufReader<TcpStream>,
    does: fn(&str) -> Does,
    seen: Arc<Mutex<Vec<(String, String)>>>,
) -> bool {
    while let Some((head, body)) = message(&mut stream).await {
        if !head.starts_with("post") {
            stream.write_all(NOT_FOUND).await.unwrap();
            continue;
        }
        let attempt = head.lines().find_map(|line| line.strip_prefix("duet-delivery-attempt: "));
        let event: serde_json::Value = serde_json::from_str(&body).unwrap();
        let id = event["id"].as_str().unwrap().to_owned();
        seen.lock().unwrap().push((id.clone(), attempt.unwrap().to_owned()));
        let does = does(&id);
        match does {
            Does::Answers | Does::Closes => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            }
            Does::Refuses => stream.write_all(NOT_FOUND).await.unwrap(),
            Does::Hangs => std::future::pending().await,
            Does::Dies => return true,
        }
        if does == Does::Closes {
            return false;
        }
    }
    false
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

/// Sends bytes, and reads the answer's head.
async fn ask(stream: &mut BufReader<TcpStream>, bytes: &[u8]) -> String {
    stream.write_all(bytes).await.unwrap();
    message(stream).await.expect("an answer").0
}

async fn connect(api: SocketAddr) -> BufReader<TcpStream> {
    BufReader::new(TcpStream::connect(api).await.unwrap())
}

#[tokio::test]
async fn a_refused_publish_ends_the_connection_only_when_much_of_it_is_still_to_come() {
    let control_plane = ControlPlane::start(&[]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let api = sidecar.ports.api;
    let head = |target: &str, more: &str| {
        format!("POST {target} HTTP/1.1\r\nhost: {api}\r\n{more}\r\n\r\n")
    };
    let unread = "/v1.0/publish/default/news?metadata.what=1";
    let read = "/v1.0/publish/default/news";
    let envelope = "content-type: application/cloudevents+json\r\n";

    let mut stream = connect(api).await;
    for (target, status) in
        [(unread, "400"), ("/v1.0/publish/nowhere/news", "404"), ("/v2", "404"), (read, "400")]
    {
        let large = "x".repeat(60_000);
        let length = format!("{envelope}content-length: {}", large.len());
        let chunks = head(target, &format!("{envelope}transfer-encoding: chunked"));
        for request in [head(target, &length) + &large, chunks + "1\r\nx\r\n0\r\n\r\n"] {
            let answer = ask(&mut stream, request.as_bytes()).await;
            assert!(answer.starts_with(&format!("http/1.1 {status}")), "{answer}");
            assert!(!answer.contains("connection: close"), "{answer}");
        }
    }
    let get = format!("GET /v1.0/healthz HTTP/1.1\r\nhost: {api}\r\n\r\n");
    assert!(ask(&mut stream, get.as_bytes()).await.starts_with("http/1.1 204"));

    // All of it is sent before the answer is read, as simple clients do.
    let mut stream = connect(api).await;
    let large = "x".repeat(20 << 20);
    for target in [unread, read] {
        let request = head(target, &format!("{envelope}content-length: {}", large.len())) + &large;
        let answer = ask(&mut stream, request.as_bytes()).await;
        assert!(answer.starts_with("http/1.1 4"), "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "an orderly end");
        stream = connect(api).await;
    }

    // What nobody asked for does not come.
    let request = head(unread, "content-length: 5\r\nexpect: 100-continue");
    let answer = ask(&mut stream, request.as_bytes()).await;
    assert!(answer.starts_with("http/1.1 400") && answer.contains("connection: close"), "{answer}");
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn an_application_that_closes_its_connections_without_saying_so_gets_each_event_once() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let app = Raw::start(0, |_| Does::Closes).await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port)).await;
    for number in 0..200 {
        publish(&reader, &number.to_string()).await;
    }
    eventually("all are handled", SOON, async || {
        (outcomes(&reader, "ack").await >= 200.0).then_some(())
    })
    .await;
    let mut seen = app.seen();
    assert!(seen.iter().all(|(_, attempt)| attempt == "1"), "{seen:?}");
    seen.sort();
    seen.dedup();
    assert_eq!((seen.len(), app.seen().len()), (200, 200));
    assert!(outcomes(&reader, "retry").await < 1.0);
}

#[tokio::test]
async fn an_event_that_ends_the_application_spends_its_attempts() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let does = |id: &str| if id == "bad" { Does::Dies } else { Does::Answers };
    let mut app = Raw::start(0, does).await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port)).await;
    // From now on there is a connection that was used before.
    publish(&reader, "good").await;
    app.sees("good", "1").await;
    publish(&reader, "bad").await;
    let mut attempts = BTreeSet::new();
    let given_up = async {
        while outcomes(&reader, "dead_letter").await < 1.0 {
            if app.task.is_finished() {
                attempts.extend(app.seen().into_iter().filter(|(id, _)| id == "bad"));
                // Sooner or later than the second try of an attempt.
                app = Raw::start(app.port, does).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, given_up).await.expect("it is given up");
    attempts.extend(app.seen());
    let attempts: Vec<_> = attempts.iter().map(|(_, attempt)| attempt.as_str()).collect();
    assert_eq!(attempts, ["1", "2", "3"]);
}

#[tokio::test]
async fn what_an_application_has_in_hand_when_it_leaves_with_its_sidecar_spends_no_attempt() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let app = Raw::start(0, |_| Does::Hangs).await;
    let first = Sidecar::ready(&control_plane, Options::service("reader", app.port)).await;
    publish(&first, "1").await;
    app.sees("1", "1").await;
    first.leave();
    eventually("the sidecar drains", SOON, async || {
        http::is_ok(first.ports.metrics, "/ready").await.is_none().then_some(())
    })
    .await;
    app.task.abort();
    first.gone().await;
    let app = Raw::start(0, |_| Does::Answers).await;
    let options = Options::service("reader", app.port).instance("reader-2");
    let second = Sidecar::ready(&control_plane, options).await;
    app.sees("1", "1").await;
    assert!(outcomes(&second, "dead_letter").await < 1.0);
}

#[tokio::test]
async fn dead_letters_are_counted_one_by_one_and_the_log_says_the_first() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let app = Raw::start(0, |_| Does::Refuses).await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port)).await;
    let started = std::time::Instant::now();
    for number in 0..50 {
        publish(&reader, &number.to_string()).await;
    }
    eventually("all are given up", SOON, async || {
        (outcomes(&reader, "dead_letter").await >= 50.0).then_some(())
    })
    .await;
    let lines = reader.process.log().matches("event goes to the dead letters").count();
    // One more in ten seconds.
    let most = 1 + usize::try_from(started.elapsed().as_secs() / 10).unwrap();
    assert!((1..=most).contains(&lines), "{lines} lines");
}

/// Publishes over gRPC, each of a message of 4 MiB whose end never comes; and their connection.
async fn half_sent(writer: &Sidecar, count: usize) -> (Halves, JoinHandle<hyper::Result<()>>) {
    let stream = TcpStream::connect(writer.ports.grpc_api).await.unwrap();
    let (executor, io) = (TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let connection = tokio::spawn(connection);
    let url = format!("http://{}/dapr.proto.runtime.v1.Dapr/PublishEvent", writer.ports.grpc_api);
    let calls = (0..count).map(|_| {
        let prefix = Bytes::from_static(&[0, 0, 0x40, 0, 0]);
        let part = Bytes::from(vec![0; 64 * 1024 - 1]);
        let pieces = std::iter::once(prefix).chain(std::iter::repeat_n(part, 64));
        let pieces = futures::stream::iter(pieces).chain(futures::stream::pending());
        let body = StreamBody::new(pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece))));
        let request = axum::http::Request::post(&url);
        let request = request.header("content-type", "application/grpc").header("te", "trailers");
        let mut sender = sender.clone();
        async move {
            let answer = sender.send_request(request.body(body).unwrap()).await.unwrap();
            answer.headers()["grpc-status"].to_str().unwrap().to_owned()
        }
        .boxed()
    });
    (calls.collect(), connection)
}

type Halves = FuturesUnordered<futures::future::BoxFuture<'static, String>>;

#[tokio::test]
async fn publishes_over_grpc_count_while_they_come_in() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let (mut calls, connection) = half_sent(&writer, 20).await;
    let refused = tokio::time::timeout(SOON, calls.next()).await.expect("one is refused");
    assert_eq!(refused.unwrap(), "8");
    drop(calls);
    connection.abort();
    // What the others had is given back.
    eventually("there is room again", SOON, async || {
        let url = format!("http://{}/v1.0/publish/default/news", writer.ports.api);
        let large = vec![b'x'; 4 << 20];
        let answer = http::client().post(url).body(large).send().await.unwrap();
        (answer.status() == 204).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_publish_over_grpc_whose_end_does_not_come_is_given_up() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let (mut calls, _connection) = half_sent(&writer, 1).await;
    // The sidecar waits for half a minute.
    let given_up = tokio::time::timeout(2 * SOON, calls.next()).await.expect("it is given up");
    assert_eq!(given_up.unwrap(), "4");
}
