use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::time::timeout_at;

use super::*;

const PING: u8 = 6;

/// The pings that come until then, each of them answered.
async fn pings(stream: &mut DuplexStream, until: Instant) -> usize {
    stream.read_exact(&mut [0; 24]).await.unwrap();
    // No settings.
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let mut pings = 0;
    loop {
        let mut head = [0; 9];
        let Ok(read) = timeout_at(until, stream.read_exact(&mut head)).await else {
            return pings;
        };
        read.unwrap();
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        stream.read_exact(&mut payload).await.unwrap();
        if head[3] == PING {
            pings += 1;
            head[4] = 1;
            stream.write_all(&[&head[..], &payload].concat()).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn sidecars_that_owe_an_answer_are_pinged_and_applications_are_not() {
    let hour = Instant::now() + Duration::from_secs(3600);
    for (until, expected) in [(None, 0), (Some(hour), 5)] {
        let (ours, mut theirs) = duplex(1 << 20);
        let mut connection = Multiplexed::start(ours, &TaskTracker::new(), until).await.unwrap();
        let request = Request::post("http://a/").body(Body::Full("x".into())).unwrap();
        let seen = tokio::select! {
            answer = connection.send(request) => panic!("{answer:?}"),
            seen = pings(&mut theirs, Instant::now() + Duration::from_secs(110)) => seen,
        };
        assert_eq!(seen, expected, "{until:?}");
    }
}

/// The next frame's kind, stream and payload.
async fn frame(stream: &mut DuplexStream) -> (u8, u8, Vec<u8>) {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
    stream.read_exact(&mut payload).await.unwrap();
    (head[3], head[8], payload)
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_has_answered_and_takes_no_more_does_not_keep_the_body() {
    let (ours, mut theirs) = duplex(1 << 20);
    let tasks = TaskTracker::new();
    let mut connection = Multiplexed::start(ours, &tasks, None).await.unwrap();
    // More than the window that a stream begins with, piece by piece.
    let (pieces, body) = tokio::sync::mpsc::channel(8);
    for _ in 0..8 {
        pieces.try_send(vec![0; 16_384].into()).unwrap();
    }
    let request = Request::post("http://a/").body(Body::Feed(body)).unwrap();
    let peer = async {
        theirs.read_exact(&mut [0; 24]).await.unwrap();
        theirs.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let mut data = 0;
        while data < 65_535 {
            let (kind, _, payload) = frame(&mut theirs).await;
            data += if kind == 0 { payload.len() } else { 0 };
        }
        // `:status: 200`, and no body.
        theirs.write_all(&[0, 0, 1, 1, 0x5, 0, 0, 0, 1, 0x88]).await.unwrap();
    };
    let (answer, ()) = tokio::join!(connection.send(request), peer);
    let answer = answer.unwrap();
    assert_eq!(answer.status(), 200);
    // It may take the rest, as long as the answer is not over.
    let before = Instant::now() + Duration::from_secs(60);
    assert!(timeout_at(before, frame(&mut theirs)).await.is_err());
    assert!(!pieces.is_closed());
    drop(answer);
    let reset = timeout_at(before + Duration::from_secs(20), frame(&mut theirs)).await;
    assert_eq!(reset.unwrap(), (3, 1, vec![0, 0, 0, 8]), "CANCEL");
    pieces.closed().await;
}
