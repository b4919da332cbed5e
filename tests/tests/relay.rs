//! The application's API for events: what a publish may ask for, bulk both ways, server-sent events, and more time for an
//! answer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use duet_tests::app::{App, Asked, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http};
use futures::StreamExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};

fn reader(delivery: &str) -> String {
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
  delivery: {{{delivery}}}
  retry: {{maxAttempts: 3, backoff: 50ms, maxBackoff: 200ms}}
"
    )
}

async fn post(api: SocketAddr, path: &str, content_type: &str, body: &str) -> reqwest::Response {
    let request = http::client().post(format!("http://{api}{path}"));
    request.header("content-type", content_type).body(body.to_owned()).send().await.unwrap()
}

fn delivered(app: &App, path: &str) -> Vec<Asked> {
    app.asked().into_iter().filter(|asked| asked.path == path).collect()
}

#[tokio::test]
async fn metadata_becomes_attributes_and_unknown_metadata_is_refused_by_name() {
    let control_plane = ControlPlane::start(&[("news.yaml", &reader(""))]).await;
    let app = App::echo("reader").await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let api = reader.ports.api;
    let path = "/v1.0/publish/default/news?metadata.ttlInSeconds=600&metadata.partitionKey=a%2Fb";
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let envelope = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":1}"#;
    let request = http::client().post(format!("http://{api}{path}"));
    let request = request.header("content-type", "application/cloudevents+json");
    let request = request.header("traceparent", trace).header("tracestate", "vendor=1");
    let answer = request.body(envelope).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    let raw = "/v1.0/publish/default/news?metadata.rawPayload=true";
    let answer = post(api, raw, "application/cloudevents+json", envelope).await;
    assert_eq!(answer.status(), 204);
    let asked = eventually("both arrive", SOON, || async {
        Some(delivered(&app, "/news")).filter(|asked| asked.len() == 2)
    })
    .await;
    let plain = asked.iter().find(|asked| asked.json()["id"] == "1").unwrap();
    let event = plain.json();
    assert_eq!((&event["partitionkey"], &event["traceparent"]), (&json!("a/b"), &json!(trace)));
    assert!(event["expirytime"].as_str().unwrap().ends_with('Z'), "{event}");
    assert_eq!((plain.header("traceparent"), plain.header("tracestate")), (trace, "vendor=1"));
    let opaque = asked.iter().find(|asked| asked.json()["id"] != "1").unwrap().json();
    assert_eq!(opaque["data"]["id"], "1", "the envelope is data: {opaque}");

    for (query, name) in [
        ("metadata.priority=1", "metadata.priority"),
        ("metadata.ttlInSeconds=soon", "metadata.ttlInSeconds"),
        ("metadata.deliverAfter=soon", "metadata.deliverAfter"),
    ] {
        let path = format!("/v1.0/publish/default/news?{query}");
        let answer = post(api, &path, "text/plain", "x").await;
        assert_eq!(answer.status(), 400, "{query}");
        assert_eq!(answer.json::<Value>().await.unwrap()["attribute"], name);
    }
    let bad = r#"{"specversion":"1.0","id":"2","source":"/s","type":"t","expirytime":"never"}"#;
    let answer = post(api, "/v1.0/publish/default/news", "application/cloudevents+json", bad).await;
    assert_eq!(answer.status(), 400);
    assert_eq!(answer.json::<Value>().await.unwrap()["attribute"], "expirytime");
}

