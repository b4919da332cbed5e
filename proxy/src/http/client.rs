//! One open client connection, HTTP/1 or HTTP/2, and what its errors mean for another try.

use http::{Request, Response};
use hyper::client::conn::http1 as hyper_http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::body::Body;
use super::http1::{self, Connection, WireError};
use super::multiplex::{Multiplexed, Unanswered};
use super::server::MAX_HEADER_BYTES;
use crate::error::{ErrorType, Failure, Progress};

/// The sending side of a connection.
#[derive(Debug)]
pub enum Sender {
    /// One request, once.
    Once(Option<Connection>),
    /// One request, which may switch the connection to another protocol.
    Upgrade(hyper_http1::SendRequest<Body>),
    /// Many at once.
    Http2(Multiplexed),
}

impl Sender {
    /// Sends a request on an HTTP/1 connection once it is free, or on an HTTP/2 connection.
    ///
    /// # Errors
    /// With how far the request had come.
    pub async fn send(&mut self, request: Request<Body>) -> Result<Response<Body>, Failure> {
        match self {
            Self::Once(connection) => {
                let Some(connection) = connection.take() else {
                    return Err(lost());
                };
                connection.send(request).await.map_err(|error| broken(&error))
            }
            Self::Upgrade(sender) => {
                // A connection that was idle may just have been closed by its other end.
                sender.ready().await.map_err(|err| unsent(&err))?;
                let sent = sender.try_send_request(request).await;
                sent.map(|response| response.map(Body::Incoming)).map_err(|mut err| {
                    match err.take_message() {
                        Some(_) => unsent(err.error()),
                        None => self::sent(err.error()),
                    }
                })
            }
            Self::Http2(sender) => sender.send(request).await.map_err(|error| reset(&error)),
        }
    }
}

/// Starts HTTP/1 on a stream for one request that may upgrade it.
///
/// # Errors
/// When the connection fails at once.
pub async fn upgrade<T>(io: T, tasks: &TaskTracker) -> Result<Sender, Failure>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = hyper_http1::Builder::new()
        .max_buf_size(MAX_HEADER_BYTES as usize * 2)
        .handshake(TokioIo::new(io))
        .await
        .map_err(|err| unsent(&err))?;
    tasks.spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "client connection ended");
        }
    });
    Ok(Sender::Upgrade(sender))
}

/// Starts HTTP/2 on a stream; see [`Multiplexed::start`].
///
/// # Errors
/// When the connection fails at once.
pub async fn http2<T>(io: T, tasks: &TaskTracker, until: Option<Instant>) -> Result<Sender, Failure>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let started = Multiplexed::start(io, tasks, until).await;
    let failed = |error| reset(&Unanswered { error, unsent: true, stale: false });
    started.map(Sender::Http2).map_err(failed)
}

fn unsent(error: &hyper::Error) -> Failure {
    let details = format!("the connection closed before the request was sent: {}", chain(error));
    Failure::new(ErrorType::ConnectionTerminated, details).with_progress(Progress::Unprocessed)
}

fn sent(error: &hyper::Error) -> Failure {
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

/// A connection was asked for a second request.
fn lost() -> Failure {
    let text = "the connection is in use";
    Failure::new(ErrorType::ProxyInternalError, text).with_progress(Progress::Unprocessed)
}

/// An HTTP/1 connection that broke before the response.
fn broken(unanswered: &http1::Unanswered) -> Failure {
    let http1::Unanswered { error, unsent, stale } = unanswered;
    if *unsent {
        let details = format!("the connection took no request: {error}");
        return Failure::new(ErrorType::ConnectionTerminated, details)
            .with_progress(Progress::Unprocessed);
    }
    let kind = match error {
        WireError::Io(_) | WireError::Closed => ErrorType::ConnectionTerminated,
        WireError::Parse(_) | WireError::Framing(_) => ErrorType::HttpProtocolError,
        WireError::Request => ErrorType::HttpResponseIncomplete,
    };
    let failure = Failure::new(kind, format!("no response: {error}"));
    Failure { stale: *stale, ..failure.with_progress(Progress::Unknown) }
}

/// A stream that ended without a response.
fn reset(unanswered: &Unanswered) -> Failure {
    let Unanswered { error, unsent, stale } = unanswered;
    // REFUSED_STREAM and streams above a GOAWAY's last one were never looked at (RFC 9113 section 8.7).
    let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM)
        || (error.is_go_away()
            && error.is_remote()
            && error.reason() == Some(h2::Reason::NO_ERROR));
    if *unsent || refused {
        let details = format!("the connection took no request: {error}");
        return Failure::new(ErrorType::ConnectionTerminated, details)
            .with_progress(Progress::Unprocessed);
    }
    let details = format!("the stream ended without a response: {error}");
    let failure = Failure::new(ErrorType::ConnectionTerminated, details);
    Failure { stale: *stale, ..failure.with_progress(Progress::Unknown) }
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
