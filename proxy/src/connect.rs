//! Connections to endpoints: dialled, secured, pooled. One [`Connector`] and one set of [`Pool`]s per worker, so
//! that nothing here is contended.
//!
//! Between two sidecars calls are multiplexed over HTTP/2 on mTLS. Applications are reached in plaintext, by
//! HTTP/1 with a pool of idle connections or by HTTP/2 with prior knowledge.

mod mtls;
pub mod pool;

use std::sync::Arc;
use std::time::Duration;

use duet_api::spiffe::SpiffeId;
use prometheus::IntCounter;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::error::{ErrorType, Failure, Progress};
use crate::http::client::{self, Sender};
use crate::http::http1::Connection;
use crate::identity::SvidWatch;
use crate::net;
use crate::telemetry::metrics::CallMetrics;

pub use mtls::sni_port;
pub use pool::Pool;

/// Where a pool's connections lead.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// To dial.
    pub address: std::net::SocketAddr,
    /// Whom to expect there; `None`: plaintext.
    pub identity: Option<SpiffeId>,
    /// Port of the application behind a sidecar.
    pub port: u16,
}

/// HTTP version of a hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// One call at a time.
    Http1,
    /// HTTP/1 for one call that may switch to another protocol.
    Upgrade,
    /// Many calls at once.
    Http2,
}

/// Makes connections for one worker.
#[derive(Debug)]
pub struct Connector {
    mtls: mtls::Mtls,
    tasks: TaskTracker,
    opened_mesh: IntCounter,
    opened_plain: IntCounter,
}

impl Connector {
    /// `svid` gives the newest certificate; connections' tasks run on `tasks`.
    #[must_use]
    pub fn new(svid: SvidWatch, tasks: TaskTracker, metrics: &CallMetrics) -> Self {
        Self {
            mtls: mtls::Mtls::new(svid),
            tasks,
            opened_mesh: metrics.connections.with_label_values(&["mesh"]),
            opened_plain: metrics.connections.with_label_values(&["plaintext"]),
        }
    }

    /// Runs what belongs to connections.
    #[must_use]
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Opens a connection within `timeout`, handshake included.
    async fn open(
        &self,
        pool: &Pool,
        transport: Transport,
        timeout: Duration,
    ) -> Result<Sender, Failure> {
        let target = pool.target();
        let open = async {
            let stream =
                net::dial(target.address).await.map_err(|error| refused(target, &error))?;
            match &target.identity {
                Some(identity) => {
                    self.opened_mesh.inc();
                    let peer = (identity, target.port);
                    let (stream, until) = self.mtls.secure(stream, peer, transport).await?;
                    self.start(stream, transport, Some(until)).await
                }
                None => {
                    self.opened_plain.inc();
                    match transport {
                        Transport::Http1 => {
                            Ok(Sender::Once(Some(Connection::new(stream, &pool.idle))))
                        }
                        Transport::Upgrade | Transport::Http2 => {
                            let watched = match transport {
                                Transport::Http2 => net::watch_writes(&stream),
                                Transport::Http1 | Transport::Upgrade => net::watch(&stream),
                            };
                            watched.map_err(|error| refused(target, &error))?;
                            self.start(stream, transport, None).await
                        }
                    }
                }
            }
        };
        tokio::time::timeout(timeout, open).await.unwrap_or_else(|_elapsed| {
            let text = format!("{} did not accept within {timeout:?}", target.address);
            Err(Failure::new(ErrorType::ConnectionTimeout, text)
                .with_progress(Progress::Unprocessed))
        })
    }

    async fn start<T>(
        &self,
        stream: T,
        transport: Transport,
        until: Option<Instant>,
    ) -> Result<Sender, Failure>
    where
        T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        match transport {
            Transport::Http1 | Transport::Upgrade => client::upgrade(stream, &self.tasks).await,
            Transport::Http2 => client::http2(stream, &self.tasks, until).await,
        }
    }
}

fn refused(target: &Target, error: &std::io::Error) -> Failure {
    let kind = if error.kind() == std::io::ErrorKind::ConnectionRefused {
        ErrorType::ConnectionRefused
    } else if error.kind() == std::io::ErrorKind::TimedOut {
        ErrorType::ConnectionTimeout
    } else {
        ErrorType::DestinationUnavailable
    };
    Failure::new(kind, format!("{}: {error}", target.address)).with_progress(Progress::Unprocessed)
}

/// A connector shared by the pools of a worker.
pub type SharedConnector = Arc<Connector>;
