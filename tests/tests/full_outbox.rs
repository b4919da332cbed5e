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
