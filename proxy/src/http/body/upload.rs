//! Request bodies: as they come in, and kept for further tries.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use parking_lot::Mutex;

use super::BodyError;

/// A request body as it comes in.
#[derive(Debug)]
pub enum Upload {
    /// From the caller's connection.
    Stream(Incoming),
    /// All of it, made here for a caller that speaks another protocol.
    Whole(Bytes),
}

impl From<Incoming> for Upload {
    fn from(body: Incoming) -> Self {
        Self::Stream(body)
    }
}

impl Upload {
    /// There is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Stream(body) => body.is_end_stream(),
            Self::Whole(bytes) => bytes.is_empty(),
        }
    }
}

/// A request body that can be sent again: what was read is kept up to a limit; past it the body streams on and
/// cannot be replayed any more. Clones share the source; the newest one owns it.
#[derive(Debug)]
pub struct Replay {
    shared: Arc<Mutex<Source>>,
    generation: u64,
    position: usize,
}

#[derive(Debug)]
struct Source {
    /// `None` for a body that was whole from the start.
    rest: Option<Incoming>,
    kept: Vec<Kept>,
    kept_bytes: usize,
    limit: usize,
    /// More was read than is kept.
    overflowed: bool,
    ended: bool,
    generation: u64,
}

#[derive(Clone, Debug)]
enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl Replay {
    /// Keeps up to `limit` bytes of `body`.
    #[must_use]
    pub fn new(body: Incoming, limit: usize) -> Self {
        let source = Source {
            rest: Some(body),
            kept: Vec::new(),
            kept_bytes: 0,
            limit,
            overflowed: false,
            ended: false,
            generation: 0,
        };
        Self { shared: Arc::new(Mutex::new(source)), generation: 0, position: 0 }
    }

    /// Of a body that is there already, whatever its size.
    #[must_use]
    pub fn whole(body: Bytes) -> Self {
        let source = Source {
            rest: None,
            kept_bytes: body.len(),
            limit: body.len(),
            kept: vec![Kept::Data(body)],
            overflowed: false,
            ended: true,
            generation: 0,
        };
        Self { shared: Arc::new(Mutex::new(source)), generation: 0, position: 0 }
    }

    /// Whether [`Self::again`] gives one.
    #[must_use]
    pub fn has_all(&self) -> bool {
        !self.shared.lock().overflowed
    }

    /// The same body from its start, for another try; ends the former one. `None` when it is too large.
    #[must_use]
    pub fn again(&self) -> Option<Self> {
        let mut source = self.shared.lock();
        if source.overflowed {
            return None;
        }
        source.generation += 1;
        let generation = source.generation;
        drop(source);
        Some(Self { shared: Arc::clone(&self.shared), generation, position: 0 })
    }

    /// A copy of all of it; `None` while it is still coming, and when it was too large to be kept.
    #[must_use]
    pub fn copy(&self) -> Option<Bytes> {
        let source = self.shared.lock();
        let whole = source.is_read();
        if !whole || source.overflowed {
            return None;
        }
        let mut copy = BytesMut::with_capacity(source.kept_bytes);
        for kept in &source.kept {
            if let Kept::Data(data) = kept {
                copy.extend_from_slice(data);
            }
        }
        Some(copy.freeze())
    }

    /// Whether there are others of the same source.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.shared) > 1
    }

    /// How much of it has not come in.
    #[must_use]
    pub fn unread(&self) -> SizeHint {
        let source = self.shared.lock();
        match &source.rest {
            Some(rest) if !source.ended => rest.size_hint(),
            Some(_) | None => SizeHint::with_exact(0),
        }
    }

    /// A handle that outlives the try that consumes the body.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), generation: self.generation, position: usize::MAX }
    }

    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut source = self.shared.lock();
        if source.generation != self.generation {
            return Poll::Ready(Some(Err(BodyError::TakenOver)));
        }
        if let Some(kept) = source.kept.get(self.position) {
            self.position += 1;
            return Poll::Ready(Some(Ok(match kept.clone() {
                Kept::Data(data) => Frame::data(data),
                Kept::Trailers(trailers) => Frame::trailers(trailers),
            })));
        }
        if source.ended {
            return Poll::Ready(None);
        }
        let Some(rest) = source.rest.as_mut() else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(rest).poll_frame(cx));
        source.keep(frame.as_ref());
        if !source.overflowed {
            self.position = source.kept.len();
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
    }

    pub(super) fn is_end_stream(&self) -> bool {
        let source = self.shared.lock();
        self.position >= source.kept.len() && source.is_read()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let source = self.shared.lock();
        let rest = source.rest.as_ref().map_or(Some(0), |rest| rest.size_hint().exact());
        let Some(rest) = rest else {
            return SizeHint::default();
        };
        let kept = source.kept.iter().skip(self.position).map(|kept| match kept {
            Kept::Data(data) => data.len() as u64,
            Kept::Trailers(_) => 0,
        });
        SizeHint::with_exact(rest + kept.sum::<u64>())
    }
}

impl Source {
    /// Nothing more comes.
    fn is_read(&self) -> bool {
        self.ended || self.rest.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn keep(&mut self, frame: Option<&Result<Frame<Bytes>, hyper::Error>>) {
        match frame {
            None => self.ended = true,
            // A broken request body cannot be replayed.
            Some(Err(_)) => self.overflow(),
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.kept_bytes += data.len();
                    if self.kept_bytes > self.limit {
                        self.overflow();
                    } else if !self.overflowed {
                        self.kept.push(Kept::Data(data.clone()));
                    }
                } else if let (Some(trailers), false) = (frame.trailers_ref(), self.overflowed) {
                    self.kept.push(Kept::Trailers(trailers.clone()));
                }
            }
        }
    }

    fn overflow(&mut self) {
        self.overflowed = true;
        self.kept = Vec::new();
    }
}
