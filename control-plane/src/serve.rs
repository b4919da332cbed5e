//! `duet.v1.Discovery`: one stream a sidecar. The sidecar subscribes to what its application dials; the stream sends
//! each destination once in full and then what changed of it, and nothing when nothing did. Imports
//! [`crate::compile`], [`crate::store`] and below.

mod session;
mod subscription;

use std::sync::Arc;

use duet_api::proto;
use duet_api::proto::discovery_server::Discovery;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::listen;
use crate::revoked::Revoked;
use crate::store::Store;
use crate::telemetry::Metrics;

/// Updates waiting for a slow sidecar; further changes come to one update each when it reads again.
const QUEUE: usize = 64;

/// The service.
#[derive(Debug)]
pub struct DiscoveryService {
    /// What is compiled.
    pub store: Arc<Store>,
    /// Whom sidecars must not let in.
    pub revoked: Revoked,
    /// Counts.
    pub metrics: Metrics,
    /// Runs the streams.
    pub tracker: TaskTracker,
    /// Ends the streams.
    pub stop: CancellationToken,
}

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    type WatchStream = ReceiverStream<Result<proto::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<proto::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let who = listen::identity(&request, session::SERVICE, &self.metrics)?;
        let (updates, stream) = mpsc::channel(QUEUE);
        let of = (Arc::clone(&self.store), self.revoked.clone());
        let session = session::Session::new(who, of, self.metrics.clone(), updates);
        self.tracker.spawn(session.run(request.into_inner(), self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
