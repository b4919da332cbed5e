//! Open connections to one target.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio_util::task::TaskTracker;

use super::{SharedConnector, Target, Transport};
use crate::error::{Failure, Progress};
use crate::http::client::Sender;
use crate::http::http1::Idle;
use crate::http::multiplex::Multiplexed;

/// Connections to one target, of one worker.
#[derive(Debug)]
pub struct Pool {
    target: Target,
    connector: SharedConnector,
    pub(super) idle: Arc<Idle>,
    http2: Mutex<State>,
}

/// What one failed attempt to connect tells everybody who waited for it.
type Connecting = Shared<BoxFuture<'static, Result<Multiplexed, Arc<Failure>>>>;

#[derive(Default)]
enum State {
    #[default]
    None,
    Connecting(Connecting),
    Open(Multiplexed),
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Connecting(_) => "Connecting",
            Self::Open(_) => "Open",
        })
    }
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(target: Target, connector: SharedConnector) -> Arc<Self> {
        Arc::new(Self { target, connector, idle: Arc::default(), http2: Mutex::default() })
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

    /// A connection for one request, open or made now.
    ///
    /// # Errors
    /// When none can be made within `timeout`: the request is then unprocessed.
    pub async fn sender(
        self: &Arc<Self>,
        transport: Transport,
        timeout: Duration,
    ) -> Result<Sender, Failure> {
        match transport {
            Transport::Http1 => match self.idle.take() {
                Some(connection) => Ok(Sender::Once(Some(connection))),
                // Boxed, as the rare path, so that the common one's future stays small.
                None => Box::pin(self.connector.open(self, transport, timeout)).await,
            },
            Transport::Upgrade => Box::pin(self.connector.open(self, transport, timeout)).await,
            Transport::Http2 => self.multiplexed(timeout).await.map(Sender::Http2),
        }
    }

    /// The same, but of HTTP/1 no connection that is idle.
    ///
    /// # Errors
    /// As [`Self::sender`].
    pub async fn fresh(
        self: &Arc<Self>,
        transport: Transport,
        timeout: Duration,
    ) -> Result<Sender, Failure> {
        match transport {
            Transport::Http1 | Transport::Upgrade => {
                Box::pin(self.connector.open(self, transport, timeout)).await
            }
            Transport::Http2 => self.sender(transport, timeout).await,
        }
    }

    /// Closes idle connections that are old or that the other end has closed; to be called every few seconds.
    pub fn sweep(&self) {
        self.idle.sweep();
    }

    async fn multiplexed(self: &Arc<Self>, timeout: Duration) -> Result<Multiplexed, Failure> {
        let connecting = {
            let mut state = self.http2.lock();
            if let State::Open(sender) = &mut *state {
                if !sender.is_closed() {
                    return Ok(sender.clone());
                }
                *state = State::None;
            }
            if let State::Connecting(connecting) = &*state {
                connecting.clone()
            } else {
                let connecting = self.connect(timeout);
                *state = State::Connecting(connecting.clone());
                connecting
            }
        };
        connecting.await.map_err(|failure| Failure {
            kind: failure.kind,
            status: failure.status,
            details: failure.details.clone(),
            progress: Progress::Unprocessed,
            retry_after: None,
            grpc_status: None,
            stale: false,
        })
    }

    /// Connects in a task of its own, so that a caller that gives up does not end it for the others.
    fn connect(self: &Arc<Self>, timeout: Duration) -> Connecting {
        let pool = Arc::clone(self);
        let task = self.connector.tasks.spawn(async move {
            let opened = pool.connector.open(&pool, Transport::Http2, timeout).await;
            let mut state = pool.http2.lock();
            match opened {
                Ok(Sender::Http2(sender)) => {
                    *state = State::Open(sender.clone());
                    Ok(sender)
                }
                Ok(Sender::Once(_) | Sender::Upgrade(_)) => {
                    Err(Arc::new(lost("asked for HTTP/2, got HTTP/1")))
                }
                Err(failure) => {
                    *state = State::None;
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
