//! What a subscription may ask of its sidecar: routes, a copy for every replica, each event once, and what a reader of
//! server-sent events gets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

#[path = "relay_subscribe/readers.rs"]
mod readers;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use duet_tests::app::{App, Asked, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::Backend;
use duet_tests::{SOON, eventually, http, metrics, on_both_buses};
use serde_json::{Value, json};

fn subscription(more: &str) -> String {
    format!(
        "\
apiVersion: v1
kind: Service
metadata: {{name: reader}}
spec: {{ports: [{{port: 80, targetPort: http}}]}}
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {{name: read}}
spec:
  topic: news
  subscriber: {{service: reader, path: /news}}
{more}
"
    )
}

async fn publish(api: SocketAddr, topic: &str, kind: &str, number: u32) -> reqwest::Response {
    let event = json!({
        "specversion": "1.0", "id": format!("{kind}{number}"), "source": "/test", "type": kind,
        "data": number,
    });
    let request = http::client().post(format!("http://{api}/v1.0/publish/default/{topic}"));
    let request = request.header("content-type", "application/cloudevents+json");
    request.body(event.to_string()).send().await.unwrap()
}

fn delivered(app: &App, path: &str) -> Vec<Asked> {
    app.asked().into_iter().filter(|asked| asked.path == path).collect()
}

on_both_buses!(
    an_acknowledgement_that_was_lost_does_not_reach_the_application_twice,
    what_is_in_hand_when_the_bus_goes_holds_up_nobody_and_comes_once,
);

async fn an_acknowledgement_that_was_lost_does_not_reach_the_application_twice(backend: &Backend) {
    let resources = subscription("  delivery: {once: true}") + &backend.yaml();
    let mut control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let app = App::replying(|asked| match asked.path.as_str() {
        "/news" => Reply::new(200, "").after(Duration::from_secs(1)),
        _ => Reply::new(404, ""),
    })
    .await;
    let mut reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    assert_eq!(publish(reader.ports.api, "news", "a", 1).await.status(), 204);
    eventually("the event is in work", SOON, || async {
        (!delivered(&app, "/news").is_empty()).then_some(())
    })
    .await;
    control_plane.kill();
    let count = |sidecar: SocketAddr, outcome: &'static str| async move {
        let labels = [("subscription", "default/read"), ("outcome", outcome)];
        metrics::sum(sidecar, "duet_event_deliveries_total", &labels).await
    };
    let address = reader.ports.metrics;
    eventually("it is handled, and nobody hears of it", SOON, || async {
        (count(address, "ack").await >= 1.0).then_some(())
    })
    .await;
    // The record survives the sidecar, too.
    reader.restart().await;
    control_plane.restart().await;
    eventually("it came again and went no further", SOON, || async {
        (count(address, "duplicate").await >= 1.0).then_some(())
    })
    .await;
    assert_eq!(publish(reader.ports.api, "news", "a", 2).await.status(), 204);
    eventually("the next one arrives", SOON, || async {
        (delivered(&app, "/news").len() >= 2).then_some(())
    })
    .await;
    let ids: Vec<Value> =
        delivered(&app, "/news").iter().map(|asked| asked.json()["id"].clone()).collect();
    assert_eq!(ids, ["a1", "a2"]);
}

