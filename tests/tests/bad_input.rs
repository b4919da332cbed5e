//! Nonsense from outside: each gets a clear answer, and every process lives on.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::net::SocketAddr;
use std::time::Duration;

use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use reqwest::Method;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Sends bytes and reads what comes until the end, or for a second.
async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.ok();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    tokio::time::timeout(Duration::from_secs(1), read).await.ok();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn malformed_requests_are_answered_and_oversized_heads_get_431() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let outbound = caller.ports.outbound;
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
        ("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", "400"),
        ("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: x\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: web\r\n folded: x\r\n\r\n", "400"),
        ("GET / HTTP/9.9\r\nHost: web\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: web\r\nx y: z\r\n\r\n", "400"),
        ("CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n\r\n", "403"),
    ] {
        let answer = raw(outbound, request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:?}: {answer:?}");
    }
    let large = "x".repeat(100_000);
    for (address, path) in [(outbound, "/"), (caller.ports.api, "/v1.0/healthz")] {
        let request = http::request(&http::client(), Method::GET, address, "web", path)
            .header("x-large", &large);
        assert_eq!(request.send().await.unwrap().status(), 431);
    }
    for (listener, reason) in [
        ("outbound", "malformed_request"),
        ("outbound", "headers_too_large"),
        ("api", "headers_too_large"),
    ] {
        let labels = [("listener", listener), ("reason", reason)];
        eventually(&format!("{listener} counts {reason}"), SOON, || async {
            let name = "duet_connections_refused_total";
            (metrics::sum(caller.ports.metrics, name, &labels).await >= 1.0).then_some(())
        })
        .await;
    }
    assert!(app.asked().is_empty(), "none of it reached the application: {:?}", app.asked());
    assert_eq!(http::get(outbound, "web", "/").await.status(), 200);
}

#[tokio::test]
async fn an_application_that_is_silent_or_answers_nonsense_is_a_clear_failure() {
    let policy = "apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: odd}
spec:
  targetRefs: [{kind: Service, name: odd}]
  timeouts: {request: 400ms}
  retry: {attempts: 0}
---
apiVersion: v1
kind: Service
metadata: {name: odd}
spec: {ports: [{port: 80, targetPort: http}]}
";
    let control_plane = ControlPlane::start(&[("odd.yaml", policy)]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let odd = tokio::spawn(async move {
        let mut silent = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 512];
            // The first bytes say what is wanted; the sidecar's probe says nothing.
            if let Ok(Ok(length @ 1..)) =
                tokio::time::timeout(Duration::from_millis(200), stream.read(&mut head)).await
                && head[..length].starts_with(b"GET /nonsense")
            {
                stream.write_all(b"\x16\x03 this is no HTTP\r\n\r\n").await.ok();
            } else {
                silent.push(stream);
            }
        }
    });
    let server = Sidecar::ready(&control_plane, Options::service("odd", port)).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let silent = http::get(caller.ports.outbound, "odd", "/silent").await;
    assert_eq!(silent.status(), 504);
    assert!(silent.headers()["proxy-status"].to_str().unwrap().contains("http_response_timeout"));
    let nonsense = http::get(caller.ports.outbound, "odd", "/nonsense").await;
    assert_eq!(nonsense.status(), 502);
    let status = nonsense.headers()["proxy-status"].to_str().unwrap();
    assert!(status.starts_with("duet; error="), "{status}");
    assert!(
        metrics::sum(server.ports.metrics, "duet_requests_total", &[("status", "502")]).await
            >= 1.0
    );
    odd.abort();
}

#[tokio::test]
async fn tokens_that_are_wrong_used_revoked_or_expired_are_refused_by_name() {
    let control_plane = ControlPlane::start(&[]).await;
    let once = control_plane.token("default", "web", &["--single-use"]);
    let with = |instance: &str, token: &str| {
        let options = Options::client("web").instance(instance);
        Options { token: Some(token.to_owned()), ..options }
    };
    let _first = Sidecar::ready(&control_plane, with("first", &once)).await;
    let expired = control_plane.token("default", "web", &["--lifetime", "1s"]);
    let other = ControlPlane::start(&[]).await;
    let foreign = other.token("default", "web", &[]);
    let mut forged = control_plane.token("default", "web", &[]);
    forged.replace_range(forged.len() - 6.., "AAAAAA");
    eventually("the short token expires", SOON, || async {
        let claims = duet_api::token::JoinClaims::read_unverified(&expired).unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        (now.as_secs() > claims.exp + 1).then_some(())
    })
    .await;
    for (instance, token) in
        [("used", &once), ("expired", &expired), ("foreign", &foreign), ("forged", &forged)]
    {
        let sidecar = Sidecar::start(&control_plane, with(instance, token)).await;
        eventually(&format!("the {instance} token is refused"), SOON, || async {
            let log = sidecar.process.log();
            log.contains("no certificate from").then_some(())
        })
        .await;
        assert!(http::is_ok(sidecar.ports.metrics, "/ready").await.is_none(), "{instance}");
        assert!(!sidecar.state.join("svid.pem").exists(), "{instance}");
        let count = metrics::sum(
            sidecar.ports.metrics,
            "duet_identity_requests_total",
            &[("outcome", "failed")],
        );
        assert!(count.await >= 1.0, "{instance}");
    }
    assert!(!control_plane.process.log().contains("panicked"));
}

/// Bytes that look different each time, and are the same in each run.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let starts: [&[u8]; 6] = [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[22, 3, 1],
        b"POST /v1.0/publish/",
        b"\0",
    ];
    let mut bytes = starts[(next() % 6) as usize].to_vec();
    let length = next() % 300;
    bytes.extend((0..length).map(|_| (next() >> 24) as u8));
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn no_byte_from_outside_ends_a_process() {
    let mut control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let mut server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let ports = server.ports;
    let targets = [
        ports.outbound,
        ports.inbound,
        ports.api,
        ports.admin,
        ports.metrics,
        control_plane.grpc,
        control_plane.admin,
    ];
    for address in targets {
        let tasks: Vec<_> = (0..60)
            .map(|seed| {
                tokio::spawn(async move {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    stream.write_all(&noise(seed)).await.ok();
                    stream.shutdown().await.ok();
                    let mut answer = Vec::new();
                    let read = stream.read_to_end(&mut answer);
                    tokio::time::timeout(Duration::from_secs(2), read).await.ok();
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    }
    assert!(server.process.is_running() && control_plane.process.is_running());
    for log in [server.process.log(), control_plane.process.log()] {
        assert!(!log.contains("panicked"), "{log}");
    }
    assert_eq!(http::get(ports.outbound, "web", "/").await.status(), 200);
}
