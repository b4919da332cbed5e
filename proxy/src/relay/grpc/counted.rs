//! The body of a publish over gRPC: its bytes count against what publishes may hold in memory as they come in, and not only
//! once there is a message of them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::Request;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

use super::super::publish::store::Publishing;

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
}

impl<B> Counted<B> {
    /// As the body of `request`, whose path ends with its method.
    pub(super) fn of(request: Request<B>, publishing: &Arc<Publishing>) -> Request<Self> {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let counts = PUBLISHES.contains(&method);
        let publishing = Arc::clone(publishing);
        request.map(|body| Self { body, publishing, counts, room: None })
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
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else {
            return Poll::Ready(None);
        };
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
                None => this.room = Some(taken),
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
