//! The client side of HTTP/1.1 towards applications. A connection belongs to the call that uses it, which reads and
//! writes it itself: hyper's client has a task, two channels and 30 KiB for each connection, which is most of what a
//! sidecar's memory would be (docs/performance.md). Upgrades and HTTP/1.1 over TLS are left to hyper.

mod decode;
mod encode;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response};
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::body::{Body, BodyError};
use decode::{Framing, Piece};
use encode::Upload;

/// Idle connections kept per target.
const MAX_IDLE: usize = 256;
/// Idle connections older than this are not used: the other end may be about to close them.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// Room for a read: what a head takes, up to what a fast stream fills.
const READ_BYTES: std::ops::RangeInclusive<usize> = 2 * 1024..=64 * 1024;

/// What went wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The kernel says so.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The other end closed the connection in the middle of a message.
    #[error("the connection closed before the message was complete")]
    Closed,
    /// What came is not HTTP/1.1.
    #[error("malformed response: {0}")]
    Parse(#[from] httparse::Error),
    /// The message's end cannot be told, or a limit is passed.
    #[error("{0}")]
    Framing(&'static str),
    /// The request's body broke off, or is not as long as it said.
    #[error("the request's body broke off")]
    Request,
}

/// A request that got no response.
#[derive(Debug)]
pub struct Unanswered {
    /// Why.
    pub error: WireError,
    /// Not a byte of the request went out.
    pub unsent: bool,
    /// The connection had carried requests before, and ended without a word: its other end probably closed it while this
    /// one was on its way.
    pub stale: bool,
}

/// Idle connections to one target.
#[derive(Debug, Default)]
pub struct Idle(Mutex<Vec<(Connection, Instant)>>);

/// An open connection that is not in use.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    home: Weak<Idle>,
    used: bool,
}

