//! Whom a sidecar believes: web pages in a browser on its machine nothing, peers not that they are the application's own
//! sidecar.

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

use std::net::SocketAddr;

use bytes::Bytes;
use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use http_body_util::{BodyExt as _, Full};
use reqwest::{Method, RequestBuilder};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const EVIL: &str = "https://evil.example";

/// A service `payments`, and a workload that only calls.
async fn payments() -> (ControlPlane, App, Sidecar, Sidecar) {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("payments").await;
    let server = Sidecar::ready(&control_plane, Options::service("payments", app.port())).await;
    let web = Sidecar::ready(&control_plane, Options::client("web")).await;
    (control_plane, app, server, web)
}

fn ask(method: Method, address: SocketAddr, path: &str) -> RequestBuilder {
    http::client().request(method, format!("http://{address}{path}"))
}

async fn status(request: RequestBuilder) -> u16 {
    request.send().await.unwrap().status().as_u16()
}

async fn refused(sidecar: &Sidecar, listener: &str) -> f64 {
    let labels = [("listener", listener), ("reason", "web_page")];
    metrics::sum(sidecar.ports.metrics, "duet_connections_refused_total", &labels).await
}

#[tokio::test]
async fn a_page_of_another_machine_gets_nothing_from_the_api() {
    let (_control_plane, app, _server, web) = payments().await;
    let paths = [
        (Method::POST, "/v1.0/invoke/payments/method/charge"),
        (Method::GET, "/v1.0/invoke/payments/method/charge"),
        (Method::POST, "/v1.0/publish/default/news"),
        (Method::GET, "/v1.0/subscribe/default/news"),
        (Method::GET, "/v1.0/metadata"),
        (Method::PUT, "/v1.0/metadata/team"),
        (Method::POST, "/v1.0/deliveries/1/extend"),
        (Method::GET, "/v1.0/healthz/outbound"),
        (Method::OPTIONS, "/v1.0/invoke/payments/method/charge"),
        (Method::POST, "/dapr.proto.runtime.v1.Dapr/Shutdown"),
    ];
    let mut times = 0.0;
    for api in [web.ports.api, web.ports.grpc_api] {
        let rebound = format!("evil.example:{}", api.port());
        for (method, path) in &paths {
            for (header, value) in [
                ("origin", EVIL),
                ("origin", "null"),
                ("sec-fetch-site", "cross-site"),
                ("host", rebound.as_str()),
            ] {
                let page = ask(method.clone(), api, path).header("content-type", "text/plain");
                let answer = page.header(header, value).send().await.unwrap();
                assert_eq!(answer.status(), 403, "{method} {path} {header}: {value}");
                assert_eq!(answer.headers()["connection"], "close");
                assert!(answer.text().await.unwrap().contains("ERR_FORBIDDEN"));
                times += 1.0;
            }
        }
    }
    // A page cannot say so across origins; under its own name, pointed here, it can.
    let named = ask(Method::POST, web.ports.api, "/charge").header("dapr-app-id", "payments");
    assert_eq!(status(named.header("host", "evil.example")).await, 403);
    assert_eq!(refused(&web, "api").await, times + 1.0);
    assert!(app.asked().is_empty(), "{:?}", app.asked());
}

#[tokio::test]
async fn everybody_else_uses_the_api_as_before() {
    let (_control_plane, app, _server, web) = payments().await;
    let charge = "/v1.0/invoke/payments/method/charge";
    for (api, grpc) in [(web.ports.api, false), (web.ports.grpc_api, true)] {
        let port = api.port();
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "0.0.0.0", "web.localhost"] {
            let asked = ask(Method::POST, api, charge).header("host", format!("{host}:{port}"));
            assert_eq!(status(asked).await, 200, "{host}");
        }
        for page in ["http://localhost:8080", "http://127.0.0.1:8080", "http://shop.localhost"] {
            let page = ask(Method::POST, api, charge).header("origin", page);
            assert_eq!(status(page.header("sec-fetch-site", "cross-site")).await, 200);
        }
        // An application that passes on what its visitors sent.
        let visitor =
            ask(Method::POST, api, charge).header("origin", "https://shop.example").body("x");
        assert_eq!(status(visitor.header("x-forwarded-for", "192.0.2.1")).await, 200);
        let visitor = ask(Method::POST, api, "/charge").header("sec-fetch-site", "cross-site");
        assert_eq!(status(visitor.header("dapr-app-id", "payments")).await, 200);
        // Any authority over HTTP/2, which browsers do not speak without TLS.
        assert_eq!(http::get_h2(api, "sidecar.example", "/v1.0/metadata").await.status(), 200);
        // No host at all.
        let mut plain = TcpStream::connect(api).await.unwrap();
        plain.write_all(b"GET /v1.0/healthz/outbound HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        plain.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 204"), "{answer} {grpc}");
    }
    assert_eq!(refused(&web, "api").await, 0.0);
    assert_eq!(app.asked().len(), 22);
}