#[tokio::test]
async fn a_bulk_publish_stores_what_is_valid_and_names_the_entries_that_failed() {
    let control_plane = ControlPlane::start(&[("news.yaml", &reader(""))]).await;
    let app = App::echo("reader").await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let api = reader.ports.api;
    let good = json!([
        {"entryId": "a", "event": {"n": 1}, "contentType": "application/json"},
        {"entryId": "b", "event": "text", "contentType": "text/plain", "metadata": {"partitionKey": "k"}},
        {"entryId": "c", "event": "AAE=", "contentType": "application/octet-stream"},
        {"entryId": "d", "contentType": "application/cloudevents+json",
         "event": {"specversion": "1.0", "id": "own", "source": "/s", "type": "t"}},
    ]);
    for path in ["/v1.0-alpha1/publish/bulk/default/news", "/v1.0/publish/bulk/default/news"] {
        let answer = post(api, path, "application/json", &good.to_string()).await;
        assert_eq!(answer.status(), 204, "{path}");
    }
    let seven = eventually("all arrive, the duplicate once", SOON, || async {
        Some(delivered(&app, "/news")).filter(|asked| asked.len() == 7)
    })
    .await;
    let events: Vec<Value> = seven.iter().map(Asked::json).collect();
    assert!(events.iter().any(|event| event["data"] == "text" && event["partitionkey"] == "k"));
    assert!(events.iter().any(|event| event["data_base64"] == "AAE="));
    assert!(events.iter().any(|event| event["id"] == "own"));

    let path = "/v1.0/publish/bulk/default/news";
    let mixed = json!([
        {"entryId": "a", "event": {"n": 2}, "contentType": "application/json"},
        {"entryId": "b", "event": {"id": "x"}, "contentType": "application/cloudevents+json"},
        {"entryId": "c", "event": "x", "contentType": "text/plain", "metadata": {"what": "1"}},
    ]);
    let answer = post(api, path, "application/json", &mixed.to_string()).await;
    assert_eq!(answer.status(), 500, "as in Dapr: one was stored");
    let failed: Value = answer.json().await.unwrap();
    let ids: Vec<&str> = failed["failedEntries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["entryId"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["b", "c"], "{failed}");
    assert!(failed["failedEntries"][0]["error"].as_str().unwrap().contains("specversion"));
    eventually("the valid one arrives", SOON, || async {
        delivered(&app, "/news").iter().any(|asked| asked.json()["data"]["n"] == 2).then_some(())
    })
    .await;
    let batch = json!([{"specversion": "1.0", "id": "in", "source": "/s", "type": "t"}]);
    let batch = json!([batch[0].clone(), batch[0].clone()]);
    for (body, text) in [
        (
            json!([{"entryId": "a", "event": batch, "contentType": "application/cloudevents-batch+json"}]),
            "not a batch",
        ),
        (json!([{"event": 1}]), "entryId"),
        (json!([{"entryId": "a", "event": 1}, {"entryId": "a", "event": 1}]), "twice"),
        (json!({}), "array"),
    ] {
        let answer = post(api, path, "application/json", &body.to_string()).await;
        assert_eq!(answer.status(), 400);
        let problem = answer.text().await.unwrap();
        assert!(problem.contains(text), "{problem}");
    }
    let answer =
        post(api, "/v1.0/publish/bulk/nobus/news", "application/json", &good.to_string()).await;
    assert_eq!(answer.status(), 404);
}

#[tokio::test]
async fn a_bulk_subscription_gets_many_events_at_once_and_answers_for_each() {
    let control_plane = ControlPlane::start(&[]).await;
    let failed_once = Arc::new(AtomicBool::new(false));
    let app = App::answering(move |asked| {
        if asked.path == "/dapr/subscribe" {
            let subscriptions = json!([{"pubsubname": "default", "topic": "many", "route": "bulk",
                "bulkSubscribe": {"enabled": true, "maxMessagesCount": 10, "maxAwaitDurationMs": 300}}]);
            return (StatusCode::OK, subscriptions.to_string());
        }
        let statuses: Vec<Value> = asked.json()["entries"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|entry| {
                let first = entry["event"]["data"] == 3
                    && !failed_once.swap(true, Ordering::Relaxed);
                // One is left out of the answer, and so comes again.
                (!first).then(|| json!({"entryId": entry["entryId"], "status": "SUCCESS"}))
            })
            .collect();
        (StatusCode::OK, json!({"statuses": statuses}).to_string())
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("bulky", app.port())).await;
    let api = reader.ports.api;
    // The subscription starts with what comes after it: something has to arrive first.
    eventually("the application is subscribed", SOON, || async {
        post(api, "/v1.0/publish/default/many", "application/json", "0").await;
        (!delivered(&app, "/bulk").is_empty()).then_some(())
    })
    .await;
    let entries: Vec<Value> = (1..=25)
        .map(|n| json!({"entryId": n.to_string(), "event": n, "contentType": "application/json"}))
        .collect();
    let path = "/v1.0/publish/bulk/default/many";
    let answer = post(api, path, "application/json", &json!(entries).to_string()).await;
    assert_eq!(answer.status(), 204);
    let numbers = |asked: &Asked| -> Vec<u64> {
        let body = asked.json();
        assert_eq!((&body["topic"], &body["pubsubname"]), (&json!("many"), &json!("default")));
        let entries = body["entries"].as_array().unwrap();
        entries.iter().map(|entry| entry["event"]["data"].as_u64().unwrap()).collect()
    };
    eventually("all arrive, one of them twice", SOON, || async {
        let got: Vec<u64> = delivered(&app, "/bulk").iter().flat_map(numbers).collect();
        let all: BTreeSet<u64> = got.iter().copied().filter(|n| *n > 0).collect();
        let again = got.iter().filter(|n| **n == 3).count();
        (all == (1..=25).collect() && again == 2).then_some(())
    })
    .await;
    let sizes: Vec<usize> =
        delivered(&app, "/bulk").iter().map(|asked| numbers(asked).len()).collect();
    assert!(sizes.iter().all(|size| *size <= 10) && sizes.contains(&10), "{sizes:?}");
}

#[tokio::test]
async fn an_application_gets_more_time_when_it_asks() {
    let control_plane = ControlPlane::start(&[("news.yaml", &reader("ackTimeout: 1s"))]).await;
    let app = App::replying(|asked| match asked.path.as_str() {
        "/news" => Reply::new(200, "").after(Duration::from_millis(2500)),
        _ => Reply::new(404, ""),
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let api = reader.ports.api;
    let answer = post(api, "/v1.0/publish/default/news", "text/plain", "slow").await;
    assert_eq!(answer.status(), 204);
    let token = eventually("the event is in work", SOON, || async {
        Some(delivered(&app, "/news").first()?.header("duet-delivery").to_owned())
    })
    .await;
    let extend = format!("/v1.0/deliveries/{token}/extend");
    assert_eq!(post(api, &format!("{extend}?by=soon"), "text/plain", "").await.status(), 400);
    assert_eq!(post(api, &format!("{extend}?by=20s"), "text/plain", "").await.status(), 204);
    let acked = [("subscription", "default/read"), ("outcome", "ack")];
    eventually("it is done", SOON, || async {
        let address = reader.ports.metrics;
        let name = "duet_event_deliveries_total";
        (duet_tests::metrics::sum(address, name, &acked).await >= 1.0).then_some(())
    })
    .await;
    assert_eq!(delivered(&app, "/news").len(), 1, "it was not tried again");
    assert_eq!(post(api, &extend, "text/plain", "").await.status(), 404, "nothing is in work");
}

#[tokio::test]
async fn what_the_application_has_in_hand_in_bulk_is_finished_before_the_sidecar_leaves() {
    let resources = reader("") + "  bulk: {max: 10, wait: 200ms}\n";
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let slow = Arc::new(AtomicBool::new(true));
    let app = App::replying(move |asked| {
        let Some(entries) = asked.json()["entries"].as_array().cloned() else {
            return Reply::new(404, "");
        };
        let done = |entry: &Value| json!({"entryId": entry["entryId"], "status": "SUCCESS"});
        let statuses: Vec<Value> = entries.iter().map(done).collect();
        let pause = if slow.swap(false, Ordering::Relaxed) { 2000 } else { 0 };
        Reply::new(200, &json!({"statuses": statuses}).to_string())
            .after(Duration::from_millis(pause))
    })
    .await;
    let options = Options::service("reader", app.port());
    let leaving = Sidecar::ready(&control_plane, options.clone().instance("leaving")).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let path = "/v1.0/publish/default/news";
    for number in 0..10 {
        let body = number.to_string();
        let answer = post(writer.ports.api, path, "application/json", &body).await;
        assert_eq!(answer.status(), 204);
    }
    eventually("the first are in work", SOON, || async {
        (!delivered(&app, "/news").is_empty()).then_some(())
    })
    .await;
    leaving.leave();
    leaving.gone().await;
    let _coming = Sidecar::ready(&control_plane, options.instance("coming")).await;
    let answer = post(writer.ports.api, path, "application/json", "10").await;
    assert_eq!(answer.status(), 204);
    let numbers = || -> Vec<u64> {
        let asked = delivered(&app, "/news");
        let entries = asked
            .iter()
            .flat_map(|asked| asked.json()["entries"].as_array().cloned().unwrap_or_default());
        entries.map(|entry| entry["event"]["data"].as_u64().unwrap()).collect()
    };
    eventually("the last one arrives", SOON, || async { numbers().contains(&10).then_some(()) })
        .await;
    let mut all = numbers();
    all.sort_unstable();
    assert_eq!(all, (0..=10).collect::<Vec<_>>(), "each once");
    for asked in delivered(&app, "/news") {
        for entry in asked.json()["entries"].as_array().unwrap() {
            let attempt = &entry["metadata"]["duet-delivery-attempt"];
            assert!(attempt.is_null() || attempt == "1", "{entry}");
        }
    }
}

/// Reads a stream until `enough` holds for the text so far.
async fn read_until(response: reqwest::Response, enough: impl Fn(&str) -> bool) -> String {
    let mut stream = response.bytes_stream();
    let mut text = String::new();
    while !enough(&text) {
        let piece = tokio::time::timeout(SOON, stream.next()).await.expect("in time");
        text.push_str(std::str::from_utf8(&piece.expect("the stream goes on").unwrap()).unwrap());
    }
    text
}

#[tokio::test]
async fn a_topic_can_be_read_as_server_sent_events_until_the_sidecar_drains() {
    let secret = "
apiVersion: duet.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: secret}
spec:
  targetRefs: [{kind: Topic, name: secret}]
  action: Deny
  rules: [{from: [{namespaces: [default]}]}]
";
    let resources = [("news.yaml", reader("")), ("secret.yaml", secret.to_owned())];
    let resources: Vec<_> = resources.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let control_plane = ControlPlane::start(&resources).await;
    let mut client = Sidecar::ready(&control_plane, Options::client("page")).await;
    let api = client.ports.api;
    let url = format!("http://{api}/v1.0/subscribe/default/news");
    let get = |query: &str| http::client().get(format!("{url}{query}"));
    let answer = get("").header("origin", "http://localhost:3000").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    assert_eq!(answer.headers()["access-control-allow-origin"], "http://localhost:3000");
    for n in 0..20 {
        let body = json!({ "n": n }).to_string();
        let answer = post(api, "/v1.0/publish/default/news", "application/json", &body).await;
        assert_eq!(answer.status(), 204);
    }
    let text = read_until(answer, |text| text.matches("\nevent: ").count() == 20).await;
    let numbers = |text: &str| -> Vec<u64> {
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| serde_json::from_str::<Value>(data).unwrap()["data"]["n"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(numbers(&text), (0..20).collect::<Vec<_>>());
    let ids: Vec<u64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("id: "))
        .map(|id| id.parse().unwrap())
        .collect();
    assert!(ids.is_sorted(), "{ids:?}");
    // One for later comes after younger ones, and takes nobody back.
    for (n, when) in [(20, "?metadata.deliverAfter=1s"), (21, "")] {
        let (path, body) = (format!("/v1.0/publish/default/news{when}"), json!({ "n": n }));
        let answer = post(api, &path, "application/json", &body.to_string()).await;
        assert_eq!(answer.status(), 204);
    }
    let answer = get("?start=earliest").send().await.unwrap();
    let text = read_until(answer, |text| text.matches("\nevent: ").count() == 22).await;
    assert_eq!(numbers(&text)[20..], [21, 20]);
    let ids = text.lines().filter_map(|line| line.strip_prefix("id: "));
    let ids: Vec<u64> = ids.map(|id| id.parse().unwrap()).collect();
    assert_eq!(ids[21], ids[20], "a reader that comes back goes on behind both");

    let other = get("").header("origin", "https://elsewhere.example").send().await.unwrap();
    assert_eq!(other.status(), 403);
    assert!(!other.headers().contains_key("access-control-allow-origin"));
    let queries =
        [("?start=yesterday", 400), ("?what=1", 400), ("?filter=event.data.n%20%3E", 400)];
    for (query, status) in queries {
        assert_eq!(get(query).send().await.unwrap().status(), status, "{query}");
    }
    let secret = format!("http://{api}/v1.0/subscribe/default/secret");
    assert_eq!(http::client().get(secret).send().await.unwrap().status(), 403);
    let event = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t"}"#;
    let batch = format!("[{}{event}]", format!("{event},").repeat(10_000));
    let kind = "application/cloudevents-batch+json";
    let answer = post(api, "/v1.0/publish/default/news", kind, &batch).await;
    assert_eq!(answer.status(), 400, "more events than one request may have");
    let nobus = format!("http://{api}/v1.0/subscribe/nobus/news");
    assert_eq!(http::client().get(nobus).send().await.unwrap().status(), 404);

    // A reader that stays does not hold up the end of the sidecar.
    let staying = get("?start=earliest").send().await.unwrap();
    client.process.signal(Signal::TERM);
    let rest = tokio::time::timeout(Duration::from_secs(20), staying.bytes()).await;
    assert!(rest.is_ok(), "the stream ends at the drain");
    assert_eq!(client.process.wait(), Some(0));
}
