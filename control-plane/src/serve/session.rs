//! One `Watch` stream.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use duet_api::proto;
use duet_api::proto::destination_update::State;
use duet_api::proto::watch_request::Kind as Ask;
use duet_api::proto::watch_response::Kind as Tell;
use duet_api::spiffe::SpiffeId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::subscription::Subscription;
use crate::compile;
use crate::index::ServiceKey;
use crate::revoked::Revoked;
use crate::store::Store;
use crate::telemetry::{Counted, Metrics};

/// In metrics.
pub(super) const SERVICE: &str = "discovery";
/// Subscriptions of one stream; an application that dials more names than that is not talking to services.
const MAX_SUBSCRIPTIONS: usize = 10_000;
/// Length of an authority that is worth an answer.
const MAX_AUTHORITY_BYTES: usize = 512;
/// Services that one node names.
const MAX_SERVICES: usize = 64;
/// As much of a sidecar's reason as goes to the log.
const MAX_REASON_CHARS: usize = 500;

type Updates = mpsc::Sender<Result<proto::WatchResponse, Status>>;

/// The sidecar is gone.
struct Gone;

pub(super) struct Session {
    who: SpiffeId,
    store: Arc<Store>,
    revoked: Revoked,
    metrics: Metrics,
    updates: Updates,
    /// Grows with each update of this stream.
    version: u64,
    node: Option<NodeState>,
    subscriptions: HashMap<String, Subscription>,
}

struct NodeState {
    instance: String,
    services: BTreeSet<String>,
    sent: Option<proto::Workload>,
    generation: u64,
}

impl Session {
    pub(super) fn new(
        who: SpiffeId,
        (store, revoked): (Arc<Store>, Revoked),
        metrics: Metrics,
        updates: Updates,
    ) -> Self {
        let subscriptions = HashMap::new();
        Self { who, store, revoked, metrics, updates, version: 0, node: None, subscriptions }
    }

    pub(super) async fn run(
        mut self,
        mut requests: Streaming<proto::WatchRequest>,
        stop: CancellationToken,
    ) {
        let _counted = Counted::new(&self.metrics.watches);
        let (mut changes, mut revoked) = (self.store.changes(), self.revoked.changes());
        loop {
            let served = tokio::select! {
                biased;
                () = stop.cancelled() => {
                    let status = Status::unavailable("the control plane is stopping");
                    // Full or closed: the end of the stream says as much.
                    drop(self.updates.try_send(Err(status)));
                    return;
                }
                request = requests.message() => match request {
                    Ok(Some(proto::WatchRequest { kind: Some(ask) })) => self.take(ask).await,
                    // A kind of a newer sidecar.
                    Ok(Some(proto::WatchRequest { kind: None })) => Ok(()),
                    Ok(None) | Err(_) => return,
                },
                changed = changes.changed() => match changed {
                    Ok(()) => self.refresh().await,
                    Err(_) => return,
                },
                changed = revoked.changed() => match changed {
                    Ok(()) => self.send_workload().await,
                    Err(_) => return,
                },
            };
            if served.is_err() {
                return;
            }
        }
    }

    async fn take(&mut self, ask: Ask) -> Result<(), Gone> {
        match ask {
            Ask::Node(node) => match self.check(node) {
                Ok(node) => {
                    self.node = Some(node);
                    self.send_workload().await
                }
                Err(status) => self.fail(status).await,
            },
            _ if self.node.is_none() => {
                let text = "the first request of a watch must be `node`";
                self.fail(Status::failed_precondition(text)).await
            }
            Ask::Subscribe(ask) => self.subscribe(ask.authority).await,
            Ask::Unsubscribe(ask) => {
                if self.subscriptions.remove(&ask.authority).is_some() {
                    self.metrics.subscriptions.dec();
                }
                Ok(())
            }
            Ask::Ack(_) => {
                self.metrics.acks.inc();
                Ok(())
            }
            Ask::Reject(reject) => {
                self.metrics.rejects.inc();
                let reason: String = reject.reason.chars().take(MAX_REASON_CHARS).collect();
                let authority: String =
                    reject.authority.chars().take(MAX_AUTHORITY_BYTES).collect();
                let instance = self.node.as_ref().map(|node| node.instance.as_str());
                let (peer, version) = (&self.who, reject.version);
                tracing::warn!(%peer, instance, authority, version, "update rejected: {reason}");
                Ok(())
            }
        }
    }

