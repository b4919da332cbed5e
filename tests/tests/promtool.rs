//! `/metrics` and the alerts on it in the eyes of Prometheus's own checker.

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

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use duet_tests::app::App;
use duet_tests::http;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::tools;

fn check(text: &str, whose: &str) {
    let Some(promtool) = tools::find("promtool") else { return };
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.trim().is_empty(), "{whose}: {said}");
}

#[tokio::test]
async fn promtool_has_no_complaint_after_traffic_of_every_kind() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    for (host, path) in [("web", "/"), ("web", "/status/503"), ("nobody", "/")] {
        http::get(caller.ports.outbound, host, path).await;
    }
    let publish = format!("http://{}/v1.0/publish/default/t", caller.ports.api);
    let published = http::client().post(publish).body("{}").send().await.unwrap();
    assert_eq!(published.status(), 204);
    let sidecars = [("caller", caller.ports.metrics), ("server", server.ports.metrics)];
    for (whose, address) in sidecars.into_iter().chain([("control plane", control_plane.admin)]) {
        let text = http::text(address, "/metrics").await;
        assert!(text.contains("duet_build_info"), "{whose}: {text}");
        check(&text, whose);
    }
}

#[test]
fn alerts_wake_somebody_when_they_should_and_no_sooner() {
    let Some(promtool) = tools::find("promtool") else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for arguments in [
        ["check", "rules", "k8s/monitoring/alerts.yml"],
        ["test", "rules", "tests/prometheus/alerts_test.yml"],
    ] {
        let output = Command::new(&promtool).args(arguments).current_dir(&root).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}
