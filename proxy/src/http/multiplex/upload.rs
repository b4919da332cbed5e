//! Sending a request's body while its response is awaited, and after it.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::{Body as _, Frame};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::super::body::{Body, BodyError};
use super::super::taken::Taken;

/// Between looks whether a peer that has answered takes more.
const STALLED: Duration = Duration::from_secs(5);

/// A request body on its way out.
pub(super) struct Upload {
    body: Body,
    stream: SendStream<Bytes>,
    /// Told of the first that the connection takes.
    taken: Option<Taken>,
    /// Read, and waiting for the peer to take it; with whether it is the last.
    waiting: Option<(Bytes, bool)>,
    /// Pieces that the peer took.
    passed: u64,
}

impl Upload {
    pub(super) fn new(body: Body, stream: SendStream<Bytes>, taken: Option<Taken>) -> Self {
        Self { body, stream, taken, waiting: None, passed: 0 }
    }

    /// Sends what is left when the response is there; `over` is cancelled once that has ended. A peer that takes nothing
    /// after it will not: one that does not say so either would keep the body, and whoever sends it, for ever.
    pub(super) async fn outlast(mut self, over: CancellationToken) {
        let mut before = None;
        loop {
            let look = async {
                over.cancelled().await;
                sleep(STALLED).await;
            };
            tokio::select! {
                () = poll_fn(|cx| self.poll(cx)) => return,
                () = look => {}
            }
            let now = self.waiting.is_some().then_some(self.passed);
            if now.is_some() && now == before {
                self.stream.send_reset(Reason::CANCEL);
                return;
            }
            before = now;
        }
    }

    /// Ready when there is no more to send, or nobody to send it to: the response says why.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.stream.poll_reset(cx).is_ready() {
            if self.waiting.is_some() && ready!(self.room(cx)).is_err() {
                break;
            }
            let sent = match self.waiting.take() {
                Some((data, last)) => {
                    if let Some(taken) = self.taken.take() {
                        taken.tell();
                    }
                    self.passed += 1;
                    self.stream.send_data(data, last).map(|()| last)
                }
                None => {
                    // Read first, reserve then: room that is reserved for data that never comes is missing to
                    // other streams (hyper's issue 4003).
                    let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
                    self.take(frame)
                }
            };
            if !matches!(sent, Ok(false)) {
                break;
            }
        }
        Poll::Ready(())
    }

    /// Waits until the peer takes data.
    fn room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_bytes)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Err(Reason::CANCEL.into())),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes what the body had to say; tells whether it was the last.
    fn take(&mut self, frame: Option<Result<Frame<Bytes>, BodyError>>) -> Result<bool, h2::Error> {
        let frame = match frame {
            None => return self.stream.send_data(Bytes::new(), true).map(|()| true),
            Some(Err(_broken)) => {
                self.stream.send_reset(Reason::CANCEL);
                return Ok(true);
            }
            Some(Ok(frame)) => frame,
        };
        match frame.into_data() {
            Ok(data) => {
                let last = self.body.is_end_stream();
                if data.is_empty() {
                    return self.stream.send_data(data, last).map(|()| last);
                }
                self.stream.reserve_capacity(1);
                self.waiting = Some((data, last));
                Ok(false)
            }
            Err(frame) => {
                self.stream.reserve_capacity(0);
                // Neither data nor trailers: there is no third kind.
                let trailers = frame.into_trailers().unwrap_or_default();
                self.stream.send_trailers(trailers).map(|()| true)
            }
        }
    }
}
