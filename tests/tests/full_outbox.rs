//! An outbox that is full says so, and loses nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::collections::BTreeSet;

use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use serde_json::{Value, json};

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

#[tokio::test]
async fn a_full_outbox_refuses_with_429_and_takes_events_again_when_the_bus_is_back() {
    let mut control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let app = App::echo("reader").await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let small = Options::client("writer").flags(&["--outbox-capacity", "64Ki"]);
    let writer = Sidecar::ready(&control_plane, small).await;
    let publish = |number: u64| {
        let url = format!("http://{}/v1.0/publish/default/news", writer.ports.api);
        let body = json!({"number": number, "text": "x".repeat(1000)});
        http::client().post(url).json(&body).send()
    };
    control_plane.kill();
    let mut accepted = BTreeSet::new();
    let refusal = loop {
        let number = accepted.len() as u64;
        let answer = publish(number).await.unwrap();
        if answer.status() != 204 {
            break answer;
        }
        assert_eq!(answer.headers()["duet-accepted"], "outbox");
        accepted.insert(number);
        assert!(number < 1000, "64 KiB hold no more than some dozens");
    };
    assert_eq!(refusal.status(), 429);
    let wait: u64 = refusal.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(wait >= 1);
    let problem: Value = refusal.json().await.unwrap();
    assert_eq!(problem["errorCode"], "ERR_PUBSUB_FULL");
    assert!(accepted.len() > 30, "{}", accepted.len());
    // In bulk the same, although one entry could never be stored.
    let bulk = json!([
        {"entryId": "bad", "event": {"id": "x"}, "contentType": "application/cloudevents+json"},
        {"entryId": "good", "event": {"text": "x".repeat(1000)}},
    ]);
    let url = format!("http://{}/v1.0/publish/bulk/default/news", writer.ports.api);
    let refusal = http::client().post(url).json(&bulk).send().await.unwrap();
    assert_eq!(refusal.status(), 429);
    assert!(refusal.headers().contains_key("retry-after"));
    let failed: Value = refusal.json().await.unwrap();
    assert_eq!(failed["errorCode"], "ERR_PUBSUB_FULL");
    assert_eq!(failed["failedEntries"].as_array().unwrap().len(), 2, "{failed}");
    let full = [("topic", "news"), ("outcome", "full")];
    let counted = metrics::sum(writer.ports.metrics, "duet_event_publishes_total", &full).await;
    assert!(counted >= 1.0, "{counted}");

    control_plane.restart().await;
    let again = accepted.len() as u64;
    eventually("an event is taken again", SOON, || async {
        (publish(again).await.unwrap().status() == 204).then_some(())
    })
    .await;
    accepted.insert(again);
    eventually("all that was taken arrives", SOON, || async {
        let asked = app.asked();
        let news = asked.iter().filter(|asked| asked.path == "/news");
        let seen: BTreeSet<u64> =
            news.map(|asked| asked.json()["data"]["number"].as_u64().unwrap()).collect();
        (seen == accepted).then_some(())
    })
    .await;
}

const STRICT: &str = "\
apiVersion: duet.dev/v1alpha1
kind: EventBus
metadata: {name: strict}
spec: {backend: {embedded: {}}, declaredTopicsOnly: true}
---
apiVersion: duet.dev/v1alpha1
kind: Topic
metadata: {name: kept}
spec: {bus: strict}
";
const TOPIC: &str = "\
---
apiVersion: duet.dev/v1alpha1
kind: Topic
metadata: {name: late}
spec: {bus: strict}
";

/// `duet events` of one sidecar's outbox, as JSON.
fn outbox(sidecar: &Sidecar, arguments: &[&str]) -> Value {
    let admin = format!("http://{}", sidecar.ports.admin);
    let mut duet = std::process::Command::new(duet_tests::process::program("duet"));
    duet.args(["events", "--bus", "strict", "--json", "outbox", "--sidecar", &admin]);
    let output = duet.args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_bus_will_never_take_is_listed_and_sent_again_or_dropped() {
    let with_topic = [STRICT, TOPIC].concat();
    let mut control_plane = ControlPlane::start(&[("strict.yaml", &with_topic)]).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let publish = async |id: &str| {
        let url = format!(
            "http://{}/v1.0/publish/strict/late?metadata.cloudevent.id={id}",
            writer.ports.api
        );
        http::client().post(url).body("x").send().await.unwrap().status()
    };
    assert_eq!(outbox(&writer, &["list"]), json!([]));
    control_plane.kill();
    assert_eq!(publish("a").await, 204);
    assert_eq!(publish("b").await, 204);
    control_plane.write("strict.yaml", STRICT);
    control_plane.restart().await;
    let rejected = eventually("both are rejected", SOON, || async {
        let listed = outbox(&writer, &["list"]);
        (listed.as_array().unwrap().len() == 2).then_some(listed)
    })
    .await;
    let first = &rejected[0];
    assert_eq!((&first["topic"], &first["event"]["id"]), (&json!("late"), &json!("a")));
    assert!(first["reason"].as_str().unwrap().contains("declared topics only"), "{first}");
    assert!(first["event"]["deadletterreason"].is_null(), "as it was published: {first}");

    assert_eq!(outbox(&writer, &["drop", "--id", "b"]), json!({"matched": 1, "dropped": 1}));
    control_plane.write("strict.yaml", &with_topic);
    eventually("the topic is declared again", SOON, || async {
        (publish("c").await == 204).then_some(())
    })
    .await;
    let redriven = outbox(&writer, &["redrive", "--reason", "declared topics only"]);
    assert_eq!(redriven, json!({"matched": 1, "redriven": 1}));
    eventually("it is on the bus", SOON, || async {
        let mut duet = std::process::Command::new(duet_tests::process::program("duet"));
        let operator = format!("http://{}", control_plane.operator);
        duet.args(["events", "--operator", &operator, "--bus", "strict"]);
        let tail = duet.args(["tail", "late", "--from", "earliest", "--no-follow", "--json"]);
        let tail = String::from_utf8(tail.output().unwrap().stdout).unwrap();
        let has = |id: &str| tail.lines().any(|line| line.contains(&format!("\"id\":\"{id}\"")));
        (has("a") && !has("b")).then_some(())
    })
    .await;
    assert_eq!(outbox(&writer, &["list"]), json!([]));
}
