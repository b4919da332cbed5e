//! HTTP as Dapr's SDKs for .NET, Java and JavaScript spell it, through a real sidecar. Not the SDKs themselves.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::http::StatusCode;
use duet_tests::app::{App, Asked};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http};
use futures::StreamExt as _;
use serde_json::{Value, json};

async fn post(api: SocketAddr, path: &str, content_type: &str, body: &str) -> u16 {
    let request = http::client().post(format!("http://{api}{path}"));
    let request = request.header("content-type", content_type).body(body.to_owned());
    request.send().await.unwrap().status().as_u16()
}

fn delivered(app: &App, path: &str) -> Vec<Asked> {
    app.asked().into_iter().filter(|asked| asked.path == path).collect()
}

/// Publishes until something arrives there: a subscription starts with what comes after it.
async fn subscribed(app: &App, path: &str, (api, topic): (SocketAddr, &str)) {
    eventually(&format!("{path} is subscribed"), SOON, || async {
        let publish = format!("/v1.0/publish/default/{topic}");
        assert_eq!(post(api, &publish, "text/plain", "warm-up").await, 204);
        (!delivered(app, path).is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn subscriptions_of_the_sdks_are_taken_in_their_spelling() {
    let control_plane = ControlPlane::start(&[]).await;
    let retried = Arc::new(AtomicBool::new(false));
    let app = App::answering(move |asked| match asked.path.as_str() {
        "/dapr/subscribe" => {
            let all = json!([
                {"topic": "net", "pubsubName": "default", "route": "net"},
                {"pubsubName": "default", "topic": "java", "route": "/java", "deadLetterTopic": null,
                    "metadata": {"rawPayload": "true"}, "bulkSubscribe": null},
                {"topic": "one/by/one", "pubsubName": "default", "route": "one",
                    "bulkSubscribe": {"enabled": true, "maxMessagesCount": 1, "maxAwaitDurationMs": 40}},
            ]);
            (StatusCode::OK, all.to_string())
        }
        "/one" => {
            let body = asked.json();
            let entries = body["entries"].as_array().unwrap();
            let done = |entry: &Value| json!({"EntryId": entry["entryId"], "Status": "SUCCESS"});
            let statuses: Vec<Value> = entries.iter().map(done).collect();
            (StatusCode::OK, json!({ "Statuses": statuses }).to_string())
        }
        "/net" if asked.json()["data"] == "again" && !retried.swap(true, Ordering::Relaxed) => {
            (StatusCode::OK, r#"{"Status":"RETRY"}"#.to_owned())
        }
        _ => (StatusCode::OK, String::new()),
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let api = reader.ports.api;
    for (path, topic) in [("/net", "net"), ("/java", "java"), ("/one", "one/by/one")] {
        subscribed(&app, path, (api, topic)).await;
    }
    assert_eq!(post(api, "/v1.0/publish/default/net", "text/plain", "again").await, 204);
    eventually("what was asked for comes again", SOON, || async {
        let again =
            delivered(&app, "/net").into_iter().filter(|asked| asked.json()["data"] == "again");
        (again.count() == 2).then_some(())
    })
    .await;
    let raw = delivered(&app, "/java").remove(0);
    assert_eq!(raw.header("content-type"), "application/cloudevents+json");
    let raw = raw.json();
    assert_eq!(raw["data_base64"], "d2FybS11cA==", "{raw}");
    assert_eq!(raw["datacontenttype"], "application/octet-stream", "{raw}");
    for asked in delivered(&app, "/one") {
        let body = asked.json();
        assert_eq!(
            (body["entries"].as_array().unwrap().len(), &body["topic"]),
            (1, &json!("one/by/one"))
        );
    }
}

#[tokio::test]
async fn publishes_of_the_sdks_are_taken_in_their_spelling() {
    let control_plane = ControlPlane::start(&[]).await;
    let client = Sidecar::ready(&control_plane, Options::client("page")).await;
    let api = client.ports.api;
    let entries = r#"[{"entryID":"a","event":"<a/>","contentType":"application/xml","metadata":{}},
        {"entryID":"b","event":{"n":1},"contentType":"application/json"}]"#;
    let bulk = "/v1.0/publish/bulk/default/sensors/kitchen";
    assert_eq!(post(api, bulk, "application/json", entries).await, 204);
    let single = "/v1.0/publish/default/sensors%2Fkitchen";
    assert_eq!(post(api, single, "application/json", "{not json").await, 204);
    assert_eq!(post(api, "/v1.0/publish/a%2Fb/c", "text/plain", "x").await, 400);
    let url = format!("http://{api}/v1.0/subscribe/default/sensors/kitchen?start=earliest");
    let mut stream = http::client().get(url).send().await.unwrap().bytes_stream();
    let mut text = String::new();
    while text.matches("\ndata: ").count() < 3 {
        let piece = tokio::time::timeout(SOON, stream.next()).await.expect("in time");
        text.push_str(std::str::from_utf8(&piece.expect("the stream goes on").unwrap()).unwrap());
    }
    let lines = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let data: Vec<Value> =
        lines.map(|line| serde_json::from_str::<Value>(line).unwrap()["data"].clone()).collect();
    assert_eq!(data, [json!("<a/>"), json!({"n": 1}), json!("{not json")]);
}

#[tokio::test]
async fn an_application_says_over_http_what_metadata_tells_of_it() {
    let control_plane = ControlPlane::start(&[]).await;
    let client = Sidecar::ready(&control_plane, Options::client("page")).await;
    let url = |key: &str| format!("http://{}/v1.0/metadata/{key}", client.ports.api);
    let put = |key: &str, value: &str| {
        let request = http::client().put(url(key)).header("content-type", "text/plain");
        request.body(value.to_owned())
    };
    assert_eq!(put("team%20name", "blue").send().await.unwrap().status(), 204);
    assert_eq!(put("", "blue").send().await.unwrap().status(), 400);
    assert_eq!(put("large", &"x".repeat(5000)).send().await.unwrap().status(), 400);
    assert_eq!(http::client().post(url("team")).send().await.unwrap().status(), 405);
    for (origin, status) in [("http://evil.example", 403), ("http://localhost:8080", 204)] {
        let page = put("page", "x").header("origin", origin).send().await.unwrap();
        assert_eq!(page.status(), status, "{origin}");
    }
    let text = http::text(client.ports.api, "/v1.0/metadata").await;
    let extended = serde_json::from_str::<Value>(&text).unwrap()["extended"].clone();
    assert_eq!((&extended["team name"], &extended["large"]), (&json!("blue"), &Value::Null));
}

#[tokio::test]
async fn a_part_of_dapr_that_is_not_here_is_named() {
    let control_plane = ControlPlane::start(&[]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("web")).await;
    for path in [
        "/v1.0/state/store",
        "/v1.0-alpha1/lock/store",
        "/v1.0-beta1/workflows/dapr/n/start",
        "/v1.0/healthz",
        "/",
    ] {
        let url = format!("http://{}{path}", sidecar.ports.api);
        let answer = http::client().post(url).body("[]").send().await.unwrap();
        assert_eq!(answer.status(), 404, "{path}");
        let problem: Value = answer.json().await.unwrap();
        let detail = problem["detail"].as_str().unwrap();
        let named = format!("POST {path} is not here; of Dapr's API, Duet serves /v1.0/publish");
        assert!(detail.starts_with(&named), "{path}: {detail}");
    }
}
