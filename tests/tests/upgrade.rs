//! WebSocket and other HTTP/1.1 upgrades through two sidecars.

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

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Reads up to the end of a head.
async fn head(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(text).unwrap()
}

/// Switches protocols where the request asks for `websocket`, and then echoes bytes in capitals.
async fn serve(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut byte = [0];
            if stream.peek(&mut byte).await.unwrap_or(0) == 0 {
                // The sidecar's probe.
                return;
            }
            let request = head(&mut stream).await.to_lowercase();
            if !request.contains("upgrade: websocket") || !request.contains("connection: upgrade") {
                let answer = "HTTP/1.1 426 Upgrade Required\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(answer.as_bytes()).await.unwrap();
                return;
            }
            let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\n\
                          upgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..length].to_ascii_uppercase()).await.unwrap();
            }
        });
    }
}

#[tokio::test]
async fn a_websocket_is_upgraded_end_to_end_and_plain_requests_are_not() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(serve(listener));
    let control_plane = ControlPlane::start(&[]).await;
    let _server = Sidecar::ready(&control_plane, Options::service("chat", port)).await;
    let client = Sidecar::ready(&control_plane, Options::client("caller")).await;

    let mut stream = TcpStream::connect(client.ports.outbound).await.unwrap();
    let request = "GET /ws HTTP/1.1\r\nHost: chat\r\nConnection: keep-alive, Upgrade\r\n\
                   Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let answer = head(&mut stream).await.to_lowercase();
    assert!(answer.starts_with("http/1.1 101"), "{answer}");
    assert!(answer.contains("upgrade: websocket"), "{answer}");
    assert!(answer.contains("sec-websocket-accept: x"), "{answer}");
    for text in ["hello", "again"] {
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut echo = vec![0; text.len()];
        stream.read_exact(&mut echo).await.unwrap();
        assert_eq!(echo, text.to_uppercase().as_bytes());
    }
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "the end travels too");

    let plain = duet_tests::http::get(client.ports.outbound, "chat", "/").await;
    assert_eq!(plain.status(), 426);
    server.abort();
}
