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
