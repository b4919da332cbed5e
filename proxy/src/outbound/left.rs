//! What is left of a request's body when its answer is there. No other request can come by an HTTP/1 connection before
//! that is through.

use std::time::Duration;

use http::{Response, StatusCode, Version, header, request};
use tokio_util::task::TaskTracker;

use super::call::{Call, CallBody};
use crate::http::body::{Body, Replay, Upload};
use crate::http::leftover;

/// Between looks whether a body is still on its way: doubled from the first to the last.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(100)];

/// A request's body.
#[derive(Debug)]
pub(super) struct Left {
    /// As far as nobody reads it, or nobody any more.
    body: Option<CallBody>,
    /// Of a body that is still on its way.
    going: Option<Replay>,
    /// It may hold up the next request.
    holds_up: bool,
    /// The client sends it once it is told to, which the first read does.
    expects: bool,
}

impl Left {
    pub(super) fn of(head: &request::Parts, body: Upload) -> Self {
        let holds_up = head.version < Version::HTTP_2
            && matches!(&body, Upload::Stream(_))
            && !body.is_empty();
        let expects = holds_up && head.headers.contains_key(header::EXPECT);
        Self { body: Some(body.into()), going: None, holds_up, expects }
    }

    /// For the tries.
    pub(super) fn take(&mut self) -> CallBody {
        self.body.take().unwrap_or(CallBody::None)
    }

    /// Takes back what the tries left of it.
    pub(super) fn back(&mut self, call: &mut Call, answered: bool) {
        match (call.body.take(), call.replay.take()) {
            (Some(body), _) => self.body = Some(body),
            (None, Some(replay)) if answered => {
                self.holds_up = self.holds_up && replay.unread().exact() != Some(0);
                self.going = Some(replay).filter(|_| self.holds_up);
            }
            (None, Some(replay)) => {
                self.expects = false;
                self.body = Some(CallBody::Replay(replay));
            }
            // Only of one that came by HTTP/2.
            (None, None) => self.holds_up = false,
        }
    }

    /// Whether [`Self::settle`] has something to do.
    pub(super) fn holds_up(&self) -> bool {
        self.holds_up
    }

    /// Makes room for the next request, or says in the answer that there can be none.
    pub(super) async fn settle(self, response: &mut Response<Body>, tasks: &TaskTracker) {
        let through = match (self.body, self.going) {
            // The answer is early.
            (_, Some(going)) => {
                let small = leftover::is_small(&going.unread());
                tasks.spawn(outlast(going));
                small
            }
            // Nothing is on its way, and nothing should be.
            (Some(_), None) if self.expects => false,
            (Some(body), None) => leftover::discard(Body::from(body), tasks).await,
            (None, None) => true,
        };
        // A connection that becomes another protocol's has no next request.
        if !through && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            leftover::close(response.headers_mut());
        }
    }
}

/// Reads what whoever gave the answer does not take any more.
async fn outlast(body: Replay) {
    let [mut pause, longest] = LOOK_AGAIN;
    while body.is_shared() {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
    leftover::linger(Body::Replay(body)).await;
}
