//! Events from one application to another, in every envelope, through failures and kills.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::http::StatusCode;
use duet_tests::app::{App, Asked, History};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use serde_json::{Value, json};

const SUBSCRIPTION: &str = "\
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

const DEAD: &str = "\
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: dead}
spec:
  topic: news.dead-letter
  subscriber: {service: reader, path: /dead}
";

async fn publish(
    api: SocketAddr,
    content_type: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> reqwest::Response {
    let url = format!("http://{api}/v1.0/publish/default/news");
    let mut request = http::client().post(url).header("content-type", content_type);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body.to_owned()).send().await.unwrap()
}

async fn publish_number(api: SocketAddr, number: u32) -> reqwest::Response {
    let event = json!({
        "specversion": "1.0", "id": number.to_string(), "source": "/test", "type": "t",
        "data": {"number": number},
    });
    publish(api, "application/cloudevents+json", &[], &event.to_string()).await
}

fn delivered(app: &App, path: &str) -> Vec<Asked> {
    app.asked().into_iter().filter(|asked| asked.path == path).collect()
}

#[tokio::test]
async fn every_envelope_arrives_and_bad_ones_name_what_is_wrong() {
    let control_plane = ControlPlane::start(&[("news.yaml", SUBSCRIPTION)]).await;
    let app = App::echo("reader").await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let api = writer.ports.api;

    let binary = [
        ("ce-specversion", "1.0"),
        ("ce-id", "b"),
        ("ce-source", "/s"),
        ("ce-type", "t"),
        ("ce-note", "a%20b"),
    ];
    assert_eq!(publish(api, "application/json", &binary, "{\"n\":1}").await.status(), 204);
    let structured = r#"{"specversion":"1.0","id":"s","source":"/s","type":"t","data":{"n":2}}"#;
    assert_eq!(publish(api, "application/cloudevents+json", &[], structured).await.status(), 204);
    let batch = format!("[{structured},{}]", structured.replace("\"s\"", "\"s2\""));
    let answer = publish(api, "application/cloudevents-batch+json", &[], &batch).await;
    assert_eq!(answer.status(), 204, "the first of them is a duplicate, which is no error");
    assert_eq!(publish(api, "text/plain", &[], "hello").await.status(), 204);
    eventually("all four arrive", SOON, || async {
        (delivered(&app, "/news").len() >= 4).then_some(())
    })
    .await;
    let events: BTreeMap<String, Value> = delivered(&app, "/news")
        .iter()
        .map(|asked| {
            assert_eq!(asked.header("content-type"), "application/cloudevents+json");
            assert_eq!(asked.header("duet-delivery-attempt"), "1");
            (asked.json()["id"].as_str().unwrap().to_owned(), asked.json())
        })
        .collect();
    assert_eq!(events.len(), 4, "{events:?}");
    assert_eq!((&events["b"]["data"]["n"], &events["b"]["note"]), (&json!(1), &json!("a b")));
    assert_eq!(
        (&events["s"]["topic"], &events["s"]["pubsubname"]),
        (&json!("news"), &json!("default"))
    );
    let plain = events.values().find(|event| event["type"] == "com.dapr.event.sent").unwrap();
    assert_eq!((&plain["data"], &plain["source"]), (&json!("hello"), &json!("writer")));

    for (headers, body, attribute) in [
        (&binary[..3], "{}", "type"),
        (
            &[("ce-specversion", "0.3"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")][..],
            "",
            "specversion",
        ),
        (
            &[("ce-specversion", "1.0"), ("ce-id", "%FF"), ("ce-source", "/s"), ("ce-type", "t")][..],
            "",
            "id",
        ),
    ] {
        let answer = publish(api, "application/json", headers, body).await;
        assert_eq!(answer.status(), 400, "{headers:?}");
        let problem: Value = answer.json().await.unwrap();
        assert_eq!(problem["attribute"], attribute, "{problem}");
    }
    let unknown = format!("http://{api}/v1.0/publish/nobus/news");
    let answer = http::client().post(&unknown).body("x").send().await.unwrap();
    assert_eq!(answer.status(), 404);
    assert!(
        answer.text().await.unwrap().contains("default"),
        "the answer names the buses that there are"
    );
    let large = "x".repeat(5 << 20);
    assert_eq!(publish(api, "text/plain", &[], &large).await.status(), 413);
    let refused =
        metrics::sum(writer.ports.metrics, "duet_event_publishes_total", &[("outcome", "invalid")]);
    assert!(refused.await >= 3.0);
}

#[tokio::test]
async fn answers_decide_and_what_cannot_be_handled_is_in_the_dead_letters() {
    let resources = format!("{SUBSCRIPTION}{DEAD}");
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let tries = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&tries);
    let app = App::answering(move |asked| {
        if asked.path != "/news" {
            return (StatusCode::OK, String::new());
        }
        match asked.json()["data"]["number"].as_u64() {
            Some(1) => (StatusCode::OK, "{\"status\":\"DROP\"}".to_owned()),
            Some(2) => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
            Some(3) if counted.fetch_add(1, Ordering::Relaxed) == 0 => {
                (StatusCode::OK, "{\"status\":\"RETRY\"}".to_owned())
            }
            _ => (StatusCode::OK, String::new()),
        }
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    for number in 1..=4 {
        assert_eq!(publish_number(writer.ports.api, number).await.status(), 204);
    }
    eventually("two events are dead letters", SOON, || async {
        (delivered(&app, "/dead").len() == 2).then_some(())
    })
    .await;
    let dead: BTreeSet<String> = delivered(&app, "/dead")
        .iter()
        .map(|asked| asked.json()["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(dead, ["1", "2"].map(str::to_owned).into());
    let count =
        |id: &str| delivered(&app, "/news").iter().filter(|asked| asked.json()["id"] == id).count();
    eventually("3 was tried again", SOON, || async { (count("3") == 2).then_some(()) }).await;
    assert_eq!((count("1"), count("2"), count("4")), (1, 3, 1));
    let labels = [("subscription", "default/read"), ("outcome", "dead_letter")];
    assert!(
        metrics::sum(reader.ports.metrics, "duet_event_deliveries_total", &labels).await >= 2.0
    );
}

#[tokio::test]
async fn with_the_control_plane_away_publishes_go_to_the_outbox_and_follow_in_order() {
    let mut control_plane = ControlPlane::start(&[("news.yaml", SUBSCRIPTION)]).await;
    let app = App::echo("reader").await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let mut writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    assert_eq!(publish_number(writer.ports.api, 0).await.headers()["duet-accepted"], "bus");
    control_plane.kill();
    for number in 1..=20 {
        let answer = publish_number(writer.ports.api, number).await;
        assert_eq!(answer.status(), 204, "{number}");
        assert_eq!(answer.headers()["duet-accepted"], "outbox");
    }
    // What the outbox has acknowledged survives the sidecar, too.
    writer.restart().await;
    // Whoever looks at its log learns where they are.
    let says = async |text: &str| {
        eventually(text, SOON, || async { writer.process.log().contains(text).then_some(()) })
            .await;
    };
    says("events wait in the outbox").await;
    control_plane.restart().await;
    eventually("all arrive", SOON, || async {
        (delivered(&app, "/news").len() >= 21).then_some(())
    })
    .await;
    says("what waited in the outbox has left it").await;
    let order: Vec<u64> = delivered(&app, "/news")
        .iter()
        .map(|asked| asked.json()["data"]["number"].as_u64().unwrap())
        .collect();
    let seen: BTreeSet<u64> = order.iter().copied().collect();
    assert_eq!(seen, (0..=20).collect(), "{order:?}");
}

#[tokio::test]
async fn a_sidecar_that_leaves_brings_its_outbox_to_the_bus_first() {
    let mut control_plane = ControlPlane::start(&[("news.yaml", SUBSCRIPTION)]).await;
    let app = App::echo("reader").await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(
        &control_plane,
        Options::client("writer").flags(&["--drain-timeout", "60s"]),
    )
    .await;
    control_plane.kill();
    for number in 1..=20 {
        assert_eq!(
            publish_number(writer.ports.api, number).await.headers()["duet-accepted"],
            "outbox"
        );
    }
    writer.leave();
    // It waits for the bus: its application's port is gone, its process is not.
    eventually("the API to close", SOON, || async {
        tokio::net::TcpStream::connect(writer.ports.api).await.is_err().then_some(())
    })
    .await;
    assert!(writer.is_running());
    control_plane.restart().await;
    writer.gone().await;
    eventually("all arrive", SOON, || async {
        (delivered(&app, "/news").len() >= 20).then_some(())
    })
    .await;
}

#[tokio::test]
async fn kills_of_every_process_lose_no_acknowledged_event() {
    let mut control_plane = ControlPlane::start(&[("news.yaml", SUBSCRIPTION)]).await;
    let app = App::echo("reader").await;
    let address = app.address;
    let mut reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let mut writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let mut histories = vec![app.history()];
    let mut acknowledged = BTreeSet::new();
    let mut number = 0;
    let mut app = Some(app);
    for round in 0..4 {
        for step in 0..40 {
            number += 1;
            let url = format!("http://{}/v1.0/publish/default/news", writer.ports.api);
            let event = json!({"specversion": "1.0", "id": number.to_string(), "source": "/test", "type": "t"});
            let request =
                http::client().post(url).header("content-type", "application/cloudevents+json");
            let answer = request.body(event.to_string()).send().await;
            if answer.is_ok_and(|answer| answer.status() == 204) {
                acknowledged.insert(number.to_string());
            }
            if step == 20 {
                match round {
                    0 => control_plane.restart().await,
                    1 => reader.restart().await,
                    2 => writer.restart().await,
                    _ => {
                        app.take().unwrap().stop().await;
                        let next = App::start("reader", None, address).await;
                        histories.push(next.history());
                        app = Some(next);
                    }
                }
            }
        }
    }
    assert!(acknowledged.len() > 150, "{} of {number} were acknowledged", acknowledged.len());
    let missing = || -> Vec<String> {
        let asked = histories.iter().flat_map(History::asked).filter(|asked| asked.path == "/news");
        let seen: BTreeSet<String> =
            asked.map(|asked| asked.json()["id"].as_str().unwrap().to_owned()).collect();
        acknowledged.difference(&seen).cloned().collect()
    };
    eventually("every acknowledged event arrives", SOON, || async {
        missing().is_empty().then_some(())
    })
    .await;
    eprintln!("{number} published, {} acknowledged, none lost", acknowledged.len());
}
