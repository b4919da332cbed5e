//! The client side of HTTP/2, on the `h2` crate itself: hyper's client spawns a task and crosses two channels for
//! each request, which is a sixth of what a call between sidecars costs (docs/performance.md).

mod keepalive;
mod upload;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::{Reason, RecvStream};
use http::header::{CONTENT_LENGTH, HeaderValue};
use http::{Method, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::body::{Body, BodyError};
use super::server::MAX_HEADER_BYTES;
use super::taken::Taken;
use keepalive::KeepAlive;
use upload::Upload;

const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Most that lies in memory of one stream because the peer does not take it.
const SEND_BUFFER: usize = 256 * 1024;
/// Streams that we reset are remembered for a while, so that frames under way are not taken for errors; a
/// deadline can end many at once.
const RESET_STREAMS: usize = 1024;
/// Pieces below this size are joined, up to about this much.
const SMALL: usize = 1024;
const JOINED: usize = 8 * 1024;

/// One connection that carries many requests. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Multiplexed {
    requests: SendRequest<Bytes>,
    shared: Arc<Shared>,
    tasks: TaskTracker,
}

/// What a connection and its streams tell each other.
#[derive(Debug, Default)]
struct Shared {
    closed: AtomicBool,
    /// A response came by it.
    used: AtomicBool,
    streams: AtomicU32,
    /// Something came since the last look.
    active: AtomicBool,
}

/// A request that got no response.
#[derive(Debug)]
pub struct Unanswered {
    /// Why.
    pub error: h2::Error,
    /// The request never went out.
    pub unsent: bool,
    /// The connection had carried requests before, and ended: its other end probably closed it while this one was on its
    /// way.
    pub stale: bool,
}

impl Multiplexed {
    /// Starts HTTP/2 on a stream; the connection runs on `tasks`. With another sidecar it takes no new requests from
    /// `until` on, ends with the last of those it has, and pings.
    ///
    /// # Errors
    /// When the connection fails at once.
    pub async fn start<T>(
        io: T,
        tasks: &TaskTracker,
        until: Option<Instant>,
    ) -> Result<Self, h2::Error>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (requests, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEADER_BYTES)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_reset_streams(RESET_STREAMS)
            .enable_push(false)
            .handshake(io)
            .await?;
        let shared = Arc::new(Shared::default());
        let of = Arc::clone(&shared);
        tasks.spawn(async move {
            let end = run(connection, &of, until).await;
            of.closed.store(true, Ordering::Relaxed);
            if let Err(error) = end {
                tracing::debug!(%error, "client connection ended");
            }
        });
        Ok(Self { requests, shared, tasks: tasks.clone() })
    }

    /// Whether the connection takes no more requests: it failed, its time is over, or the peer said GOAWAY.
    pub fn is_closed(&mut self) -> bool {
        let mut context = Context::from_waker(std::task::Waker::noop());
        self.shared.closed.load(Ordering::Relaxed)
            || matches!(self.requests.poll_ready(&mut context), Poll::Ready(Err(_)))
    }

    /// Sends a request once the peer's limit on streams allows ([`Taken`] tells), and waits for its response's head.
    /// Dropped before, the stream is reset.
    ///
    /// # Errors
    /// When there is no response.
    pub async fn send(&mut self, request: Request<Body>) -> Result<Response<Body>, Unanswered> {
        let unsent = |error| Unanswered { error, unsent: true, stale: false };
        poll_fn(|cx| self.requests.poll_ready(cx)).await.map_err(unsent)?;
        let (mut head, body) = request.into_parts();
        announce(&mut head, &body);
        let taken = head.extensions.remove::<Taken>();
        let is_head = head.method == Method::HEAD;
        let empty = body.is_end_stream();
        let request = Request::from_parts(head, ());
        let (mut response, stream) = self.requests.send_request(request, empty).map_err(unsent)?;
        self.shared.streams.fetch_add(1, Ordering::Relaxed);
        let used = self.shared.used.load(Ordering::Relaxed);
        let mut open = Open { shared: Arc::clone(&self.shared), over: None };
        let answer = if empty {
            drop(stream);
            (&mut response).await
        } else {
            let upload = Upload::new(body, stream, taken);
            self.exchange(&mut response, upload, &mut open).await
        };
        let stale = |error: &h2::Error| used && is_over(error);
        let answer =
            answer.map_err(|error| Unanswered { stale: stale(&error), error, unsent: false })?;
        self.shared.active.store(true, Ordering::Relaxed);
        self.shared.used.store(true, Ordering::Relaxed);
        let (head, stream) = answer.into_parts();
        let rest = if is_head { Some(0) } else { length(&head) };
        Ok(Response::from_parts(head, Body::Download(Download::new(stream, rest, open))))
    }

    /// Sends the body while it waits. What is left of the body when the response comes goes on in a task.
    async fn exchange(
        &self,
        response: &mut ResponseFuture,
        upload: Upload,
        open: &mut Open,
    ) -> Result<Response<RecvStream>, h2::Error> {
        let mut upload = Some(upload);
        let answer = poll_fn(|cx| {
            if let Some(sending) = &mut upload
                && sending.poll(cx).is_ready()
            {
                upload = None;
            }
            Pin::new(&mut *response).poll(cx)
        });
        let answer = answer.await?;
        if let Some(sending) = upload {
            let over = CancellationToken::new();
            open.over = Some(over.clone().drop_guard());
            self.tasks.spawn(sending.outlast(over));
        }
        Ok(answer)
    }
}

