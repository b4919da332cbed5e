//! One open client connection, HTTP/1 or HTTP/2, and what its errors mean for another try.

use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::TaskTracker;

use super::body::Body;
use super::server::{MAX_HEADER_BYTES, Tracked};
use crate::error::{ErrorType, Failure, Progress};

const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The sending side of a connection.
#[derive(Debug)]
pub enum Sender {
    /// One request at a time.
    Http1(http1::SendRequest<Body>),
    /// Many at once.
    Http2(http2::SendRequest<Body>),
}

impl Sender {
    /// Whether the connection is of no more use.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_closed(),
            Self::Http2(sender) => sender.is_closed(),
        }
    }

    /// Sends a request on an HTTP/1 connection once it is free, or on an HTTP/2 connection.
    ///
    /// # Errors
    /// With how far the request had come.
    pub async fn send(&mut self, request: Request<Body>) -> Result<Response<Incoming>, Failure> {
        match self {
            Self::Http1(sender) => {
                // A connection that was idle may just have been closed by its other end.
                sender.ready().await.map_err(|err| unsent(&err))?;
                sender.try_send_request(request).await.map_err(|mut err| match err.take_message() {
                    Some(_) => unsent(err.error()),
                    None => sent(err.error()),
                })
            }
            Self::Http2(sender) => {
                sender.ready().await.map_err(|err| unsent(&err))?;
                sender.try_send_request(request).await.map_err(|mut err| match err.take_message() {
                    Some(_) => unsent(err.error()),
                    None => sent(err.error()),
                })
            }
        }
    }
}

/// Starts HTTP/1 on a stream.
///
/// # Errors
/// When the connection fails at once.
pub async fn http1<T>(io: T, tasks: &TaskTracker) -> Result<Sender, Failure>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEADER_BYTES as usize * 2)
        .handshake(TokioIo::new(io))
        .await
        .map_err(|err| unsent(&err))?;
    tasks.spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "client connection ended");
        }
    });
    Ok(Sender::Http1(sender))
}

/// Starts HTTP/2 on a stream.
///
/// # Errors
/// When the connection fails at once.
pub async fn http2<T>(io: T, tasks: &TaskTracker) -> Result<Sender, Failure>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http2::Builder::new(Tracked(tasks.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .handshake(TokioIo::new(io))
        .await
        .map_err(|err| unsent(&err))?;
    tasks.spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "client connection ended");
        }
    });
    Ok(Sender::Http2(sender))
}

fn unsent(error: &hyper::Error) -> Failure {
    let details = format!("the connection closed before the request was sent: {}", chain(error));
    Failure::new(ErrorType::ConnectionTerminated, details).with_progress(Progress::Unprocessed)
}

fn sent(error: &hyper::Error) -> Failure {
    if let Some(h2) = source::<h2::Error>(error) {
        // REFUSED_STREAM and streams above a GOAWAY's last one were never looked at (RFC 9113 section 8.7).
        let refused = h2.reason() == Some(h2::Reason::REFUSED_STREAM)
            || (h2.is_go_away() && h2.is_remote() && h2.reason() == Some(h2::Reason::NO_ERROR));
        let progress = if refused { Progress::Unprocessed } else { Progress::Unknown };
        let details = format!("the stream was reset: {h2}");
        return Failure::new(ErrorType::ConnectionTerminated, details).with_progress(progress);
    }
    let kind = if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
        ErrorType::ConnectionTerminated
    } else if error.is_parse() {
        ErrorType::HttpProtocolError
    } else {
        ErrorType::HttpResponseIncomplete
    };
    let details = format!("no response: {}", chain(error));
    Failure::new(kind, details).with_progress(Progress::Unknown)
}

fn source<'e, T: std::error::Error + 'static>(
    error: &'e (dyn std::error::Error + 'static),
) -> Option<&'e T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}