    fn check(&self, node: proto::Node) -> Result<NodeState, Status> {
        if node.namespace != self.who.namespace() {
            let (who, namespace) = (&self.who, &node.namespace);
            let text = format!("{who} cannot be a node of namespace {namespace:?}");
            return Err(Status::permission_denied(text));
        }
        if node.services.len() > MAX_SERVICES {
            return Err(Status::invalid_argument(format!("at most {MAX_SERVICES} services")));
        }
        let (instance, version) = (&node.instance, &node.software_version);
        tracing::info!(peer = %self.who, instance, version, "sidecar connected");
        let services = node.services.into_iter().collect();
        Ok(NodeState { instance: node.instance, services, sent: None, generation: 0 })
    }

    async fn subscribe(&mut self, authority: String) -> Result<(), Gone> {
        if authority.len() > MAX_AUTHORITY_BYTES {
            let text = format!("an authority has at most {MAX_AUTHORITY_BYTES} bytes");
            return self.fail(Status::invalid_argument(text)).await;
        }
        let known = self.subscriptions.contains_key(&authority);
        if !known && self.subscriptions.len() >= MAX_SUBSCRIPTIONS {
            self.metrics.refused.with_label_values(&[SERVICE, "too_many_subscriptions"]).inc();
            let text = format!("this sidecar has {MAX_SUBSCRIPTIONS} destinations already");
            let state = Some(State::NotFound(text));
            let update = proto::DestinationUpdate { state, ..Default::default() };
            return self.send_destination(authority, update).await;
        }
        if !known {
            self.metrics.subscriptions.inc();
        }
        // Asked again, it is sent whole again.
        self.subscriptions.insert(authority.clone(), Subscription::new());
        self.bring_up_to_date(authority).await
    }

    /// Looks at everything that a change may have touched.
    async fn refresh(&mut self) -> Result<(), Gone> {
        let own_changed = self.node.as_ref().is_some_and(|node| {
            let own = |name: &String| ServiceKey::new(self.who.namespace(), name);
            self.store.read(|view| {
                view.events_touched_after(node.generation)
                    || node
                        .services
                        .iter()
                        .any(|name| view.touched_after(&own(name), node.generation))
            })
        });
        if own_changed {
            self.send_workload().await?;
        }
        let stale: Vec<String> = self.store.read(|view| {
            let stale = self.subscriptions.iter().filter(|(_, one)| one.is_stale(view));
            stale.map(|(authority, _)| authority.clone()).collect()
        });
        for authority in stale {
            self.bring_up_to_date(authority).await?;
        }
        Ok(())
    }

    async fn bring_up_to_date(&mut self, authority: String) -> Result<(), Gone> {
        let namespace = self.who.namespace();
        let (compiled, generation) = self.store.read(|view| {
            (compile::destination(view.index, namespace, &authority), view.generation)
        });
        let subscription = self.subscriptions.get_mut(&authority);
        match subscription.and_then(|one| one.update(compiled, generation)) {
            Some(update) => self.send_destination(authority, update).await,
            None => Ok(()),
        }
    }

    async fn send_destination(
        &mut self,
        authority: String,
        update: proto::DestinationUpdate,
    ) -> Result<(), Gone> {
        let kind = match &update.state {
            Some(State::Config(_)) => "config",
            Some(State::NotFound(_)) => "not_found",
            None => "endpoints",
        };
        let version = self.next_version();
        let update = proto::DestinationUpdate { authority, version, ..update };
        self.send(kind, Tell::Destination(update)).await
    }

    async fn send_workload(&mut self) -> Result<(), Gone> {
        let Some(node) = &mut self.node else {
            return Ok(());
        };
        let (mut workload, generation) = self.store.read(|view| {
            let (who, instance, services) = (&self.who, &node.instance, &node.services);
            (compile::workload(view.index, who, instance, services), view.generation)
        });
        node.generation = generation;
        workload.revoked = self.revoked.names();
        if node.sent.as_ref() == Some(&workload) {
            return Ok(());
        }
        node.sent = Some(workload.clone());
        let version = self.next_version();
        self.send("workload", Tell::Workload(proto::Workload { version, ..workload })).await
    }

    fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    async fn send(&self, kind: &str, tell: Tell) -> Result<(), Gone> {
        self.metrics.updates.with_label_values(&[kind]).inc();
        let response = proto::WatchResponse { kind: Some(tell) };
        self.updates.send(Ok(response)).await.map_err(|_closed| Gone)
    }

    /// Ends the stream with a reason.
    async fn fail(&self, status: Status) -> Result<(), Gone> {
        tracing::warn!(peer = %self.who, "watch refused: {}", status.message());
        self.metrics.refused.with_label_values(&[SERVICE, "invalid"]).inc();
        drop(self.updates.send(Err(status)).await);
        Err(Gone)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let open = i64::try_from(self.subscriptions.len()).unwrap_or(i64::MAX);
        self.metrics.subscriptions.sub(open);
    }
}
