//! Open connections to one target.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::{SharedConnector, Target, Transport};
use crate::error::{Failure, Progress};
use crate::http::body::Body;
use crate::http::client::Sender;

/// Idle HTTP/1 connections kept per target.
const MAX_IDLE: usize = 256;
/// Idle connections older than this are not used: the other end may be about to close them.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// Connections to one target, of one worker.
#[derive(Debug)]
pub struct Pool {
    target: Target,
    connector: SharedConnector,
    http1: Mutex<Vec<(http1::SendRequest<Body>, Instant)>>,
    http2: Mutex<Multiplexed>,
}

/// What one failed attempt to connect tells everybody who waited for it.
type Connecting = Shared<BoxFuture<'static, Result<http2::SendRequest<Body>, Arc<Failure>>>>;

#[derive(Default)]
enum Multiplexed {
    #[default]
    None,
    Connecting(Connecting),
    Open(http2::SendRequest<Body>),
}

impl std::fmt::Debug for Multiplexed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Connecting(_) => "Connecting",
            Self::Open(_) => "Open",
        })
    }
}

/// The right to send one request on a connection. Give it to [`Lease::release`] after the response body's end;
/// dropped before, an HTTP/1 connection is closed.
#[derive(Debug)]
pub struct Lease {
    sender: Sender,
    pool: Weak<Pool>,
}

impl Lease {
    /// Sends the request.
    ///
    /// # Errors
    /// With how far the request had come.
    pub async fn send(&mut self, request: Request<Body>) -> Result<Response<Incoming>, Failure> {
        self.sender.send(request).await
    }

    /// Gives an HTTP/1 connection back for the next request.
    pub fn release(self) {
        if let (Sender::Http1(sender), Some(pool)) = (self.sender, self.pool.upgrade())
            && !sender.is_closed()
        {
            let mut idle = pool.http1.lock();
            if idle.len() < MAX_IDLE {
                idle.push((sender, Instant::now()));
            }
        }
    }
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(target: Target, connector: SharedConnector) -> Arc<Self> {
        Arc::new(Self { target, connector, http1: Mutex::default(), http2: Mutex::default() })
    }

    /// Runs what belongs to the pool's connections, such as tunnels.
    #[must_use]
    pub fn tasks(&self) -> &TaskTracker {
        &self.connector.tasks
    }

    /// Where the connections lead.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// A connection, open or made now.
    ///
    /// # Errors
    /// When none can be made within `timeout`: the request is then unprocessed.
    pub async fn lease(
        self: &Arc<Self>,
        transport: Transport,
        timeout: Duration,
    ) -> Result<Lease, Failure> {
        let sender = match transport {
            Transport::Http1 => match self.idle() {
                Some(sender) => Sender::Http1(sender),
                // Boxed, as the rare path, so that the common one's future stays small.
                None => Box::pin(self.connector.open(&self.target, transport, timeout)).await?,
            },
            Transport::Http2 => Sender::Http2(self.multiplexed(timeout).await?),
        };
        Ok(Lease { sender, pool: Arc::downgrade(self) })
    }

    /// The most recently used idle connection: the others can then grow old and go.
    fn idle(&self) -> Option<http1::SendRequest<Body>> {
        let mut idle = self.http1.lock();
        while let Some((sender, since)) = idle.pop() {
            if since.elapsed() > IDLE_TIMEOUT {
                idle.clear();
                return None;
            }
            if !sender.is_closed() {
                return Some(sender);
            }
        }
        None
    }

    async fn multiplexed(
        self: &Arc<Self>,
        timeout: Duration,
    ) -> Result<http2::SendRequest<Body>, Failure> {
        let connecting = {
            let mut state = self.http2.lock();
            match &*state {
                Multiplexed::Open(sender) if !sender.is_closed() => return Ok(sender.clone()),
                Multiplexed::Connecting(connecting) => connecting.clone(),
                Multiplexed::Open(_) | Multiplexed::None => {
                    let connecting = self.connect(timeout);
                    *state = Multiplexed::Connecting(connecting.clone());
                    connecting
                }
            }
        };
        connecting.await.map_err(|failure| Failure {
            kind: failure.kind,
            status: failure.status,
            details: failure.details.clone(),
            progress: Progress::Unprocessed,
        })
    }

    /// Connects in a task of its own, so that a caller that gives up does not end it for the others.
    fn connect(self: &Arc<Self>, timeout: Duration) -> Connecting {
        let pool = Arc::clone(self);
        let task = self.connector.tasks.spawn(async move {
            let opened = pool.connector.open(&pool.target, Transport::Http2, timeout).await;
            let mut state = pool.http2.lock();
            match opened {
                Ok(Sender::Http2(sender)) => {
                    *state = Multiplexed::Open(sender.clone());
                    Ok(sender)
                }
                Ok(Sender::Http1(_)) => Err(Arc::new(lost("asked for HTTP/2, got HTTP/1"))),
                Err(failure) => {
                    *state = Multiplexed::None;
                    Err(Arc::new(failure))
                }
            }
        });
        task.map(|joined| joined.unwrap_or_else(|_gone| Err(Arc::new(lost("shutting down")))))
            .boxed()
            .shared()
    }
}

fn lost(text: &'static str) -> Failure {
    Failure::new(crate::error::ErrorType::ProxyInternalError, text)
}
