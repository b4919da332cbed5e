//! Bodies of a channel, with rooms that are small.

use http_body_util::{BodyExt as _, StreamBody};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::*;

/// A message of so many bytes, with its prefix.
fn message(length: usize) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
    bytes.extend(vec![7; length]);
    bytes
}

struct Fixture {
    chunks: mpsc::Sender<Result<Frame<Bytes>, Status>>,
    body: Pin<Box<Metered>>,
    admitted: Admitted,
}

impl Fixture {
    /// With room for so many bytes of this identity, and of all.
    fn new(own: usize, all: &Arc<Semaphore>) -> Self {
        let (chunks, stream) = mpsc::channel(64);
        let body = Body::new(StreamBody::new(ReceiverStream::new(stream)));
        let admitted = Admitted::default();
        let own = Arc::new(Semaphore::new(own));
        let body = Metered::new(body, own, Arc::clone(all), admitted.clone());
        Self { chunks, body: Box::pin(body), admitted }
    }

    fn send(&self, bytes: &[u8]) {
        self.chunks.try_send(Ok(Frame::data(Bytes::copy_from_slice(bytes)))).unwrap();
    }

    /// All that can be read now.
    async fn read(&mut self) -> Result<Vec<u8>, Status> {
        let mut read = Vec::new();
        loop {
            tokio::select! {
                biased;
                frame = self.body.frame() => match frame {
                    Some(frame) => read.extend(frame?.into_data().unwrap()),
                    None => return Ok(read),
                },
                () = tokio::task::yield_now() => return Ok(read),
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_room_and_what_was_let_in_before_does_not() {
    let all = Arc::new(Semaphore::new(10_000));
    let mut fixture = Fixture::new(10_000, &all);
    let messages = [message(6_000), message(5_000)].concat();
    fixture.send(&messages);
    assert_eq!(fixture.read().await.unwrap(), messages[..6_005]);
    let first = fixture.admitted.next().unwrap();
    assert!(fixture.admitted.next().is_none());
    assert!(fixture.read().await.unwrap().is_empty());
    drop(first);
    assert_eq!(fixture.read().await.unwrap(), messages[6_005..]);
    assert_eq!(all.available_permits(), 5_000);
    drop(fixture.admitted.next().unwrap());
    assert_eq!(all.available_permits(), 10_000);
}

#[tokio::test(start_paused = true)]
async fn messages_are_found_however_they_are_cut() {
    let lengths = [0, 1, 3_000, 0, 70];
    let messages: Vec<u8> = lengths.into_iter().flat_map(message).collect();
    for cut in [1, 2, 3, 7, 100, 5_000] {
        let all = Arc::new(Semaphore::new(100_000));
        let mut fixture = Fixture::new(100_000, &all);
        let mut read = Vec::new();
        for chunk in messages.chunks(cut) {
            fixture.send(chunk);
            read.extend(fixture.read().await.unwrap());
        }
        assert_eq!(read, messages, "cut {cut}");
        let held: Vec<Held> = std::iter::from_fn(|| fixture.admitted.next()).collect();
        assert_eq!(held.len(), lengths.len(), "cut {cut}");
        assert_eq!(all.available_permits(), 100_000 - 3_000 - 4 * LEAST_BYTES);
    }
}

#[tokio::test(start_paused = true)]
async fn all_streams_share_a_room_and_one_that_is_gone_leaves_its_own() {
    let all = Arc::new(Semaphore::new(10_000));
    let (mut one, mut other) = (Fixture::new(10_000, &all), Fixture::new(10_000, &all));
    one.send(&message(9_000)[..100]);
    other.send(&message(4_000));
    assert_eq!(one.read().await.unwrap().len(), 100);
    assert!(other.read().await.unwrap().is_empty());
    drop(one);
    assert_eq!(other.read().await.unwrap(), message(4_000));
}

#[tokio::test(start_paused = true)]
async fn a_message_that_does_not_come_is_given_up() {
    let all = Arc::new(Semaphore::new(10_000));
    let mut fixture = Fixture::new(10_000, &all);
    fixture.send(&message(3_000));
    fixture.read().await.unwrap();
    tokio::time::sleep(ARRIVAL_TIMEOUT * 2).await;
    assert!(fixture.read().await.unwrap().is_empty(), "between messages there is time");
    fixture.send(&message(3_000)[..2_000]);
    fixture.read().await.unwrap();
    tokio::time::sleep(ARRIVAL_TIMEOUT / 2).await;
    fixture.send(&[7]);
    fixture.read().await.unwrap();
    tokio::time::sleep(ARRIVAL_TIMEOUT / 2 + Duration::from_millis(10)).await;
    let status = fixture.read().await.unwrap_err();
    assert_eq!(status.message(), "a publish request did not come within 10s");
}

#[tokio::test]
async fn events_are_decoded_one_request_after_the_other_where_they_are_large() {
    let room = Room::default();
    let events = |count| EncodedEvents::from(vec![proto::Event::default(); count]);
    let (decoded, first) = room.decode(events(MAX_EVENTS)).await.unwrap();
    assert_eq!(decoded.len(), MAX_EVENTS);
    assert!(room.decoded.available_permits() < DECODED_BYTES - 1000 * MAX_EVENTS);
    drop(first);
    assert_eq!(room.decoded.available_permits(), DECODED_BYTES);
    let error = room.decode(events(MAX_EVENTS + 1)).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Invalid);
    let attributes = (0..=MAX_ATTRIBUTES).map(|number| (number.to_string(), String::new()));
    let event = proto::Event { attributes: attributes.collect(), ..proto::Event::default() };
    let error = room.decode(vec![event].into()).await.unwrap_err();
    assert!(error.to_string().contains("256000"), "{error}");
}

#[test]
fn an_identity_has_one_room_as_long_as_it_publishes() {
    let room = Room::default();
    let id = |account| SpiffeId::new("duet.local", "shop", account).unwrap();
    let orders = room.of(&id("orders"));
    assert!(Arc::ptr_eq(&orders, &room.of(&id("orders"))));
    assert!(!Arc::ptr_eq(&orders, &room.of(&id("payments"))));
    drop(room.of(&id("inventory")));
    assert_eq!(room.identities.lock().len(), 2, "who is gone is forgotten");
}