#[tokio::test]
async fn a_page_gets_nothing_from_the_operator_port_and_chooses_no_destination() {
    let (_control_plane, app, _server, web) = payments().await;
    let admin = web.ports.admin;
    let rebound = format!("evil.example:{}", admin.port());
    let mut times = 0.0;
    for (method, path) in
        [(Method::GET, "/config"), (Method::POST, "/drain"), (Method::GET, "/outbox/rejected")]
    {
        for (header, value) in [
            ("origin", EVIL),
            ("origin", "http://localhost:8080"),
            ("sec-fetch-site", "cross-site"),
            ("host", rebound.as_str()),
        ] {
            let page = ask(method.clone(), admin, path).header("duet-operator", "1");
            assert_eq!(status(page.header(header, value)).await, 403, "{path} {header}: {value}");
            times += 1.0;
        }
    }
    assert_eq!(refused(&web, "admin").await, times);
    assert_eq!(http::is_ok(web.ports.metrics, "/ready").await, Some(()), "it does not drain");
    let metrics = ask(Method::GET, web.ports.metrics, "/metrics").header("host", "node-7:15020");
    assert_eq!(status(metrics).await, 200, "everybody may");

    let outbound = web.ports.outbound;
    let call = |host: &str| {
        let call = ask(Method::POST, outbound, "/charge").header("host", host);
        call.header("duet-destination", "payments.default")
    };
    assert_eq!(status(call(&format!("evil.example:{}", outbound.port()))).await, 403);
    assert_eq!(refused(&web, "outbound").await, 1.0);
    assert!(app.asked().is_empty());
    for host in ["pay.example".to_owned(), format!("localhost:{}", outbound.port())] {
        assert_eq!(status(call(&host)).await, 200, "{host}");
    }

    assert_eq!(status(ask(Method::GET, admin, "/config")).await, 200);
    assert_eq!(status(ask(Method::POST, admin, "/drain")).await, 202);
    web.gone().await;
}

#[tokio::test]
async fn a_peer_cannot_pass_a_call_off_as_a_delivery() {
    let (_control_plane, app, server, web) = payments().await;
    let call = http::request(
        &http::client(),
        Method::POST,
        web.ports.outbound,
        "payments",
        "/events/orders",
    );
    let forged = ["duet-delivery", "duet-delivery-attempt", "duet_delivery"];
    let call = forged.iter().fold(call, |call, name| call.header(*name, "1"));
    let call = call.header("x_forwarded_client_cert", "URI=spiffe://duet.local/ns/default/sa/x");
    let event = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","topic":"orders"}"#;
    let call = call.header("content-type", "application/cloudevents+json").body(event);
    assert_eq!(status(call).await, 200);
    let asked = app.asked().pop().unwrap();
    let names: Vec<&str> = asked.headers.keys().map(|name| name.as_str()).collect();
    assert!(!names.iter().any(|name| name.contains("delivery")), "{names:?}");
    assert!(!names.contains(&"x_forwarded_client_cert"), "{names:?}");
    assert!(asked.header("x-forwarded-client-cert").ends_with("/ns/default/sa/web"));

    for path in ["/dapr/subscribe", "/dapr/subscribe/", "/%64apr/Subscribe"] {
        let answer = http::get(web.ports.outbound, "payments", path).await;
        assert_eq!(answer.status(), 403, "{path}");
        let why = answer.headers()["proxy-status"].to_str().unwrap();
        assert!(why.contains("http_request_denied"), "{why}");
    }
    let callback = "/dapr.proto.runtime.v1.AppCallback/OnTopicEvent";
    assert_eq!(grpc(web.ports.outbound, "payments", callback).await, "7", "PERMISSION_DENIED");
    assert_eq!(app.asked().len(), 1);
    let labels = [("direction", "inbound"), ("error", "http_request_denied")];
    eventually("the refusals are counted", SOON, || async {
        let count = metrics::sum(server.ports.metrics, "duet_requests_total", &labels).await;
        (count >= 4.0).then_some(())
    })
    .await;
}

/// The status of a call without a message.
async fn grpc(address: SocketAddr, authority: &str, path: &str) -> String {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    let connection = tokio::spawn(connection);
    let request = hyper::Request::post(format!("http://{authority}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from_static(&[0; 5])))
        .unwrap();
    let (head, body) = sender.send_request(request).await.unwrap().into_parts();
    let trailers = body.collect().await.unwrap().trailers().cloned().unwrap_or_default();
    connection.abort();
    let status = head.headers.get("grpc-status").or_else(|| trailers.get("grpc-status"));
    status.unwrap().to_str().unwrap().to_owned()
}
