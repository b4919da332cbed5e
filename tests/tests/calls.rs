//! Calls through two sidecars.

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

use std::time::Duration;

use duet_tests::app::App;
use duet_tests::http::{self, client, client_through};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, metrics};
use reqwest::Method;
use serde_json::Value;

#[tokio::test]
async fn a_call_goes_by_host_header_and_by_proxy_and_says_who_called() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let client_side = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = client_side.ports.outbound;

    let by_host: Value = http::get(outbound, "web", "/a?b=c").await.json().await.unwrap();
    assert_eq!(by_host["path"], "/a?b=c");
    let by_proxy = client_through(outbound).get("http://web/x").send().await.unwrap();
    assert_eq!(by_proxy.status(), 200);
    let asked = app.asked();
    assert_eq!(asked[0].header("host"), "web");
    let caller = asked[0].header("x-forwarded-client-cert");
    assert!(caller.ends_with("URI=spiffe://duet.local/ns/default/sa/caller"), "{caller}");
    let spoofed = http::request(&client(), Method::GET, outbound, "web", "/")
        .header("x-forwarded-client-cert", "URI=spiffe://duet.local/ns/default/sa/admin");
    spoofed.send().await.unwrap();
    assert_eq!(app.asked()[2].header("x-forwarded-client-cert"), caller);
    let count = metrics::sum(
        client_side.ports.metrics,
        "duet_requests_total",
        &[("direction", "outbound")],
    );
    assert!(count.await >= 3.0);
}

#[tokio::test]
async fn an_application_gets_the_http_version_that_it_declares_or_else_the_callers() {
    let control_plane = ControlPlane::start(&[]).await;
    let (declared, free) = (App::echo("declared").await, App::echo("free").await);
    let options = Options::service("declared", declared.port()).protocol("http");
    let _declared = Sidecar::ready(&control_plane, options).await;
    let _free = Sidecar::ready(&control_plane, Options::service("free", free.port())).await;
    let client_side = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = client_side.ports.outbound;
    for (service, version) in [("declared", "HTTP/1.1"), ("free", "HTTP/2.0")] {
        let response = http::get_h2(outbound, service, "/h2").await;
        assert_eq!(response.status(), 200, "{:?}", response.headers());
        let answer: Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(answer["version"], version, "{service}");
    }
    let answer: Value = http::get(outbound, "free", "/").await.json().await.unwrap();
    assert_eq!(answer["version"], "HTTP/1.1");
}

#[tokio::test]
async fn failures_say_why_in_proxy_status_and_in_the_metrics() {
    let control_plane = ControlPlane::start(&[]).await;
    let client_side = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = client_side.ports.outbound;
    let response = http::get(outbound, "nobody", "/").await;
    let status = response.headers()["proxy-status"].to_str().unwrap().to_owned();
    assert!(status.starts_with("duet; error=destination_not_found"), "{status}");
    assert_eq!(response.status(), 502);
    let problem = http::request(&client(), Method::GET, outbound, "nobody", "/")
        .header("accept", "application/problem+json")
        .send()
        .await
        .unwrap();
    assert_eq!(problem.headers()["content-type"], "application/problem+json");
    let problem: Value = problem.json().await.unwrap();
    assert_eq!(problem["error"], "destination_not_found");
    let labels = [("error", "destination_not_found")];
    assert!(metrics::sum(client_side.ports.metrics, "duet_requests_total", &labels).await >= 2.0);
}

