//! Tests of whole exchanges, against a peer that says what it is told to.

use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// A connection and its other end.
async fn pair(idle: &Arc<Idle>) -> (Connection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    (Connection::new(client, idle), server)
}

fn get() -> Request<Body> {
    Request::get("/a?b").header("host", "x").body(Body::Empty).unwrap()
}

/// Reads until the head's end.
async fn read_head(peer: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(peer.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// Asks once, with this answer; the status, the body, and whether the connection is idle after it.
async fn ask(answer: &'static str) -> (Result<(StatusCode, Bytes), String>, bool) {
    let idle = Arc::new(Idle::default());
    let (connection, mut peer) = pair(&idle).await;
    let serve = async {
        read_head(&mut peer).await;
        peer.write_all(answer.as_bytes()).await.unwrap();
        peer
    };
    let ask = async {
        let response =
            connection.send(get()).await.map_err(|unanswered| unanswered.error.to_string())?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| error.to_string())?;
        Ok((status, body.to_bytes()))
    };
    // The peer stays, so that an idle connection is not one that was closed.
    let (_peer, asked) = tokio::join!(serve, async {
        tokio::time::timeout(Duration::from_secs(5), ask).await.unwrap_or(Err("silence".to_owned()))
    });
    (asked, idle.sweep() == 1)
}

#[tokio::test]
async fn a_connection_is_kept_only_when_it_is_clean() {
    for (answer, body, kept) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", "hi", true),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", "hi", true),
        ("HTTP/1.1 204 No Content\r\n\r\n", "", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", "", false),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\n", "hi", false),
        ("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", "hi", false),
    ] {
        let (asked, idle) = ask(answer).await;
        assert_eq!(asked.unwrap().1, body, "{answer}");
        assert_eq!(idle, kept, "{answer}");
    }
}

#[tokio::test]
async fn a_closed_connection_ends_a_body_only_where_nothing_else_does() {
    let idle = Arc::new(Idle::default());
    for (answer, whole) in [
        ("HTTP/1.1 200 OK\r\n\r\nhi", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi", false),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", false),
    ] {
        let (connection, mut peer) = pair(&idle).await;
        let serve = async {
            read_head(&mut peer).await;
            peer.write_all(answer.as_bytes()).await.unwrap();
            drop(peer);
        };
        let ((), response) = tokio::join!(serve, connection.send(get()));
        let body = response.unwrap().into_body().collect().await;
        assert_eq!(body.is_ok(), whole, "{answer}");
    }
    assert_eq!(idle.sweep(), 0);
}

#[tokio::test]
async fn an_idle_connection_that_was_closed_or_spoke_is_not_used() {
    let idle = Arc::new(Idle::default());
    let (closed, peer) = pair(&idle).await;
    idle.keep(closed);
    drop(peer);
    let (spoke, mut other) = pair(&idle).await;
    idle.keep(spoke);
    other.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), async {
        while idle.sweep() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert!(idle.take().is_none());
}

#[tokio::test]
async fn a_request_says_how_long_its_body_is() {
    let idle = Arc::new(Idle::default());
    for (method, body, expected) in [
        ("GET", Body::Empty, ""),
        ("POST", Body::Empty, "content-length: 0\r\n"),
        ("POST", Body::Full(Bytes::from_static(b"hello")), "content-length: 5\r\n"),
    ] {
        let (connection, mut peer) = pair(&idle).await;
        // What the caller says of the length does not count, only what there is.
        let request = Request::builder().method(method).uri("/a?b").header("host", "x");
        let request = request.header("content-length", "77").header("transfer-encoding", "chunked");
        let request = request.body(body).unwrap();
        let serve = async {
            let head = read_head(&mut peer).await;
            assert_eq!(head, format!("{method} /a?b HTTP/1.1\r\nhost: x\r\n{expected}\r\n"));
            peer.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        };
        let ((), response) = tokio::join!(serve, connection.send(request));
        assert_eq!(response.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn a_large_body_arrives_whole_and_an_early_answer_is_passed_on() {
    let idle = Arc::new(Idle::default());
    let large = Bytes::from(vec![b'x'; 3 << 20]);
    let post = || Request::post("/").body(Body::Full(large.clone())).unwrap();
    let (connection, mut peer) = pair(&idle).await;
    let serve = async {
        read_head(&mut peer).await;
        let mut body = vec![0; 3 << 20];
        peer.read_exact(&mut body).await.unwrap();
        peer.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        body
    };
    let (body, response) = tokio::join!(serve, connection.send(post()));
    assert_eq!(response.unwrap().status(), 200);
    assert!(body == large);

    let (connection, mut peer) = pair(&idle).await;
    let serve = async {
        read_head(&mut peer).await;
        let early = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n";
        peer.write_all(early).await.unwrap();
    };
    let before = idle.sweep();
    // More than the kernel takes before the peer reads.
    let huge = Request::post("/").body(Body::Full(Bytes::from(vec![0; 64 << 20]))).unwrap();
    let ((), response) = tokio::join!(serve, connection.send(huge));
    assert_eq!(response.unwrap().status(), 413);
    assert!(
        idle.sweep() <= before,
        "a connection with half a request on it must not be used again"
    );
}

#[tokio::test]
async fn a_peer_that_is_gone_got_nothing_or_something() {
    let idle = Arc::new(Idle::default());
    let (connection, mut peer) = pair(&idle).await;
    let serve = async {
        read_head(&mut peer).await;
        drop(peer);
    };
    let ((), outcome) = tokio::join!(serve, connection.send(get()));
    assert!(!outcome.unwrap_err().unsent);
}
