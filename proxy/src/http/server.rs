//! Serves one accepted connection, HTTP/1 or HTTP/2, until it ends or the drain tells it to.

use std::convert::Infallible;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::body::Body;

/// Largest request head; more is answered with 431.
pub const MAX_HEADER_BYTES: u32 = 64 * 1024;
/// Most headers in a request; more is answered with 431.
const MAX_HEADERS: usize = 128;
/// A client must send a complete head within this time (slowloris); between requests it may idle this long.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_STREAMS: u32 = 1024;
/// Windows that let one stream use a fast link with some round-trip time.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// HTTP/2 keepalive: a peer that vanished without a word is noticed in half a minute.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs hyper's tasks on a tracker, so that a drain can wait for them.
#[derive(Clone, Debug)]
pub struct Tracked(pub TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// Why a connection ended, for the metric, where the peer sent what is not HTTP (hyper has answered 400 or 431).
#[must_use]
pub fn malformed(error: &hyper::Error) -> Option<&'static str> {
    if error.is_parse_too_large() {
        Some("headers_too_large")
    } else if error.is_parse() {
        Some("malformed_request")
    } else {
        None
    }
}

/// When a connection has to end.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Finish what is in flight, then close.
    pub graceful: CancellationToken,
    /// Close now.
    pub force: CancellationToken,
    /// Runs what HTTP/2 streams need.
    pub tasks: TaskTracker,
}

/// Serves a connection. Errors are the peer's (it left, or spoke nonsense that hyper has answered) and are
/// returned for counting only.
///
/// # Errors
/// When the connection ends in any other way than orderly.
pub async fn serve<T, S>(io: T, http2: bool, service: S, ending: Ending) -> hyper::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Send + 'static,
    S::Future: Send + 'static,
{
    let io = TokioIo::new(io);
    if http2 {
        let connection = hyper::server::conn::http2::Builder::new(Tracked(ending.tasks.clone()))
            .timer(TokioTimer::new())
            .max_header_list_size(MAX_HEADER_BYTES)
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .auto_date_header(false)
            .serve_connection(io, service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            biased;
            end = connection.as_mut() => return end,
            () = ending.force.cancelled() => return Ok(()),
            () = ending.graceful.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        return tokio::select! {
            end = connection => end,
            () = ending.force.cancelled() => Ok(()),
        };
    }
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEADER_BYTES as usize)
        .max_buf_size(MAX_HEADER_BYTES as usize * 2)
        .header_read_timeout(HEADER_TIMEOUT)
        .auto_date_header(false)
        .serve_connection(io, service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        biased;
        end = connection.as_mut() => return end,
        () = ending.force.cancelled() => return Ok(()),
        () = ending.graceful.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        end = connection => end,
        () = ending.force.cancelled() => Ok(()),
    }
}
