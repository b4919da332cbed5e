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

use duet_api::dapr::common::v1::{HttpExtension, InvokeRequest};
use duet_api::dapr::runtime::v1::dapr_client::DaprClient;
use duet_api::dapr::runtime::v1::subscribe_topic_events_request_alpha1::SubscribeTopicEventsRequestType as Asked;
use duet_api::dapr::runtime::v1::subscribe_topic_events_response_alpha1::SubscribeTopicEventsResponseType as Said;
use duet_api::dapr::runtime::v1::{
    BulkPublishRequest, BulkPublishRequestEntry, InvokeServiceRequest, PublishEventRequest,
    SetMetadataRequest, SubscribeTopicEventsRequestAlpha1,
    SubscribeTopicEventsRequestInitialAlpha1, SubscribeTopicEventsRequestProcessedAlpha1,
    TopicEventResponse,
};
use duet_api::health::HealthCheckRequest;
use duet_api::health::health_client::HealthClient;
use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Ports, Sidecar};
use duet_tests::process::Process;
use duet_tests::{SOON, eventually, http, tools};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};

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

const SECRET: &str = "\
apiVersion: duet.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: secret}
spec:
  targetRefs: [{kind: Topic, name: secret}]
  action: Deny
  rules: [{from: [{namespaces: [default]}]}]
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

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
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