async fn what_is_in_hand_when_the_bus_goes_holds_up_nobody_and_comes_once(backend: &Backend) {
    const SLOW: Duration = Duration::from_secs(15);
    let resources = subscription("") + &backend.yaml();
    let mut control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let app = App::replying(|asked| match asked.path.as_str() {
        "/news" if asked.json()["id"] == "slow1" => Reply::new(200, "").after(SLOW),
        "/news" => Reply::new(200, ""),
        _ => Reply::new(404, ""),
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    assert_eq!(publish(reader.ports.api, "news", "slow", 1).await.status(), 204);
    eventually("the event is in work", SOON, || async {
        (!delivered(&app, "/news").is_empty()).then_some(())
    })
    .await;
    let began = Instant::now();
    control_plane.kill();
    control_plane.restart().await;
    assert_eq!(publish(reader.ports.api, "news", "fast", 2).await.status(), 204);
    eventually("another one arrives meanwhile", SOON, || async {
        (delivered(&app, "/news").len() >= 2).then_some(())
    })
    .await;
    assert!(began.elapsed() < SLOW, "it waited for the slow one");
    eventually("the answer counts for the event that came again", SOON, || async {
        let lag = metrics::sum(control_plane.admin, "duet_bus_subscription_lag_events", &[]).await;
        let labels = [("subscription", "default/read"), ("outcome", "ack")];
        let acked =
            metrics::sum(reader.ports.metrics, "duet_event_deliveries_total", &labels).await;
        (lag < 1.0 && acked >= 2.0).then_some(())
    })
    .await;
    let ids: Vec<Value> =
        delivered(&app, "/news").iter().map(|asked| asked.json()["id"].clone()).collect();
    assert_eq!(ids, ["slow1", "fast2"]);
}

#[tokio::test]
async fn with_order_nothing_follows_what_is_in_hand_when_the_bus_goes() {
    let resources = subscription("  delivery: {ordered: true}");
    let mut control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let app = App::replying(|asked| match asked.path.as_str() {
        "/news" if asked.json()["id"] == "slow1" => {
            Reply::new(200, "").after(Duration::from_secs(5))
        }
        "/news" => Reply::new(200, ""),
        _ => Reply::new(404, ""),
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    assert_eq!(publish(reader.ports.api, "news", "slow", 1).await.status(), 204);
    eventually("the event is in work", SOON, || async {
        (!delivered(&app, "/news").is_empty()).then_some(())
    })
    .await;
    control_plane.kill();
    control_plane.restart().await;
    assert_eq!(publish(reader.ports.api, "news", "fast", 2).await.status(), 204);
    let acked = async || {
        let labels = [("subscription", "default/read"), ("outcome", "ack")];
        metrics::sum(reader.ports.metrics, "duet_event_deliveries_total", &labels).await
    };
    eventually("another one arrives, and not before the first was answered", SOON, || async {
        let arrived = delivered(&app, "/news").len() >= 2;
        assert!(!arrived || acked().await >= 1.0, "it came meanwhile");
        arrived.then_some(())
    })
    .await;
    eventually("both are done", SOON, || async { (acked().await >= 2.0).then_some(()) }).await;
    let ids: Vec<Value> =
        delivered(&app, "/news").iter().map(|asked| asked.json()["id"].clone()).collect();
    assert_eq!(ids, ["slow1", "fast2"]);
}

#[tokio::test]
async fn the_applications_routes_choose_the_path() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::answering(|asked| match asked.path.as_str() {
        "/dapr/subscribe" => {
            let rules = json!([
                {"match": "event.type == 'a'", "path": "/as"},
                {"match": "event.type == 'b'", "path": "bs"},
            ]);
            let entry = json!({"pubsubname": "default", "topic": "kinds",
                "routes": {"rules": rules, "default": "/rest"}});
            (StatusCode::OK, json!([entry]).to_string())
        }
        _ => (StatusCode::OK, String::new()),
    })
    .await;
    let router = Sidecar::ready(&control_plane, Options::service("router", app.port())).await;
    let api = router.ports.api;
    let number = AtomicU32::new(100);
    eventually("the application is subscribed", SOON, || async {
        let number = number.fetch_add(1, Ordering::Relaxed);
        publish(api, "kinds", "warm-up", number).await;
        (!delivered(&app, "/rest").is_empty()).then_some(())
    })
    .await;
    for (kind, number) in [("a", 1), ("b", 2), ("c", 3)] {
        assert_eq!(publish(api, "kinds", kind, number).await.status(), 204);
    }
    for (path, id) in [("/as", "a1"), ("/bs", "b2"), ("/rest", "c3")] {
        eventually(id, SOON, || async {
            delivered(&app, path).iter().any(|asked| asked.json()["id"] == id).then_some(())
        })
        .await;
    }
    assert_eq!((delivered(&app, "/as").len(), delivered(&app, "/bs").len()), (1, 1));
}

#[tokio::test]
async fn entries_that_ask_for_too_much_do_not_count_and_the_others_do() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::answering(|asked| match asked.path.as_str() {
        "/dapr/subscribe" => {
            let entry = |topic: &str| json!({"pubsubname": "default", "topic": topic, "route": topic});
            let rule = json!({"match": "true", "path": "/many"});
            let many = json!({"pubsubname": "default", "topic": "many", "routes": {"rules": vec![rule; 65]}});
            let mut entries = vec![many, entry("good")];
            entries.resize(512, json!({}));
            entries.push(entry("late"));
            (StatusCode::OK, json!(entries).to_string())
        }
        _ => (StatusCode::OK, String::new()),
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let number = AtomicU32::new(0);
    eventually("the good one is subscribed", SOON, || async {
        let number = number.fetch_add(1, Ordering::Relaxed);
        for topic in ["many", "late", "good"] {
            assert_eq!(publish(reader.ports.api, topic, "x", number).await.status(), 204);
        }
        (!delivered(&app, "/good").is_empty()).then_some(())
    })
    .await;
    assert!(delivered(&app, "/many").is_empty() && delivered(&app, "/late").is_empty());
    let invalid = [("reason", "invalid")];
    let refused =
        metrics::sum(reader.ports.metrics, "duet_event_subscription_errors_total", &invalid).await;
    // 65 rules, no entry at all 510 times, and more than 512.
    assert_eq!(refused, 512.0);
}

#[tokio::test]
async fn a_broadcast_reaches_every_replica() {
    let resources = subscription("  broadcast: true");
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let (one, two) = (App::echo("one").await, App::echo("two").await);
    let first = Options::service("reader", one.port()).instance("reader-1");
    let first = Sidecar::ready(&control_plane, first).await;
    let second = Options::service("reader", two.port()).instance("reader-2");
    let _second = Sidecar::ready(&control_plane, second).await;
    let number = AtomicU32::new(0);
    eventually("both are subscribed", SOON, || async {
        let number = number.fetch_add(1, Ordering::Relaxed);
        publish(first.ports.api, "news", "x", number).await;
        let here = |app: &App| !delivered(app, "/news").is_empty();
        (here(&one) && here(&two)).then_some(())
    })
    .await;
    assert_eq!(publish(first.ports.api, "news", "all", 1).await.status(), 204);
    for app in [&one, &two] {
        eventually("the event arrives", SOON, || async {
            delivered(app, "/news").iter().any(|asked| asked.json()["id"] == "all1").then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_sidecar_that_never_heard_of_the_control_plane_takes_publishes() {
    let resources = subscription("");
    let mut control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let app = App::echo("reader").await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let mut writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    control_plane.kill();
    assert_eq!(publish(writer.ports.api, "news", "before", 1).await.status(), 204);
    writer.restart().await;
    let answer = publish(writer.ports.api, "news", "after", 2).await;
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["duet-accepted"]),
        (204, &"outbox".parse().unwrap())
    );
    control_plane.restart().await;
    eventually("both arrive", SOON, || async {
        (delivered(&app, "/news").len() == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_application_that_could_not_say_what_it_subscribes_to_is_asked_again() {
    let control_plane = ControlPlane::start(&[("news.yaml", &subscription(""))]).await;
    let asked = AtomicU32::new(0);
    let app = App::replying(move |request| match request.path.as_str() {
        "/dapr/subscribe" if asked.fetch_add(1, Ordering::Relaxed) < 2 => Reply::new(500, ""),
        "/dapr/subscribe" => {
            Reply::new(200, r#"[{"pubsubname": "default", "topic": "own", "route": "/own"}]"#)
        }
        _ => Reply::new(200, ""),
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    // Each is published once: what came before the subscription is not for it.
    let number = AtomicU32::new(0);
    eventually("an event of its own topic arrives", SOON, || async {
        let number = number.fetch_add(1, Ordering::Relaxed);
        assert_eq!(publish(reader.ports.api, "own", "a", number).await.status(), 204);
        (!delivered(&app, "/own").is_empty()).then_some(())
    })
    .await;
}