impl Idle {
    /// The most recently used connection: the others can then grow old and go.
    pub fn take(&self) -> Option<Connection> {
        let mut idle = self.0.lock();
        while let Some((connection, since)) = idle.pop() {
            if since.elapsed() > IDLE_TIMEOUT {
                idle.clear();
                return None;
            }
            if connection.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    /// Closes what is old, or was closed by its other end; tells how many are left.
    pub fn sweep(&self) -> usize {
        let mut idle = self.0.lock();
        idle.retain(|(connection, since)| since.elapsed() < IDLE_TIMEOUT && connection.is_quiet());
        idle.len()
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.0.lock();
        if idle.len() < MAX_IDLE {
            idle.push((Connection { used: true, ..connection }, Instant::now()));
        }
    }
}

impl Connection {
    /// A new connection, which goes to `home` when it is idle.
    #[must_use]
    pub fn new(stream: TcpStream, home: &Arc<Idle>) -> Self {
        Self { stream, home: Arc::downgrade(home), used: false }
    }

    /// Nothing came while nothing was asked: neither a byte nor the end.
    fn is_quiet(&self) -> bool {
        let nothing = self.stream.try_read(&mut [0; 1]);
        nothing.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Sends a request and waits for its response's head. Dropped before, the connection is closed. The connection
    /// goes home when both bodies have ended.
    ///
    /// # Errors
    /// When there is no response.
    pub async fn send(self, request: Request<Body>) -> Result<Response<Body>, Unanswered> {
        let (head, body) = request.into_parts();
        let mut exchange = Exchange {
            upload: Upload::new(&head, body),
            reader: Reader { buffer: BytesMut::new(), room: *READ_BYTES.start() },
            heard: false,
            connection: self,
        };
        match poll_fn(|cx| exchange.head(cx, &head.method)).await {
            Ok(found) => Ok(exchange.answer(found)),
            Err(error) => Err(Unanswered {
                unsent: !exchange.upload.is_begun(),
                stale: exchange.connection.used
                    && !exchange.heard
                    && matches!(error, WireError::Io(_) | WireError::Closed),
                error,
            }),
        }
    }
}

/// A request and its response on their connection.
#[derive(Debug)]
struct Exchange {
    connection: Connection,
    upload: Upload,
    reader: Reader,
    /// Something came.
    heard: bool,
}

impl Exchange {
    fn head(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
    ) -> Poll<Result<decode::Head, WireError>> {
        if let Poll::Ready(Err(error)) = self.upload.poll(&mut self.connection.stream, cx) {
            // The peer may have answered before it closed. Without a byte sent there is nothing to answer.
            if matches!(error, WireError::Request) || !self.upload.is_begun() {
                return Poll::Ready(Err(error));
            }
        }
        loop {
            if ready!(self.reader.fill(&mut self.connection.stream, cx))? == 0 {
                return Poll::Ready(Err(WireError::Closed));
            }
            self.heard = true;
            if let Some(head) = decode::head(&mut self.reader.buffer, method)? {
                return Poll::Ready(Ok(head));
            }
        }
    }

    fn answer(self, head: decode::Head) -> Response<Body> {
        let (parts, ()) = head.response.into_parts();
        if head.framing == Framing::Ended {
            self.end(head.keep_alive);
            return Response::from_parts(parts, Body::Empty);
        }
        let (framing, keep_alive) = (head.framing, head.keep_alive);
        let reply = Reply { exchange: Some(self), framing, keep_alive };
        Response::from_parts(parts, Body::Reply(Box::new(reply)))
    }

    /// The response is through: the connection goes home, unless something is left on it.
    fn end(self, keep_alive: bool) {
        if keep_alive
            && self.upload.is_ended()
            && self.reader.buffer.is_empty()
            && let Some(home) = self.connection.home.upgrade()
        {
            home.keep(self.connection);
        }
    }
}

/// Reads with as much room as the stream fills.
#[derive(Debug)]
struct Reader {
    buffer: BytesMut,
    room: usize,
}

impl Reader {
    /// Reads more; 0 at the end.
    fn fill(
        &mut self,
        stream: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Poll<Result<usize, WireError>> {
        let read = ready!(self.read(stream, cx))?;
        if read == self.room {
            self.room = (self.room * 2).min(*READ_BYTES.end());
        }
        Poll::Ready(Ok(read))
    }

    fn read(
        &mut self,
        stream: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<usize>> {
        let before = self.buffer.len();
        // Zeroing is cheap beside the system call, and keeps this free of unsafe code.
        self.buffer.resize(before + self.room, 0);
        let room = self.buffer.get_mut(before..).unwrap_or_default();
        let mut room = ReadBuf::new(room);
        let outcome = Pin::new(stream).poll_read(cx, &mut room);
        let read = room.filled().len();
        self.buffer.truncate(before + read);
        outcome.map_ok(|()| read)
    }
}

/// A response body on its way in.
#[derive(Debug)]
pub struct Reply {
    exchange: Option<Exchange>,
    framing: Framing,
    keep_alive: bool,
}

impl Reply {
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(exchange) = &mut self.exchange else {
            return Poll::Ready(None);
        };
        // The request may go on while the response comes. If it breaks, the response may still be whole.
        let uploaded = exchange.upload.poll(&mut exchange.connection.stream, cx);
        self.keep_alive &= !matches!(uploaded, Poll::Ready(Err(_)));
        let frame = ready!(exchange.poll_frame(&mut self.framing, cx));
        if self.framing == Framing::Ended
            && let Some(exchange) = self.exchange.take()
        {
            exchange.end(self.keep_alive && !matches!(frame, Some(Err(_))));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.exchange.is_none()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self.framing {
            Framing::Ended => SizeHint::with_exact(0),
            Framing::Length(left) => SizeHint::with_exact(left),
            Framing::Chunked(_) | Framing::Close => SizeHint::default(),
        }
    }
}

impl Exchange {
    /// The next frame; `framing` becomes `Ended` with the last one, and with an error.
    fn poll_frame(
        &mut self,
        framing: &mut Framing,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, WireError>>> {
        loop {
            match self.buffered(framing) {
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(None) if *framing == Framing::Ended => return Poll::Ready(None),
                Ok(None) => {}
                Err(error) => {
                    *framing = Framing::Ended;
                    return Poll::Ready(Some(Err(error)));
                }
            }
            let failed = match ready!(self.reader.fill(&mut self.connection.stream, cx)) {
                Ok(0) if *framing == Framing::Close => None,
                Ok(0) => Some(WireError::Closed),
                Ok(_) => continue,
                Err(error) => Some(error),
            };
            *framing = Framing::Ended;
            return Poll::Ready(failed.map(Err));
        }
    }

    /// The next frame of what was read.
    fn buffered(&mut self, framing: &mut Framing) -> Result<Option<Frame<Bytes>>, WireError> {
        let buffer = &mut self.reader.buffer;
        match framing {
            Framing::Ended => Ok(None),
            _ if buffer.is_empty() => Ok(None),
            Framing::Close => Ok(Some(Frame::data(buffer.split().freeze()))),
            Framing::Length(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                let data = buffer.split_to(take).freeze();
                *left -= take as u64;
                if *left == 0 {
                    *framing = Framing::Ended;
                }
                Ok(Some(Frame::data(data)))
            }
            Framing::Chunked(at) => Ok(match decode::chunk(buffer, at)? {
                None => None,
                Some(Piece::Data(data)) => Some(Frame::data(data)),
                Some(last) => {
                    *framing = Framing::Ended;
                    match last {
                        Piece::Trailers(trailers) => Some(Frame::trailers(trailers)),
                        Piece::End | Piece::Data(_) => None,
                    }
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests;
