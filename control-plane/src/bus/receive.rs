//! Memory for publish requests. A message is let in once there is room for it, in what all streams share and in what
//! its peer's identity may take of that, and keeps the room until it is answered: what waits for a log does not grow
//! with the number of streams, and one identity does not keep the others from publishing. A second room is for what the
//! events of a message become when they are decoded.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use duet_api::proto;
use duet_api::proto::event_bus_server::EventBusServer;
use duet_api::publish::EncodedEvents;
use duet_api::spiffe::SpiffeId;
use duet_events::bus::{PublishError, PublishErrorKind};
use http_body::Frame;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::PollSemaphore;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use super::BusService;
use crate::listen::Peer;

/// Largest publish request: a batch of events at the sidecar's own limits fits.
const MAX_MESSAGE_BYTES: usize = 32 << 20;
/// Largest request on a consumer's stream: the declaration of a subscription.
const MAX_CONSUME_BYTES: usize = 512 << 10;
/// Events of one publish request; a sidecar takes no more at once from its application.
pub(super) const MAX_EVENTS: usize = 10_000;
/// Their attributes together: as many as a thousand events can have at most.
const MAX_ATTRIBUTES: usize = 256_000;

/// Bytes of requests that came and were not answered, of all streams together.
const RECEIVED_BYTES: usize = 96 << 20;
/// Those of one identity.
const IDENTITY_BYTES: usize = 48 << 20;
/// What is decoded of them at a time.
const DECODED_BYTES: usize = 128 << 20;
/// What a small request counts for, since it has its own overhead.
const LEAST_BYTES: usize = 2 << 10;
/// A request that has room must come within this.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Compressed or not, and the length.
const PREFIX_BYTES: usize = 5;
const PUBLISH: &str = "/duet.v1.EventBus/Publish";

/// What all streams share.
#[derive(Clone, Debug)]
pub struct Room {
    received: Arc<Semaphore>,
    decoded: Arc<Semaphore>,
    /// Of every identity that publishes at the moment.
    identities: Arc<Mutex<HashMap<SpiffeId, Weak<Semaphore>>>>,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            received: Arc::new(Semaphore::new(RECEIVED_BYTES)),
            decoded: Arc::new(Semaphore::new(DECODED_BYTES)),
            identities: Arc::default(),
        }
    }
}

impl Room {
    fn of(&self, id: &SpiffeId) -> Arc<Semaphore> {
        let mut identities = self.identities.lock();
        if let Some(room) = identities.get(id).and_then(Weak::upgrade) {
            return room;
        }
        identities.retain(|_, room| room.strong_count() > 0);
        let room = Arc::new(Semaphore::new(IDENTITY_BYTES));
        identities.insert(id.clone(), Arc::downgrade(&room));
        room
    }

    /// Decodes the events of a request when there is room. What is returned with them keeps the room.
    pub(super) async fn decode(
        &self,
        events: EncodedEvents,
    ) -> Result<(Vec<proto::Event>, OwnedSemaphorePermit), PublishError> {
        let invalid = |text: String| PublishError::new(PublishErrorKind::Invalid, text);
        let (count, attributes) = (events.len(), events.attributes());
        if count > MAX_EVENTS || attributes > MAX_ATTRIBUTES {
            return Err(invalid(format!(
                "the request has {count} events with {attributes} attributes; it may have \
                 {MAX_EVENTS} with {MAX_ATTRIBUTES}"
            )));
        }
        let bytes = permits(events.decoded_bytes().min(DECODED_BYTES));
        let room = Arc::clone(&self.decoded).acquire_many_owned(bytes).await;
        let room = room.map_err(|_closed| {
            PublishError::new(PublishErrorKind::Unavailable, "the control plane is stopping")
        })?;
        let events = events.decode().map_err(|error| invalid(error.to_string()))?;
        Ok((events, room))
    }
}