/// Waits until the sidecar has subscribed for its application.
async fn subscribed(sidecar: &Sidecar, topic: &str) {
    eventually(&format!("a subscription to {topic}"), SOON, || async {
        let log = sidecar.process.log();
        log.lines().any(|line| line.contains("subscribed") && line.contains(topic)).then_some(())
    })
    .await;
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

    let events = eventually("all nine arrive", SOON, || async {
        let asked = app.asked().into_iter().filter(|asked| asked.path == "/news");
        let events: Vec<Value> = asked.map(|asked| asked.json()).collect();
        (events.len() >= 9).then_some(events)
    })
    .await;
    assert_eq!(events.len(), 9, "{events:#?}");
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
    subscribed(&web, "orders.dead").await;
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
    subscribed(&callback, "orders.dead").await;
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

fn initial(bus: &str, topic: &str) -> SubscribeTopicEventsRequestAlpha1 {
    let initial = SubscribeTopicEventsRequestInitialAlpha1 {
        pubsub_name: bus.to_owned(),
        topic: topic.to_owned(),
        ..Default::default()
    };
    SubscribeTopicEventsRequestAlpha1 {
        subscribe_topic_events_request_type: Some(Asked::InitialRequest(initial)),
    }
}

fn processed(id: &str, status: i32) -> SubscribeTopicEventsRequestAlpha1 {
    let processed = SubscribeTopicEventsRequestProcessedAlpha1 {
        id: id.to_owned(),
        status: Some(TopicEventResponse { status }),
    };
    SubscribeTopicEventsRequestAlpha1 {
        subscribe_topic_events_request_type: Some(Asked::EventProcessed(processed)),
    }
}

type Said1 = duet_api::dapr::runtime::v1::SubscribeTopicEventsResponseAlpha1;

async fn open(
    dapr: &mut DaprClient<Channel>,
    topic: &str,
) -> (mpsc::Sender<SubscribeTopicEventsRequestAlpha1>, Streaming<Said1>) {
    let (answers, receiver) = mpsc::channel(8);
    answers.send(initial("default", topic)).await.unwrap();
    let events = dapr.subscribe_topic_events_alpha1(ReceiverStream::new(receiver)).await;
    let mut events = events.unwrap().into_inner();
    let first = events.message().await.unwrap().unwrap();
    let first = first.subscribe_topic_events_response_type;
    assert!(matches!(first, Some(Said::InitialResponse(_))), "{first:?}");
    (answers, events)
}

/// Id of the next event.
async fn next(events: &mut Streaming<Said1>) -> String {
    let message = tokio::time::timeout(SOON, events.message()).await.expect("an event").unwrap();
    match message.unwrap().subscribe_topic_events_response_type {
        Some(Said::EventMessage(event)) => event.id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_end_of_a_stream_gives_unanswered_events_back_unspent() {
    let control_plane = ControlPlane::start(&[]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("streamer")).await;
    let mut dapr = DaprClient::new(channel(&sidecar).await);
    let (answers, mut events) = open(&mut dapr, "orders").await;
    for text in ["a", "b"] {
        publish(&sidecar, text).await;
    }
    assert_eq!((next(&mut events).await, next(&mut events).await), ("a".into(), "b".into()));
    // An answer to what nobody asked is of no consequence.
    answers.send(processed("unknown", 0)).await.unwrap();
    answers.send(processed("a", 0)).await.unwrap();
    eventually("the first one is done", SOON, || async {
        let acked = r#"duet_event_deliveries_total{outcome="ack""#;
        let metrics = http::text(sidecar.ports.metrics, "/metrics").await;
        metrics.lines().any(|line| line.starts_with(acked) && line.ends_with(" 1")).then_some(())
    })
    .await;
    drop((answers, events));

    // Given back by every stream that leaves: more often than there are attempts.
    for _ in 0..12 {
        let (answers, mut events) = open(&mut dapr, "orders").await;
        assert_eq!(next(&mut events).await, "b");
        drop((answers, events));
    }
    let (answers, mut events) = open(&mut dapr, "orders").await;
    assert_eq!(next(&mut events).await, "b", "never among the dead letters");
    answers.send(processed("b", 0)).await.unwrap();
    publish(&sidecar, "c").await;
    assert_eq!(next(&mut events).await, "c");
    // A second initial request is nonsense: said, and nothing is lost.
    answers.send(initial("default", "orders")).await.unwrap();
    let error = loop {
        match tokio::time::timeout(SOON, events.message()).await.expect("an end") {
            Ok(Some(_event)) => {}
            Ok(None) => panic!("it ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let (_answers, mut events) = open(&mut dapr, "orders").await;
    assert_eq!(next(&mut events).await, "c");
}

#[tokio::test]
async fn the_grpc_api_names_what_is_wrong() {
    let resources = [("services.yaml", SERVICES), ("secret.yaml", SECRET)];
    let control_plane = ControlPlane::start(&resources).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let channel = channel(&sidecar).await;
    let mut dapr = DaprClient::new(channel.clone());
    let event = |bus: &str, topic: &str| PublishEventRequest {
        pubsub_name: bus.to_owned(),
        topic: topic.to_owned(),
        ..Default::default()
    };
    let long = "x".repeat(300);
    for (bus, topic, code) in [
        ("", "t", Code::InvalidArgument),
        ("default", "", Code::InvalidArgument),
        ("default", "a b", Code::InvalidArgument),
        ("default", long.as_str(), Code::InvalidArgument),
        ("nowhere", "t", Code::NotFound),
    ] {
        let status = dapr.publish_event(event(bus, topic)).await.unwrap_err();
        assert_eq!(status.code(), code, "{bus} {topic}: {status}");
    }
    let odd = PublishEventRequest { data_content_type: "a\nb".into(), ..event("default", "t") };
    assert_eq!(dapr.publish_event(odd).await.unwrap_err().code(), Code::InvalidArgument);
    let large = PublishEventRequest { data: vec![0; 5 << 20].into(), ..event("default", "t") };
    let status = dapr.publish_event(large).await.unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");

    let entry = |id: &str| BulkPublishRequestEntry { entry_id: id.into(), ..Default::default() };
    for entries in [vec![entry("")], vec![entry("a"), entry("a")]] {
        let bulk = BulkPublishRequest {
            pubsub_name: "default".into(),
            topic: "t".into(),
            entries,
            ..Default::default()
        };
        let status = dapr.bulk_publish_event(bulk).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("entry_id"), "{status}");
    }

    let call = |id: &str, method: &str, verb: i32| InvokeServiceRequest {
        id: id.to_owned(),
        message: Some(InvokeRequest {
            method: method.to_owned(),
            http_extension: Some(HttpExtension { verb, querystring: String::new() }),
            ..Default::default()
        }),
    };
    for (request, code) in [
        (InvokeServiceRequest::default(), Code::InvalidArgument),
        (call("user@reader", "x", 1), Code::InvalidArgument),
        (call("", "x", 1), Code::InvalidArgument),
        (call("reader", "a b", 1), Code::InvalidArgument),
        (call("reader", "x", 99), Code::InvalidArgument),
        (call("reader", "x", 6), Code::InvalidArgument),
        (call("reader", "x", 1), Code::Unavailable),
    ] {
        let what = format!("{request:?}");
        let status = dapr.invoke_service(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{what}: {status}");
    }

    for (first, code) in [
        (processed("a", 0), Code::InvalidArgument),
        (SubscribeTopicEventsRequestAlpha1::default(), Code::InvalidArgument),
        (initial("nowhere", "t"), Code::NotFound),
        (initial("default", ""), Code::InvalidArgument),
    ] {
        let what = format!("{first:?}");
        let first = tokio_stream::iter([first]);
        let status = dapr.subscribe_topic_events_alpha1(first).await.unwrap_err();
        assert_eq!(status.code(), code, "{what}: {status}");
    }
    let denied = tokio_stream::iter([initial("default", "secret")]);
    let status = dapr.subscribe_topic_events_alpha1(denied).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let status = dapr.publish_event(event("default", "secret")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let nothing = tokio_stream::empty::<SubscribeTopicEventsRequestAlpha1>();
    let status = dapr.subscribe_topic_events_alpha1(nothing).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");

    let label = SetMetadataRequest { key: String::new(), value: "x".into() };
    assert_eq!(dapr.set_metadata(label).await.unwrap_err().code(), Code::InvalidArgument);
    let mut health = HealthClient::new(channel.clone());
    let healthy = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(healthy.status, 1);
    let other = HealthCheckRequest { service: "other".into() };
    assert_eq!(health.check(other).await.unwrap_err().code(), Code::NotFound);
    // The HTTP port speaks gRPC too.
    let endpoint = Endpoint::from_shared(format!("http://{}", sidecar.ports.api)).unwrap();
    let mut dapr = DaprClient::new(endpoint.connect().await.unwrap());
    dapr.publish_event(event("default", "t")).await.unwrap();
}
