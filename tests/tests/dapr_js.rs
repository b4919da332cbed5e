//! Dapr's SDK for JavaScript (npm `@dapr/dapr`), unmodified, through real sidecars. The program is `tests/js/dapr_app.js`.

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

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::port::free_port;
use duet_tests::process::{Process, program};
use duet_tests::{SOON, eventually, http, tools};
use serde_json::{Value, json};

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: js}
spec: {ports: [{port: 80, targetPort: http}]}
";

/// Node, and the folder of packages in which it finds the SDK.
fn node() -> Option<(PathBuf, PathBuf)> {
    let node = tools::find("node")?;
    let modules =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-tools/js/node_modules");
    if !modules.join("@dapr/dapr/index.js").is_file() {
        tools::skip("the Dapr SDK for JavaScript is missing; run scripts/test-deps.sh");
        return None;
    }
    Some((node, modules))
}

/// Waits until somebody consumes each of these topics.
async fn consumed(control_plane: &ControlPlane, topics: usize) {
    let operator = format!("http://{}", control_plane.operator);
    eventually(&format!("{topics} subscriptions are consumed"), SOON, || async {
        let mut command = Command::new(program("duet"));
        command.args(["events", "subscriptions", "--json", "--operator", &operator]);
        let all: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
        let all = all["subscriptions"].as_array().unwrap().iter();
        (all.filter(|one| one["consumers"] == 1).count() == topics).then_some(())
    })
    .await;
}

async fn everything_that_the_sdk_does_works(protocol: &'static str) {
    let Some((node, modules)) = node() else { return };
    let control_plane = ControlPlane::start(&[("service.yaml", SERVICE)]).await;
    let port = free_port();
    let options = Options::service("js", port);
    let options = if protocol == "grpc" { options.protocol("grpc") } else { options };
    let sidecar = Sidecar::start(&control_plane, options).await;
    let log = control_plane.folder.path().join("js.jsonl");
    let mut command = Command::new(node);
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("js/dapr_app.js"))
        .env("NODE_PATH", modules)
        .env("TEST_LOG", &log)
        .env("PROTOCOL", protocol)
        .env("SERVICE", "js")
        .env("APP_PORT", port.to_string())
        .env("DAPR_HTTP_PORT", sidecar.ports.api.port().to_string())
        .env("DAPR_GRPC_PORT", sidecar.ports.grpc_api.port().to_string());
    let _app = Process::start("js", command, control_plane.folder.path());
    sidecar.wait_ready().await;
    consumed(&control_plane, 8).await;

    let act = format!("http://{}/v1.0/invoke/js/method/act", sidecar.ports.api);
    let answer = http::client().post(act).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let answer: Value = answer.json().await.unwrap();
    for (name, expected) in [
        ("bulkFailed", json!(0)),
        ("healthy", json!(true)),
        ("id", json!("js")),
        ("team", json!("blue")),
        ("invoked", json!({"hello": "Duet"})),
    ] {
        assert_eq!(answer[name], expected, "{name}: {answer}");
    }
    let refused = |name: &str, why: &str| {
        assert!(answer[name].as_str().unwrap().contains(why), "{name}: {answer}");
    };
    refused("noBus", "ERR_PUBSUB_NOT_FOUND");
    refused(
        "state",
        if protocol == "grpc" { "SaveState" } else { "POST /v1.0/state/store is not here" },
    );

    let mut expected = vec![
        json!({"topic": "plain", "data": {"n": 1}}),
        json!({"topic": "plain", "data": "text"}),
        json!({"topic": "plain", "data": {"n": 2}}),
        json!({"topic": "raw", "data": {"n": 3}}),
        json!({"topic": "other", "data": {"n": 4}}),
        json!({"topic": "important", "data": {"n": 5}}),
        json!({"topic": "retried", "data": {"n": 6}, "tries": 1}),
        json!({"topic": "retried", "data": {"n": 6}, "tries": 2}),
        json!({"topic": "lost", "data": {"n": 7}}),
        json!({"topic": "bulk", "data": "b1"}),
        json!({"topic": "bulk", "data": {"n": 8}}),
        json!({"topic": "rawbulk", "data": {"n": 9}}),
    ];
    let mut notes = eventually("every event arrives", SOON, || async {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        // The last line may still be on its way.
        let notes: Vec<Value> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        (notes.len() >= expected.len()).then_some(notes)
    })
    .await;
    for all in [&mut notes, &mut expected] {
        all.sort_by_key(ToString::to_string);
    }
    assert_eq!(notes, expected);
}

#[tokio::test]
async fn an_http_application_does_everything_that_its_sdk_can() {
    everything_that_the_sdk_does_works("http").await;
}

#[tokio::test]
async fn a_grpc_application_does_everything_that_its_sdk_can() {
    everything_that_the_sdk_does_works("grpc").await;
}
