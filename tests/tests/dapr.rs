//! The published Dapr Python SDK, unmodified, through real sidecars; and what its gRPC API says to peers that talk
//! nonsense. The Python programs are in `tests/python`.

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

use std::path::{Path, PathBuf};
use std::process::Command;

use axum::http::StatusCode;
use duet_api::dapr::runtime::v1::dapr_client::DaprClient;
use duet_api::dapr::runtime::v1::{GetMetadataRequest, PubsubSubscriptionType, ShutdownRequest};
use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Ports, Sidecar};
use duet_tests::port::free_port;
use duet_tests::process::Process;
use duet_tests::{SOON, eventually, http, tools};
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

#[path = "dapr/bulk.rs"]
mod bulk;
#[path = "dapr/nonsense.rs"]
mod nonsense;
#[path = "dapr/streams.rs"]
mod streams;

const SERVICES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: callback}
spec: {ports: [{port: 80, targetPort: http}]}
---
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

/// A Python that has the SDK.
fn python() -> Option<PathBuf> {
    let python = tools::find("python")?;
    let import = "import dapr.clients, dapr.ext.fastapi, dapr.ext.grpc, uvicorn";
    let output = Command::new(&python).args(["-c", import]).output().unwrap();
    if !output.status.success() {
        tools::skip("the Dapr SDK for Python is missing; run scripts/test-deps.sh");
        return None;
    }
    Some(python)
}

/// A program of `tests/python` beside a sidecar.
struct Script {
    _process: Process,
    log: PathBuf,
}

impl Script {
    fn start(python: &Path, folder: &Path, name: &str, ports: Ports, app_port: u16) -> Self {
        let log = folder.join(format!("{name}.jsonl"));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(name);
        let mut command = Command::new(python);
        command
            .arg(script)
            .env("TEST_LOG", &log)
            .env("APP_PORT", app_port.to_string())
            .env("DAPR_HTTP_PORT", ports.api.port().to_string())
            .env("DAPR_GRPC_PORT", ports.grpc_api.port().to_string())
            .env("DAPR_HEALTH_TIMEOUT", "30")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PYTHONUNBUFFERED", "1")
            .env("NO_PROXY", "*");
        Self { _process: Process::start(name, command, folder), log }
    }

    fn notes(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        // The last line may still be on its way.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// All notes, once one has this key.
    async fn until(&self, key: &str) -> Vec<Value> {
        let what = format!("{} notes {key}", self.log.display());
        eventually(&what, SOON, || async {
            let notes = self.notes();
            notes.iter().any(|note| note.get(key).is_some()).then_some(notes)
        })
        .await
    }

    /// Events of a topic with this text.
    fn events(&self, topic: &str, data: &str) -> Vec<Value> {
        let of = |note: &Value| note["topic"] == topic && note["data"] == data;
        self.notes().into_iter().filter(of).collect()
    }
}

fn note<'n>(notes: &'n [Value], key: &str, value: &str) -> &'n Value {
    let found = notes.iter().find(|note| note[key] == value);
    found.unwrap_or_else(|| panic!("no {key} {value} in {notes:#?}"))
}

async fn channel(sidecar: &Sidecar) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", sidecar.ports.grpc_api)).unwrap();
    endpoint.connect().await.unwrap()
}

async fn publish(sidecar: &Sidecar, text: &str) {
    let url = format!("http://{}/v1.0/publish/default/orders", sidecar.ports.api);
    let event = json!({
        "specversion": "1.0", "id": text, "source": "/test", "type": "t", "note": "kept",
        "data": {"text": text},
    });
    let request = http::client().post(url).header("content-type", "application/cloudevents+json");
    let answer = request.body(event.to_string()).send().await.unwrap();
    assert_eq!(answer.status(), 204, "{text}");
}

/// Every subscriber handles, is asked again after a retry, and sees what it dropped among the dead letters.
async fn every_verdict_is_kept(script: &Script, writer: &Sidecar) {
    for text in ["first", "retry", "drop", "last"] {
        publish(writer, text).await;
    }
    for (topic, text, times) in [
        ("orders", "first", 1),
        ("orders", "retry", 2),
        ("orders", "drop", 1),
        ("orders.dead", "drop", 1),
        ("orders", "last", 1),
    ] {
        let what = format!("{text} of {topic} arrives {times} times");
        let events = eventually(&what, SOON, || async {
            let events = script.events(topic, text);
            (events.len() >= times).then_some(events)
        })
        .await;
        assert_eq!(events.len(), times, "{events:?}");
        assert_eq!(events[0]["id"], text);
        if topic == "orders" {
            assert_eq!(events[0]["note"], "kept");
        }
    }
}

