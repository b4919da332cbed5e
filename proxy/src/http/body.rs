//! The one body type of the call path, so that services and clients stay concrete.

mod upload;

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::http1::{Reply, WireError};
use super::multiplex::Download;

pub use upload::{Replay, Upload};

/// A request or response body on its way through the sidecar.
#[derive(Debug, Default)]
pub enum Body {
    /// Nothing.
    #[default]
    Empty,
    /// One piece, ours.
    Full(Bytes),
    /// Straight from a connection.
    Incoming(Incoming),
    /// A response from a connection that carries many.
    Download(Download),
    /// A response from a connection that carries one at a time.
    Reply(Box<Reply>),
    /// A request body kept for further tries.
    Replay(Replay),
    /// A response body with somebody watching its end.
    Watched(Box<Watched>),
    /// Ours, piece by piece, until the other end is dropped.
    Feed(tokio::sync::mpsc::Receiver<Bytes>),
    /// An answer of a gRPC service of our own.
    Served(tonic::body::Body),
}

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection that it came from failed.
    #[error(transparent)]
    Connection(#[from] hyper::Error),
    /// The stream that it came from failed.
    #[error(transparent)]
    Stream(#[from] h2::Error),
    /// The connection that it came from failed, or what came on it made no sense.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A bound on the exchange ran out.
    #[error("{0}")]
    Timeout(&'static str),
    /// Our own gRPC service failed.
    #[error(transparent)]
    Served(#[from] tonic::Status),
    /// Another try took the body over.
    #[error("the body was taken over by another try")]
    TakenOver,
}

/// Told how a response body ends. Dropped without a call to `end`: the caller left.
pub trait Watch: Send + std::fmt::Debug {
    /// The last frame was seen: its trailers, if any, or why it ended early.
    fn end(&mut self, end: Result<Option<&HeaderMap>, &BodyError>);
}

/// A response body whose end is told to a [`Watch`], bounded in time.
#[derive(Debug)]
pub struct Watched {
    inner: Body,
    watch: Option<Box<dyn Watch>>,
    deadline: Option<Timer>,
    idle: Option<Idle>,
}

/// A bound on silence. The timer is not reset per frame: it fires, looks when the last frame came, and
/// sleeps on.
#[derive(Debug)]
struct Idle {
    limit: Duration,
    last: Instant,
    timer: Timer,
}

/// Fires at a time. The runtime's timer is made at the first wait: most bodies are there when they are asked for.
#[derive(Debug)]
struct Timer {
    due: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    fn at(due: Instant) -> Self {
        Self { due, sleep: None }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let due = self.due;
        self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due))).as_mut().poll(cx)
    }

    fn reset(&mut self, due: Instant) {
        self.due = due;
        if let Some(sleep) = &mut self.sleep {
            sleep.as_mut().reset(due);
        }
    }
}

impl Watched {
    /// Watches `inner` until its end. `deadline` bounds all of it; `idle` is a bound on each silence, and when the first
    /// one began.
    #[must_use]
    pub fn new(
        inner: Body,
        watch: Box<dyn Watch>,
        deadline: Option<Instant>,
        idle: Option<(Duration, Instant)>,
    ) -> Self {
        Self {
            inner,
            watch: Some(watch),
            deadline: deadline.map(Timer::at),
            idle: idle.map(|(limit, last)| Idle { limit, last, timer: Timer::at(last + limit) }),
        }
    }

    fn end(&mut self, end: Result<Option<&HeaderMap>, &BodyError>) {
        if let Some(mut watch) = self.watch.take() {
            watch.end(end);
        }
    }

    fn expired(&mut self, cx: &mut Context<'_>) -> Option<BodyError> {
        if let Some(deadline) = &mut self.deadline
            && deadline.poll(cx).is_ready()
        {
            return Some(BodyError::Timeout(
                "the request timeout ran out during the response body",
            ));
        }
        let idle = self.idle.as_mut()?;
        while idle.timer.poll(cx).is_ready() {
            let due = idle.last + idle.limit;
            if due <= Instant::now() {
                return Some(BodyError::Timeout("the stream was silent for the idle timeout"));
            }
            idle.timer.reset(due);
        }
        None
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) else {
            return match self.expired(cx) {
                Some(error) => {
                    self.end(Err(&error));
                    Poll::Ready(Some(Err(error)))
                }
                None => Poll::Pending,
            };
        };
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    let trailers = trailers.clone();
                    self.end(Ok(Some(&trailers)));
                } else if self.inner.is_end_stream() || self.inner.size_hint().exact() == Some(0) {
                    // Nobody asks for more once the announced length is through.
                    self.end(Ok(None));
                } else if let Some(idle) = &mut self.idle {
                    idle.last = Instant::now();
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                self.end(Err(&error));
                Some(Err(error))
            }
            None => {
                self.end(Ok(None));
                None
            }
        })
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Full(data) => {
                let data = std::mem::take(data);
                *self = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Self::Incoming(body) => {
                Pin::new(body).poll_frame(cx).map(|frame| frame.map(|f| f.map_err(BodyError::from)))
            }
            Self::Download(body) => body.poll(cx),
            Self::Reply(body) => body.poll(cx),
            Self::Replay(body) => body.poll(cx),
            Self::Watched(body) => body.poll(cx),
            Self::Feed(pieces) => pieces.poll_recv(cx).map(|piece| Some(Ok(Frame::data(piece?)))),
            Self::Served(body) => {
                Pin::new(body).poll_frame(cx).map(|frame| frame.map(|f| f.map_err(BodyError::from)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(_) => false,
            Self::Incoming(body) => body.is_end_stream(),
            Self::Download(body) => body.is_end_stream(),
            Self::Reply(body) => body.is_end_stream(),
            Self::Replay(body) => body.is_end_stream(),
            Self::Watched(body) => body.inner.is_end_stream(),
            Self::Feed(_) => false,
            Self::Served(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(data) => SizeHint::with_exact(data.len() as u64),
            Self::Incoming(body) => body.size_hint(),
            Self::Download(body) => body.size_hint(),
            Self::Reply(body) => body.size_hint(),
            Self::Replay(body) => body.size_hint(),
            Self::Watched(body) => body.inner.size_hint(),
            Self::Feed(_) => SizeHint::default(),
            Self::Served(body) => body.size_hint(),
        }
    }
}
