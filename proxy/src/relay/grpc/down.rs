//! What goes down a stream, and waits there until the application reads it. Bounded in bytes as well as in number: an
//! event whose time ran out goes back to the bus, and stays here all the same.

use std::sync::Arc;

use duet_api::dapr::runtime::v1::SubscribeTopicEventsResponseAlpha1;
use duet_api::dapr::runtime::v1::subscribe_topic_events_response_alpha1::SubscribeTopicEventsResponseType as Said;
use futures::stream::{Map, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Bytes of events that wait for the application to read: as many as a bus lets one consumer have in hand. One that is
/// larger waits alone.
const ROOM_BYTES: u32 = 16 << 20;

pub(super) type Message = Result<SubscribeTopicEventsResponseAlpha1, Status>;

/// What the application reads.
pub(super) type Events = Map<ReceiverStream<Waiting>, fn(Waiting) -> Message>;

/// A message, and the room that it takes until it is read.
#[derive(Debug)]
pub(super) struct Waiting {
    message: Message,
    room: Option<Room>,
}

/// Room for one event.
#[derive(Debug)]
pub(super) struct Room(
    #[expect(dead_code, reason = "held until it is dropped")] OwnedSemaphorePermit,
);

/// The upper end.
#[derive(Debug)]
pub(super) struct Down {
    messages: mpsc::Sender<Waiting>,
    room: Arc<Semaphore>,
}

/// Both ends, for so many messages at once.
pub(super) fn new(messages: usize) -> (Down, Events) {
    let (sender, receiver) = mpsc::channel(messages);
    let room = Arc::new(Semaphore::new(ROOM_BYTES as usize));
    let read: fn(Waiting) -> Message = |waiting| {
        drop(waiting.room);
        waiting.message
    };
    (Down { messages: sender, room }, ReceiverStream::new(receiver).map(read))
}

impl Down {
    /// Waits for room for an event of this size; `None` once the application has left.
    pub(super) async fn room(&self, bytes: usize) -> Option<Room> {
        let bytes = u32::try_from(bytes).unwrap_or(ROOM_BYTES).min(ROOM_BYTES);
        Arc::clone(&self.room).acquire_many_owned(bytes).await.ok().map(Room)
    }

    /// Sends something with the room that it takes; false where nobody reads.
    pub(super) fn send(&self, said: Said, room: Option<Room>) -> bool {
        let message =
            SubscribeTopicEventsResponseAlpha1 { subscribe_topic_events_response_type: Some(said) };
        self.messages.try_send(Waiting { message: Ok(message), room }).is_ok()
    }

    /// Ends it with an error, where there is room for that.
    pub(super) fn fail(&self, status: Status) {
        self.messages.try_send(Waiting { message: Err(status), room: None }).ok();
    }

    /// Until the application has left.
    pub(super) async fn closed(&self) {
        self.messages.closed().await;
    }

    /// Nobody waits for room any more.
    pub(super) fn close(&self) {
        self.room.close();
    }
}
