//! The body of a publish over gRPC: its bytes count against what publishes may hold in memory as they come in, and not only
//! once there is a message of them.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::Request;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Sleep, sleep};
use tonic::Status;

use super::super::publish::store::{BODY_TIMEOUT, Publishing};

/// Methods whose one message is published.
const PUBLISHES: [&str; 3] = ["PublishEvent", "BulkPublishEvent", "BulkPublishEventAlpha1"];

/// A request's body. Dropped, as it is when the message was read, it gives the room back.
#[derive(Debug)]
pub(super) struct Counted<B> {
    body: B,
    publishing: Arc<Publishing>,
    counts: bool,
    /// Of what came so far.
    room: Option<OwnedSemaphorePermit>,
    /// When all of it must be there, from its first bytes on.
    until: Option<Pin<Box<Sleep>>>,
}

impl<B> Counted<B> {
    /// As the body of `request`, whose path ends with its method.
    pub(super) fn of(request: Request<B>, publishing: &Arc<Publishing>) -> Request<Self> {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let counts = PUBLISHES.contains(&method);
        let publishing = Arc::clone(publishing);
        request.map(|body| Self { body, publishing, counts, room: None, until: None })
    }
}

impl<B> Counted<B> {
    /// What never ends does not keep its room for ever.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(until) = &mut self.until else { return Poll::Pending };
        ready!(until.as_mut().poll(cx));
        let text = format!("the message did not arrive within {} s", BODY_TIMEOUT.as_secs());
        Poll::Ready(Some(Err(Status::deadline_exceeded(text))))
    }
}

impl<B> HttpBody for Counted<B>
where
    B: HttpBody<Data = Bytes, Error: std::error::Error + Send + Sync + 'static> + Unpin,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            return self.poll_late(cx);
        };
        let Some(frame) = frame else { return Poll::Ready(None) };
        let frame = frame.map_err(|error| Status::from_error(Box::new(error)))?;
        let length = frame.data_ref().map_or(0, Bytes::len);
        let this = &mut *self;
        if this.counts {
            let taken = this.publishing.take_room(length).inspect_err(|problem| {
                // For which topic it is is not known yet.
                this.publishing.count_refused("", "", problem);
            })?;
            match &mut this.room {
                Some(room) => room.merge(taken),
                None => {
                    this.room = Some(taken);
                    this.until = Some(Box::pin(sleep(BODY_TIMEOUT)));
                }
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
