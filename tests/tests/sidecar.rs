//! One sidecar as a process: several workers, access log, leaving in order.

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

use std::time::{Duration, Instant};

use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use rustix::process::Signal;
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn several_workers_share_the_ports_and_every_call_is_in_the_access_log() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let server = Options::service("web", app.port()).flags(&["--workers", "2"]);
    let _server = Sidecar::ready(&control_plane, server).await;
    let log = control_plane.folder.path().join("access.log");
    let client = Options::client("caller");
    let client = client.flags(&["--workers", "2", "--access-log", log.to_str().unwrap()]);
    let client = Sidecar::ready(&control_plane, client).await;
    let outbound = client.ports.outbound;
    let calls: Vec<_> = (0..100)
        .map(|n| {
            tokio::spawn(async move { http::get(outbound, "web", &format!("/{n}")).await.status() })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
    let entries = || -> Vec<Value> {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    eventually("every call is logged", SOON, || async { (entries().len() == 100).then_some(()) })
        .await;
    let entry = &entries()[0];
    assert_eq!(entry["service"], "default/web:80");
    assert_eq!(
        (&entry["status"], &entry["method"], &entry["attempts"]),
        (&200.into(), &"GET".into(), &1.into())
    );
    assert!(entry["duration_ms"].as_f64().unwrap() > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sigterm_calls_in_flight_end_well_and_new_ones_go_elsewhere() {
    let control_plane = ControlPlane::start(&[]).await;
    let (one, two) = (App::echo("one").await, App::echo("two").await);
    let options = |app: &App, name: &str| Options::service("web", app.port()).instance(name);
    let mut first = Sidecar::ready(&control_plane, options(&one, "web-1")).await;
    let client = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = client.ports.outbound;
    let slow =
        tokio::spawn(async move { http::get(outbound, "web", "/delay/1500").await.status() });
    eventually("the slow call is in flight", SOON, || async {
        one.asked().iter().any(|asked| asked.path == "/delay/1500").then_some(())
    })
    .await;
    let _second = Sidecar::ready(&control_plane, options(&two, "web-2")).await;
    first.process.signal(Signal::TERM);
    eventually("it is not ready any more", SOON, || async {
        http::is_ok(first.ports.metrics, "/ready").await.is_none().then_some(())
    })
    .await;
    let before = one.asked().len();
    for n in 0..30 {
        assert_eq!(http::get(outbound, "web", "/").await.status(), 200, "call {n}");
    }
    assert_eq!(slow.await.unwrap(), 200, "what was in flight ended well");
    assert_eq!(one.asked().len(), before, "nothing new came to the one that leaves");
    assert_eq!(two.asked().len(), 30);
    // Its application leaves, and so does the sidecar.
    one.stop().await;
    assert_eq!(first.process.wait(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_is_not_let_in_asks_ever_less_often() {
    let control_plane = ControlPlane::start(&[]).await;
    let mut elsewhere = Options::client("web").namespace("elsewhere");
    elsewhere.token = Some(control_plane.token("default", "web", &[]));
    let began = Instant::now();
    let _sidecar = Sidecar::start(&control_plane, elsewhere).await;
    let labels = [("service", "discovery")];
    let name = "duet_control_plane_refused_requests_total";
    eventually("it was refused some times", SOON, || async {
        (metrics::sum(control_plane.admin, name, &labels).await >= 6.0).then_some(())
    })
    .await;
    // Half of 0.1 s, 0.2 s, 0.4 s, 0.8 s and 1.6 s, at least.
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1550), "{took:?}");
}
