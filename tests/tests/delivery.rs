//! What an application does to the delivery of events: it is slow at large ones, or dies in the middle of an answer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use duet_tests::app::{App, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};

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
";

const LARGE: usize = 3_900_000;
/// Together they are much more than a sidecar has.
const EVENTS: usize = 50;
/// A sidecar has 256 MiB on Kubernetes.
const MOST_MEMORY: u64 = 160 << 20;
const MINUTE: Duration = Duration::from_secs(60);

async fn publish(sidecar: &Sidecar, body: String) -> reqwest::Response {
    let url = format!("http://{}/v1.0/publish/default/news", sidecar.ports.api);
    let answer = http::client().post(url).body(body).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    answer
}

/// The most memory that a process had at any time, in bytes.
fn peak_memory(sidecar: &Sidecar) -> u64 {
    let status = format!("/proc/{}/status", sidecar.process.pid());
    let status = std::fs::read_to_string(status).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[tokio::test]
async fn large_events_in_an_outbox_do_not_take_the_memory_of_the_sidecar() {
    let mut control_plane = ControlPlane::start(&[]).await;
    let mut writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    control_plane.kill();
    for _ in 0..EVENTS {
        let answer = publish(&writer, "x".repeat(LARGE)).await;
        assert_eq!(answer.headers()["duet-accepted"], "outbox");
    }
    writer.restart().await;
    let waiting = || metrics::sum(writer.ports.metrics, "duet_outbox_events", &[]);
    eventually("the outbox is read", SOON, async || {
        (waiting().await >= EVENTS as f64).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    control_plane.restart().await;
    eventually("all are on the bus", MINUTE, async || (waiting().await < 1.0).then_some(())).await;
    let peak = peak_memory(&writer);
    assert!(peak < MOST_MEMORY, "{} MiB", peak >> 20);
}

#[tokio::test]
async fn large_events_at_a_slow_application_do_not_take_the_memory_of_the_sidecar() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let app = App::replying(|_| Reply::new(200, "").after(Duration::from_millis(500))).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    for _ in 0..EVENTS {
        publish(&writer, "x".repeat(LARGE)).await;
    }
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    eventually("all arrive", MINUTE, async || {
        let handled = [("outcome", "ack")];
        let handled = metrics::sum(reader.ports.metrics, "duet_event_deliveries_total", &handled);
        (handled.await >= EVENTS as f64).then_some(())
    })
    .await;
    let peak = peak_memory(&reader);
    assert!(peak < MOST_MEMORY, "{} MiB", peak >> 20);
}

/// What an application that dies in the middle of its first answer was asked.
#[derive(Clone, Default)]
struct Dying(Arc<Mutex<Vec<HeaderMap>>>);

impl Dying {
    fn answer(&self, request: &Request) -> Response {
        if request.uri().path() != "/news" {
            return StatusCode::NOT_FOUND.into_response();
        }
        let mut asked = self.0.lock().unwrap();
        asked.push(request.headers().clone());
        if asked.len() > 1 {
            return StatusCode::OK.into_response();
        }
        let dies = futures::stream::once(async {
            // The head is on its way by then.
            tokio::time::sleep(Duration::from_millis(300)).await;
            Err::<&str, _>(std::io::Error::other("the application died"))
        });
        ([("content-length", "18")], Body::from_stream(dies)).into_response()
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_none_and_a_trace_that_is_too_long_is_no_header() {
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let dying = Dying::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let app = dying.clone();
    let router = Router::new().fallback(async move |request: Request| app.answer(&request));
    let app = tokio::spawn(async move { axum::serve(listener, router).await });
    let reader = Sidecar::ready(&control_plane, Options::service("reader", port)).await;
    let url = format!("http://{}/v1.0/publish/default/news", reader.ports.api);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let event = serde_json::json!({
        "specversion": "1.0", "id": "1", "source": "/test", "type": "t",
        "traceparent": parent, "tracestate": format!("a={}", "x".repeat(20_000)),
    });
    let request = http::client().post(url).header("content-type", "application/cloudevents+json");
    assert_eq!(request.body(event.to_string()).send().await.unwrap().status(), 204);
    let asked = eventually("it comes again", SOON, async || {
        let asked = dying.0.lock().unwrap().clone();
        (asked.len() == 2).then_some(asked)
    })
    .await;
    assert_eq!(asked[0]["duet-delivery-attempt"], "1");
    assert_eq!(asked[1]["duet-delivery-attempt"], "2", "an attempt is spent: it may have seen it");
    for headers in asked {
        assert_eq!(
            (&headers["traceparent"], headers.get("tracestate")),
            (&parent.parse().unwrap(), None)
        );
    }
    app.abort();
}