#[tokio::test]
async fn calls_go_on_while_the_control_plane_is_gone_and_new_names_say_that_it_is() {
    let mut control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let client_side = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = client_side.ports.outbound;
    assert_eq!(http::get(outbound, "web", "/").await.status(), 200);
    control_plane.kill();
    for _ in 0..20 {
        assert_eq!(http::get(outbound, "web", "/").await.status(), 200);
    }
    let unknown = http::get(outbound, "other", "/").await;
    assert_eq!(unknown.status(), 503);
    let status = unknown.headers()["proxy-status"].to_str().unwrap();
    assert!(status.contains("control plane"), "{status}");
    control_plane.restart().await;
    eventually("the new name is known", SOON, || async {
        let response = http::get(outbound, "other", "/").await;
        let status = response.headers().get("proxy-status")?.to_str().ok()?.to_owned();
        status.contains("destination_not_found").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_replica_that_dies_costs_no_call() {
    let control_plane = ControlPlane::start(&[]).await;
    let (one, two) = (App::echo("one").await, App::echo("two").await);
    let mut first =
        Sidecar::ready(&control_plane, Options::service("web", one.port()).instance("web-1")).await;
    let _second =
        Sidecar::ready(&control_plane, Options::service("web", two.port()).instance("web-2")).await;
    let client_side = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = client_side.ports.outbound;
    eventually("both replicas answer", SOON, || async {
        assert_eq!(http::get(outbound, "web", "/").await.status(), 200);
        (!one.asked().is_empty() && !two.asked().is_empty()).then_some(())
    })
    .await;
    first.process.kill();
    for n in 0..50 {
        assert_eq!(http::get(outbound, "web", "/").await.status(), 200, "call {n}");
    }
    assert_eq!(control_plane.process.log().matches("panicked").count(), 0);
}

#[tokio::test]
async fn a_slow_application_is_bounded_by_the_policy() {
    let policy = "\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: web}
spec:
  targetRefs: [{kind: Service, name: web}]
  timeouts: {request: 300ms}
";
    let control_plane = ControlPlane::start(&[("web.yaml", policy)]).await;
    let app = App::echo("web").await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let client_side = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let started = std::time::Instant::now();
    let response = http::get(client_side.ports.outbound, "web", "/delay/5000").await;
    assert_eq!(response.status(), 504);
    let status = response.headers()["proxy-status"].to_str().unwrap();
    assert!(status.contains("http_response_timeout"), "{status}");
    assert!(started.elapsed() < Duration::from_secs(4));
}

#[tokio::test]
async fn a_retry_sends_the_same_body_again_and_only_where_that_is_safe() {
    let policy = "\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: web}
spec:
  targetRefs: [{kind: Service, name: web}]
  retry: {attempts: 2, codes: [503], backoff: 10ms, maxBodyBytes: 64Ki}
";
    let control_plane = ControlPlane::start(&[("web.yaml", policy)]).await;
    let app = App::answering(|asked| match asked.header("duet-attempt") {
        "" => (axum::http::StatusCode::SERVICE_UNAVAILABLE, "first".to_owned()),
        attempt => (axum::http::StatusCode::OK, attempt.to_owned()),
    })
    .await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = caller.ports.outbound;
    let post = |path: &str, size: usize| {
        let request = http::request(&client(), Method::POST, outbound, "web", path);
        request.body("x".repeat(size))
    };
    let keyed = post("/keyed", 30_000).header("idempotency-key", "1").send().await.unwrap();
    assert_eq!((keyed.status().as_u16(), keyed.text().await.unwrap()), (200, "2".to_owned()));
    let bare = post("/bare", 10).send().await.unwrap();
    assert_eq!(bare.status(), 503, "a POST without a key is sent once");
    let large = post("/large", 100_000).header("idempotency-key", "2").send().await.unwrap();
    assert_eq!(large.status(), 503, "a body that is not kept streams on and is sent once");
    let of = |path: &str| -> Vec<usize> {
        let asked = app.asked();
        asked.iter().filter(|asked| asked.path == path).map(|asked| asked.body.len()).collect()
    };
    assert_eq!(of("/keyed"), [30_000, 30_000]);
    assert_eq!(of("/bare"), [10]);
    assert_eq!(of("/large"), [100_000]);
    for outcome in ["unsafe", "body_too_large"] {
        let labels = [("outcome", outcome)];
        assert!(
            metrics::sum(caller.ports.metrics, "duet_retries_total", &labels).await >= 1.0,
            "{outcome}"
        );
    }
}
