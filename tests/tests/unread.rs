//! Requests that are answered before they are read: what becomes of the caller's HTTP/1 connection.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::net::SocketAddr;

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

const RESOURCES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: deserted}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: moved}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: moved}
spec:
  parentRefs: [{group: '', kind: Service, name: moved, port: 80}]
  rules:
  - filters:
    - {type: RequestRedirect, requestRedirect: {hostname: elsewhere.example, statusCode: 302}}
";

/// Nothing of a body is kept for another try.
const ONCE: &str = "\
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
  retry: {attempts: 0}
";

/// Another try is wanted, and nobody may have one.
const SPENT: &str = "\
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
  retry: {attempts: 1, codes: [413]}
---
apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: web}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  retryConstraint: {budget: {percent: 0}, minRetryRate: {count: 0, interval: 1s}}
";

/// Of a body.
const LARGE: usize = 20 << 20;

async fn connect(address: SocketAddr) -> BufReader<TcpStream> {
    BufReader::new(TcpStream::connect(address).await.unwrap())
}

/// Reads an answer: its head in lower case.
async fn answer(stream: &mut BufReader<TcpStream>) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).await.unwrap() > 0, "no answer: {head:?}");
    }
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.unwrap();
    head
}

async fn ask(stream: &mut BufReader<TcpStream>, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    answer(stream).await
}

fn head(host: &str, path: &str, more: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: {host}\r\n{more}\r\n\r\n")
}

/// Of a request that may be tried again.
fn put(host: &str, path: &str, more: &str) -> String {
    head(host, path, more).replace("POST", "PUT")
}

fn closes(answer: &str) -> bool {
    answer.contains("connection: close")
}

#[tokio::test]
async fn a_refused_call_ends_the_connection_only_when_much_of_it_is_still_to_come() {
    let control_plane = ControlPlane::start(&[("mesh.yaml", RESOURCES)]).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let (outbound, api) = (caller.ports.outbound, caller.ports.api);
    let invoke = "/v1.0/invoke/nobody/method/x";
    let refused = [
        (outbound, "nobody", "/", "502"),
        (outbound, "deserted", "/", "503"),
        (outbound, "moved", "/", "302"),
        (api, "localhost", invoke, "502"),
    ];
    let large = "x".repeat(LARGE);
    for (address, host, path, status) in refused {
        let mut stream = connect(address).await;
        let length = head(host, path, "content-length: 60000") + &large[..60_000];
        let chunks = head(host, path, "transfer-encoding: chunked") + "1\r\nx\r\n0\r\n\r\n";
        for request in [&length, &chunks, &length] {
            let answer = ask(&mut stream, request).await;
            assert!(answer.starts_with(&format!("http/1.1 {status}")), "{answer}");
            assert!(!closes(&answer), "{host}: {answer}");
        }

        // All of it is sent before the answer is read, as simple clients do.
        let request = head(host, path, &format!("content-length: {LARGE}")) + &large;
        let answer = ask(&mut stream, &request).await;
        assert!(answer.starts_with(&format!("http/1.1 {status}")), "{answer}");
        assert!(closes(&answer), "{host}: {answer}");
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "an orderly end");

        // What nobody asked for does not come.
        let mut stream = connect(address).await;
        let request = head(host, path, "content-length: 5\r\nexpect: 100-continue");
        let answer = ask(&mut stream, &request).await;
        assert!(answer.starts_with(&format!("http/1.1 {status}")), "{answer}");
        assert!(closes(&answer), "{host}: {answer}");
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }
}

/// An application that reads the heads of requests; with what it answers, then, before it closes.
async fn app(says: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            tokio::spawn(async move {
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    if stream.read_line(&mut head).await.unwrap_or_default() == 0 {
                        return;
                    }
                }
                // The rest of it is not read before the other end leaves.
                stream.write_all(says.as_bytes()).await.unwrap_or_default();
                if !says.is_empty() {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    port
}

async fn answered_early(resources: &[(&str, &str)]) {
    let control_plane = ControlPlane::start(resources).await;
    let says = "HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let app = app(says).await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app)).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let mut stream = connect(caller.ports.outbound).await;
    let small = ask(&mut stream, &(put("web", "/", "content-length: 1") + "x")).await;
    assert!(small.starts_with("http/1.1 413") && !closes(&small), "{small}");
    // The little that comes after the answer does not end the connection.
    let late = ask(&mut stream, &put("web", "/", "content-length: 10")).await;
    assert!(late.starts_with("http/1.1 413") && !closes(&late), "{late}");
    stream.write_all(b"0123456789").await.unwrap();
    let next = ask(&mut stream, &(put("web", "/", "content-length: 1") + "x")).await;
    assert!(next.starts_with("http/1.1 413") && !closes(&next), "{next}");
    // A client may wait for the answer before it sends more, or may not.
    for sent in [100_000, LARGE] {
        let request = put("web", "/", &format!("content-length: {LARGE}")) + &"x".repeat(sent);
        let large = ask(&mut stream, &request).await;
        assert!(large.starts_with("http/1.1 413") && closes(&large), "{large}");
        stream = connect(caller.ports.outbound).await;
    }
}

#[tokio::test]
async fn an_answer_that_comes_before_much_of_its_request_says_that_the_connection_ends() {
    let with = async |resources| answered_early(&[("web.yaml", resources)]).await;
    tokio::join!(answered_early(&[]), with(ONCE), with(SPENT));
}

async fn broken_off(resources: &[(&str, &str)]) {
    let control_plane = ControlPlane::start(resources).await;
    let app = app("").await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app)).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let mut stream = connect(caller.ports.outbound).await;
    let small = ask(&mut stream, &(head("web", "/", "content-length: 1") + "x")).await;
    assert!(small.starts_with("http/1.1 503") && !closes(&small), "{small}");
    let large = "x".repeat(LARGE);
    let large = head("web", "/", &format!("content-length: {LARGE}")) + &large;
    let large = ask(&mut stream, &large).await;
    assert!(large.starts_with("http/1.1 503") && closes(&large), "{large}");
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "an orderly end");
}

#[tokio::test]
async fn a_call_that_breaks_off_says_whether_the_connection_ends() {
    tokio::join!(broken_off(&[]), broken_off(&[("web.yaml", ONCE)]));
}