/// The connection ended, or its other end will not work on the request any more.
fn is_over(error: &h2::Error) -> bool {
    error.is_io() || (error.is_go_away() && error.is_remote())
}

/// Says how long a body is, where that is known, as the peer may have to pass it on by HTTP/1.
fn announce(head: &mut http::request::Parts, body: &Body) {
    let bodiless = matches!(head.method, Method::GET | Method::HEAD | Method::DELETE);
    if let Some(length) = body.size_hint().exact()
        && (length > 0 || !bodiless)
        && !head.headers.contains_key(CONTENT_LENGTH)
    {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
}

/// The announced length of a response's body.
fn length(head: &http::response::Parts) -> Option<u64> {
    head.headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Runs a connection until it ends, and notices a peer that vanished while it owes an answer.
async fn run<T>(
    mut connection: Connection<T, Bytes>,
    shared: &Shared,
    until: Option<Instant>,
) -> Result<(), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut retire = until.map(|until| Box::pin(tokio::time::sleep_until(until)));
    // Sidecars alone have such a time. gRPC's own servers end a connection when pings come faster than every five
    // minutes (`too_many_pings`), and an application whose work keeps it from answering has not vanished.
    let pings = if until.is_some() { connection.ping_pong() } else { None };
    let mut keepalive = pings.map(KeepAlive::new);
    poll_fn(|cx| {
        if let Poll::Ready(end) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(end);
        }
        if retire.as_mut().is_some_and(|retire| retire.as_mut().poll(cx).is_ready()) {
            shared.closed.store(true, Ordering::Relaxed);
            retire = None;
        }
        let Some(keepalive) = &mut keepalive else {
            return Poll::Pending;
        };
        ready!(keepalive.poll(cx, shared));
        tracing::info!("an HTTP/2 peer does not answer pings: the connection is given up");
        Poll::Ready(Ok(()))
    })
    .await
}

/// Counts an open stream until dropped.
#[derive(Debug)]
struct Open {
    shared: Arc<Shared>,
    /// Tells what is left of the request's body that the response is over.
    over: Option<DropGuard>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A response body on its way in.
#[derive(Debug)]
pub struct Download {
    stream: RecvStream,
    /// Announced and not yet received.
    rest: Option<u64>,
    data_ended: bool,
    /// Told after the data that came before.
    failed: Option<h2::Error>,
    open: Open,
}

impl Download {
    fn new(stream: RecvStream, rest: Option<u64>, open: Open) -> Self {
        let data_ended = stream.is_end_stream();
        Self {
            rest: if data_ended { Some(0) } else { rest },
            stream,
            data_ended,
            failed: None,
            open,
        }
    }

    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(data) = ready!(self.data(cx)) {
            self.open.shared.active.store(true, Ordering::Relaxed);
            // Fails only for a stream that is gone, which the next poll tells.
            self.stream.flow_control().release_capacity(data.len()).ok();
            self.rest = self.rest.map(|rest| rest.saturating_sub(data.len() as u64));
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match self.failed.take() {
            // The peer answered and wants no more of the request (RFC 9113 section 8.1).
            Some(error) if error.reason() == Some(Reason::NO_ERROR) => return Poll::Ready(None),
            Some(error) => return Poll::Ready(Some(Err(error.into()))),
            None => {}
        }
        Poll::Ready(match ready!(self.stream.poll_trailers(cx)) {
            Ok(Some(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Ok(None) => None,
            Err(error) => Some(Err(error.into())),
        })
    }

    /// The data that is there, until its end. Small pieces that came together, such as the messages of a gRPC
    /// stream, go on together: where HTTP/2 cuts data into frames means nothing (RFC 9113 section 6.1).
    fn data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.data_ended {
            return Poll::Ready(None);
        }
        let next = ready!(self.stream.poll_data(cx));
        let Some(first) = self.look(next) else {
            return Poll::Ready(None);
        };
        let mut joined = BytesMut::new();
        while first.len() < SMALL && joined.len() < JOINED && !self.data_ended {
            let Poll::Ready(next) = self.stream.poll_data(cx) else { break };
            let Some(next) = self.look(next) else { break };
            if joined.is_empty() {
                joined.reserve(JOINED);
                joined.extend_from_slice(&first);
            }
            joined.extend_from_slice(&next);
        }
        Poll::Ready(Some(if joined.is_empty() { first } else { joined.freeze() }))
    }

    fn look(&mut self, next: Option<Result<Bytes, h2::Error>>) -> Option<Bytes> {
        if let Some(Ok(data)) = next {
            return Some(data);
        }
        self.data_ended = true;
        if let Some(Err(error)) = next {
            self.failed = Some(error);
        }
        None
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.failed.is_none() && self.stream.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.rest.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

#[cfg(test)]
mod tests;
