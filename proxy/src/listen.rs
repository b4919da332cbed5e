//! Accepting connections: bounded, and patient with a kernel that is out of file descriptors.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{IntCounter, IntGauge};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::telemetry::metrics::CallMetrics;
use duet_events::sparse::Sparse;

/// Connections that one listener of one worker holds open.
const MAX_CONNECTIONS: usize = 50_000;
/// Wait after the kernel refused to accept (out of file descriptors or memory).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// One listener of one worker.
#[derive(Debug)]
pub struct Acceptor {
    name: &'static str,
    listener: TcpListener,
    permits: Arc<Semaphore>,
    accepted: IntCounter,
    open: IntGauge,
    refused: IntCounter,
    log: Sparse,
}

impl Acceptor {
    /// `name` is the label in metrics: `outbound`, `inbound`.
    #[must_use]
    pub fn new(name: &'static str, listener: TcpListener, metrics: &CallMetrics) -> Self {
        Self {
            name,
            listener,
            permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            accepted: metrics.accepted.with_label_values(&[name]),
            open: metrics.open.with_label_values(&[name]),
            refused: metrics.refused.with_label_values(&[name, "accept_error"]),
            log: Sparse::default(),
        }
    }

    /// Accepts until told to stop; `serve` runs as a task of `tasks` for each connection. A permit is taken
    /// before the connection is, so that a full sidecar leaves connections to the kernel's queue.
    pub async fn run<F>(
        self,
        stop: CancellationToken,
        tasks: TaskTracker,
        serve: impl Fn(TcpStream) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            let accept = async {
                // Never closed.
                let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
                (self.listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = accept => accepted,
            };
            match accepted {
                Ok((stream, _peer)) => {
                    self.accepted.inc();
                    // Only latency suffers where it cannot be set.
                    stream.set_nodelay(true).ok();
                    let open = Open::new(&self.open);
                    let connection = serve(stream);
                    tasks.spawn(async move {
                        connection.await;
                        drop((open, permit));
                    });
                }
                Err(error) => {
                    self.refused.inc();
                    if let Some(left_out) = self.log.pass("") {
                        tracing::warn!(%error, listener = self.name, left_out, "cannot accept");
                    }
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}

/// Counts an open connection for as long as it lives.
#[derive(Debug)]
struct Open(IntGauge);

impl Open {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