/// Of a number of bytes that fits by far.
fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// The room of one request.
#[derive(Debug)]
pub(super) struct Held {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

/// Rooms of the requests of one stream that were let in and not read yet, in their order.
#[derive(Clone, Debug, Default)]
pub(super) struct Admitted(Arc<Mutex<VecDeque<Held>>>);

impl Admitted {
    /// The room of the request that was read just now.
    pub(super) fn next(&self) -> Option<Held> {
        self.0.lock().pop_front()
    }
}

/// The bus service with its bounds on messages.
#[derive(Clone, Debug)]
pub struct BusServer {
    publish: EventBusServer<BusService>,
    consume: EventBusServer<BusService>,
    room: Room,
}

impl BusServer {
    /// Of a service.
    #[must_use]
    pub fn new(service: BusService) -> Self {
        let room = service.room.clone();
        let service = Arc::new(service);
        let server = |bytes| {
            EventBusServer::from_arc(Arc::clone(&service))
                .max_decoding_message_size(bytes)
                .max_encoding_message_size(MAX_MESSAGE_BYTES)
        };
        let (publish, consume) = (server(MAX_MESSAGE_BYTES), server(MAX_CONSUME_BYTES));
        Self { publish, consume, room }
    }
}

impl NamedService for BusServer {
    const NAME: &'static str = EventBusServer::<BusService>::NAME;
}

impl Service<http::Request<Body>> for BusServer {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = <EventBusServer<BusService> as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != PUBLISH {
            return self.consume.call(request);
        }
        // The service refuses a peer without an identity before it reads anything.
        if let Some(id) = request.extensions().get::<Peer>().and_then(|peer| peer.id.as_ref()) {
            let (own, admitted) = (self.room.of(id), Admitted::default());
            request.extensions_mut().insert(admitted.clone());
            let all = Arc::clone(&self.room.received);
            request = request.map(|body| Body::new(Metered::new(body, own, all, admitted)));
        }
        self.publish.call(request)
    }
}

/// The body of a publish stream, which passes a message on once there is room for it.
struct Metered {
    body: Body,
    own: PollSemaphore,
    all: PollSemaphore,
    /// Room of the identity for the next message, while it waits for that which all share.
    half: Option<OwnedSemaphorePermit>,
    admitted: Admitted,
    /// Came and was not passed on.
    chunk: Bytes,
    /// As much of the next message's prefix as was passed on.
    prefix: Vec<u8>,
    /// Bytes of the current message that were not passed on.
    missing: usize,
    /// Runs while the current message is awaited.
    late: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    fn new(body: Body, own: Arc<Semaphore>, all: Arc<Semaphore>, admitted: Admitted) -> Self {
        Self {
            body,
            own: PollSemaphore::new(own),
            all: PollSemaphore::new(all),
            half: None,
            admitted,
            chunk: Bytes::new(),
            prefix: Vec::with_capacity(PREFIX_BYTES),
            missing: 0,
            late: None,
        }
    }

    /// How many bytes of the chunk can be passed on; pending where the first of them have to wait for room.
    fn poll_pass(&mut self, context: &mut Context<'_>) -> Poll<usize> {
        let mut passed = 0;
        while let Some(rest) = self.chunk.get(passed..).filter(|rest| !rest.is_empty()) {
            if self.missing > 0 {
                let more = self.missing.min(rest.len());
                self.missing -= more;
                passed += more;
                continue;
            }
            self.late = None;
            let more = (PREFIX_BYTES - self.prefix.len()).min(rest.len());
            let known = self.prefix.len();
            self.prefix.extend_from_slice(rest.get(..more).unwrap_or_default());
            if let [_compressed, length @ ..] = self.prefix.as_slice()
                && let Ok(length) = <[u8; 4]>::try_from(length)
            {
                let length = u32::from_be_bytes(length) as usize;
                if self.poll_room(context, length).is_pending() {
                    self.prefix.truncate(known);
                    return if passed > 0 { Poll::Ready(passed) } else { Poll::Pending };
                }
                self.prefix.clear();
                self.missing = length;
            }
            passed += more;
        }
        Poll::Ready(passed)
    }

    /// Room for a message of this length. One that is too long is refused by who reads it, and needs no more than others.
    fn poll_room(&mut self, context: &mut Context<'_>, length: usize) -> Poll<()> {
        let bytes = permits(length.clamp(LEAST_BYTES, MAX_MESSAGE_BYTES));
        if self.half.is_none() {
            self.half = ready!(self.own.poll_acquire_many(context, bytes));
        }
        let all = ready!(self.all.poll_acquire_many(context, bytes));
        // Neither is ever closed.
        if let (Some(own), Some(all)) = (self.half.take(), all) {
            self.admitted.0.lock().push_back(Held { _own: own, _all: all });
        }
        Poll::Ready(())
    }

    /// Whether a message has been awaited for too long, while others could use its room.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.missing == 0 {
            return Poll::Pending;
        }
        let late = self.late.get_or_insert_with(|| {
            Box::pin(tokio::time::sleep_until(Instant::now() + ARRIVAL_TIMEOUT))
        });
        late.as_mut().poll(context)
    }
}

impl http_body::Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        while this.chunk.is_empty() {
            let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) else {
                ready!(this.poll_late(context));
                let text = format!("a publish request did not come within {ARRIVAL_TIMEOUT:?}");
                return Poll::Ready(Some(Err(Status::deadline_exceeded(text))));
            };
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(chunk))) => this.chunk = chunk,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                None => return Poll::Ready(None),
            }
        }
        let passed = ready!(this.poll_pass(context));
        Poll::Ready(Some(Ok(Frame::data(this.chunk.split_to(passed)))))
    }

    fn is_end_stream(&self) -> bool {
        self.chunk.is_empty() && self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