/// Waits until the bus keeps events of these topics for the sidecar's application.
async fn subscribed(sidecar: &Sidecar, topics: &[&str]) {
    for topic in topics {
        let topic = format!("topic={topic:?}");
        eventually(&format!("a subscription to {topic}"), SOON, || async {
            let log = sidecar.process.log();
            let says = |line: &str| line.contains("subscribed") && line.contains(&topic);
            log.lines().any(says).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn the_sdk_publishes_in_every_way() {
    let Some(python) = python() else { return };
    let control_plane = ControlPlane::start(&[("services.yaml", SERVICES)]).await;
    let app = App::echo("reader").await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let folder = control_plane.folder.path();
    let script = Script::start(&python, folder, "dapr_publish.py", writer.ports, 0);
    let notes = script.until("done").await;

    let events = eventually("all eleven arrive", SOON, || async {
        let asked = app.asked().into_iter().filter(|asked| asked.path == "/news");
        let events: Vec<Value> = asked.map(|asked| asked.json()).collect();
        (events.len() >= 11).then_some(events)
    })
    .await;
    assert_eq!(events.len(), 11, "{events:#?}");
    let with = |key: &str, value: Value| {
        let found = events.iter().find(|event| event[key] == value);
        found.unwrap_or_else(|| panic!("{key} {value} in {events:#?}"))
    };
    assert_eq!(with("data", json!({"n": 1}))["source"], "writer");
    assert_eq!(with("data_base64", json!("AP8="))["datacontenttype"], "application/octet-stream");
    assert_eq!(with("data", json!("text"))["datacontenttype"], "text/plain");
    assert_eq!(with("id", json!("own"))["type"], "own.type");
    assert_eq!(with("id", json!("named"))["partitionkey"], "k");
    assert!(with("id", json!("named"))["expirytime"].is_string());
    assert!(
        events.iter().any(|event| event["id"] != "own" && event["data"]["id"] == "own"),
        "a raw payload is data, not an envelope: {events:#?}"
    );
    for bulk in ["b1", "b2"] {
        assert_eq!(with("data", json!(bulk))["type"], "com.dapr.event.sent");
    }
    assert_eq!(with("id", json!("b3"))["data"], json!({"n": 3}));

    let net = with("source", json!("urn:net"));
    assert_eq!((&net["data"], &net["type"]), (&json!({"n": 4}), &json!("net.type")));
    assert_eq!((&net["specversion"], net["id"].is_string()), (&json!("1.0"), true), "{net}");
    assert_eq!(with("type", json!("net.bulk"))["source"], "writer");

    let failed: Vec<&Value> = notes.iter().filter_map(|note| note.get("failed")).collect();
    assert_eq!(failed, [&json!([]), &json!(["broken"])]);
    for (name, code, text) in [
        ("bus", "NOT_FOUND", "nowhere"),
        ("topic", "INVALID_ARGUMENT", "name"),
        ("envelope", "INVALID_ARGUMENT", "specversion"),
        ("metadata", "INVALID_ARGUMENT", "ttlInSeconds"),
        ("bulk", "NOT_FOUND", "nowhere"),
    ] {
        let note = note(&notes, "refused", name);
        assert_eq!(note["code"], code, "{note}");
        assert!(note["text"].as_str().unwrap().contains(text), "{note}");
    }
    let metadata = note(&notes, "id", "writer");
    assert_eq!(metadata["components"], json!(["default"]));
    assert_eq!(metadata["extended"]["team"], "blue");
    assert_eq!(metadata["extended"]["namespace"], "default");
    let state = notes.iter().find_map(|note| note.get("state")).expect("the state API is refused");
    assert!(state.as_str().unwrap().contains("Duet serves"), "{state}");
}

#[tokio::test]
async fn a_fastapi_application_subscribes() {
    let Some(python) = python() else { return };
    let control_plane = ControlPlane::start(&[("services.yaml", SERVICES)]).await;
    let port = free_port();
    let web = Sidecar::start(&control_plane, Options::service("web", port)).await;
    let folder = control_plane.folder.path();
    let script = Script::start(&python, folder, "dapr_fastapi_app.py", web.ports, port);
    web.wait_ready().await;
    subscribed(&web, &["orders", "orders.dead"]).await;
    every_verdict_is_kept(&script, &web).await;
}

#[tokio::test]
async fn a_grpc_application_subscribes() {
    let Some(python) = python() else { return };
    let control_plane = ControlPlane::start(&[("services.yaml", SERVICES)]).await;
    let port = free_port();
    let options = Options::service("callback", port).protocol("grpc");
    let callback = Sidecar::start(&control_plane, options).await;
    let folder = control_plane.folder.path();
    let script = Script::start(&python, folder, "dapr_grpc_app.py", callback.ports, port);
    callback.wait_ready().await;
    subscribed(&callback, &["orders", "orders.dead"]).await;
    every_verdict_is_kept(&script, &callback).await;
}

#[tokio::test]
async fn an_application_subscribes_by_streams() {
    let Some(python) = python() else { return };
    let control_plane = ControlPlane::start(&[]).await;
    let streamer = Sidecar::ready(&control_plane, Options::client("streamer")).await;
    let folder = control_plane.folder.path();
    let script = Script::start(&python, folder, "dapr_stream_app.py", streamer.ports, 0);
    eventually("both streams are open", SOON, || async {
        (script.notes().iter().filter(|note| note.get("open").is_some()).count() == 2).then_some(())
    })
    .await;
    every_verdict_is_kept(&script, &streamer).await;
}

#[tokio::test]
async fn the_sdk_invokes_services_over_http_and_grpc() {
    let Some(python) = python() else { return };
    let control_plane = ControlPlane::start(&[("services.yaml", SERVICES)]).await;
    let folder = control_plane.folder.path();
    let (http_port, grpc_port) = (free_port(), free_port());
    let web = Sidecar::start(&control_plane, Options::service("web", http_port)).await;
    let _web = Script::start(&python, folder, "dapr_fastapi_app.py", web.ports, http_port);
    let options = Options::service("callback", grpc_port).protocol("grpc");
    let callback = Sidecar::start(&control_plane, options).await;
    let called = Script::start(&python, folder, "dapr_grpc_app.py", callback.ports, grpc_port);
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    web.wait_ready().await;
    callback.wait_ready().await;
    let script = Script::start(&python, folder, "dapr_invoke.py", caller.ports, 0);
    let notes = script.until("done").await;

    for protocol in ["http", "grpc"] {
        let answer = note(&notes, "call", &format!("{protocol} web"));
        let said: Value = serde_json::from_str(answer["text"].as_str().unwrap()).unwrap();
        assert_eq!(said["said"], "hi", "{answer}");
        assert_eq!(said["type"], "text/plain", "{answer}");
        assert_eq!(said["query"], "q=1", "{answer}");
        assert_eq!(said["note"], "kept", "{answer}");
        assert_eq!(answer["header"], "yes", "{answer}");
        let answer = note(&notes, "call", &format!("{protocol} callback"));
        assert_eq!(answer["text"], "hi with text/plain and kept", "{answer}");
        assert_eq!(answer["header"], "yes", "{answer}");
    }
    for (call, code) in [
        ("grpc web missing-thing", "ALREADY_EXISTS"),
        ("grpc callback nothing", "UNIMPLEMENTED"),
        ("proxied nobody", "UNAVAILABLE"),
    ] {
        assert_eq!(note(&notes, "call", call)["code"], code, "{notes:#?}");
    }
    for call in ["http web missing-thing", "http callback nothing", "http nobody x"] {
        assert!(note(&notes, "call", call)["error"].is_string(), "{notes:#?}");
    }
    assert_eq!(note(&notes, "call", "proxied callback")["text"], "");
    assert!(called.notes().iter().any(|note| note["health"] == true));
}

#[tokio::test]
async fn metadata_lists_every_kind_of_subscription_and_shutdown_drains() {
    let control_plane = ControlPlane::start(&[("services.yaml", SERVICES)]).await;
    let app = App::answering(|asked| match asked.path.as_str() {
        "/dapr/subscribe" => (
            StatusCode::OK,
            r#"[{"pubsubname": "default", "topic": "more", "route": "/more"}]"#.to_owned(),
        ),
        _ => (StatusCode::OK, String::new()),
    })
    .await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    subscribed(&reader, &["more"]).await;
    let mut dapr = DaprClient::new(channel(&reader).await);
    let stream = streams::open(&mut dapr, "streamed").await;
    let listed = dapr.get_metadata(GetMetadataRequest {}).await.unwrap().into_inner();
    let kinds = |topic: &str| {
        let found = listed.subscriptions.iter().find(|found| found.topic == topic);
        found.map(|found| found.r#type())
    };
    assert_eq!(kinds("news"), Some(PubsubSubscriptionType::Declarative));
    assert_eq!(kinds("more"), Some(PubsubSubscriptionType::Programmatic));
    assert_eq!(kinds("streamed"), Some(PubsubSubscriptionType::Streaming));
    let text = http::text(reader.ports.api, "/v1.0/metadata").await;
    let listed: Value = serde_json::from_str(&text).unwrap();
    let of = |topic: &str| {
        let all = listed["subscriptions"].as_array().unwrap();
        all.iter().find(|one| one["topic"] == topic).unwrap().clone()
    };
    assert_eq!(of("more")["rules"], json!([{"path": "/more"}]));
    assert_eq!(of("streamed")["type"], "STREAMING");
    drop(stream);
    eventually("the stream is not listed any more", SOON, || async {
        let text = http::text(reader.ports.api, "/v1.0/metadata").await;
        (!text.contains("STREAMING")).then_some(())
    })
    .await;
    dapr.shutdown(ShutdownRequest {}).await.unwrap();
    app.stop().await;
    reader.gone().await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let url = format!("http://{}/v1.0/shutdown", writer.ports.api);
    let publish = format!("http://{}/v1.0/publish/default/news", writer.ports.api);
    for (origin, status) in [("http://evil.example", 403), ("http://localhost:8080", 204)] {
        let page = http::client().post(&publish).header("origin", origin).body("from a page");
        assert_eq!(page.send().await.unwrap().status(), status, "{origin}");
    }
    let page = http::client().post(&url).header("origin", "http://evil.example").send();
    assert_eq!(page.await.unwrap().status(), 403);
    assert_eq!(http::client().post(url).send().await.unwrap().status(), 204);
    writer.gone().await;
}
