//! The application's own tables that this sidecar relays, as the control plane says: one task each.

use std::collections::BTreeMap;
use std::sync::Arc;

use duet_api::proto::{self, Workload};
use duet_events::Event;
use duet_events::bus::{
    ConsumeError, Consumer, EventBus, PublishError, PublishErrorKind, Published, SubscriptionSpec,
};
use duet_tables::{Relay, SourceMetrics, SourceSpec};
use futures::future::BoxFuture;
use prometheus::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::buses::Buses;
use super::metrics::EventMetrics;
use crate::drain::Drain;

/// Follows the workload's outbox sources until phase two of the drain.
///
/// # Errors
/// When the registry has such metrics already.
pub(super) fn start(
    workload: &watch::Receiver<Option<Arc<Workload>>>,
    buses: &Arc<Buses>,
    (registry, published): (&Registry, &EventMetrics),
    drain: &Drain,
) -> prometheus::Result<()> {
    let tables = Tables {
        workload: workload.clone(),
        buses: Arc::clone(buses),
        metrics: SourceMetrics::register(registry)?,
        published: published.clone(),
        drain: drain.clone(),
    };
    drain.outbound_tasks.spawn(tables.run());
    Ok(())
}

#[derive(Debug)]
struct Tables {
    workload: watch::Receiver<Option<Arc<Workload>>>,
    buses: Arc<Buses>,
    metrics: SourceMetrics,
    published: EventMetrics,
    drain: Drain,
}

struct Running {
    source: proto::OutboxSource,
    stop: CancellationToken,
}

impl Tables {
    /// Runs until phase two of the drain, as the application writes until then; returns when every batch in hand is
    /// settled.
    async fn run(mut self) {
        let relays = TaskTracker::new();
        let mut running = BTreeMap::new();
        let stop = self.drain.outbound.clone();
        loop {
            self.apply(&mut running, &relays);
            let changed = tokio::select! {
                changed = self.workload.changed() => changed.is_ok(),
                () = stop.cancelled() => false,
            };
            if !changed {
                break;
            }
        }
        running.values().for_each(|running| running.stop.cancel());
        relays.close();
        tokio::select! {
            () = relays.wait() => {}
            () = self.drain.force.cancelled() => {}
        }
    }

    fn apply(&mut self, running: &mut BTreeMap<String, Running>, relays: &TaskTracker) {
        let workload = self.workload.borrow_and_update().clone();
        let sources = workload.iter().flat_map(|workload| &workload.outbox_sources);
        let wanted: BTreeMap<&str, &proto::OutboxSource> =
            sources.map(|source| (source.name.as_str(), source)).collect();
        running.retain(|name, running| {
            let same = wanted.get(name.as_str()) == Some(&&running.source);
            if !same {
                running.stop.cancel();
            }
            same
        });
        for (name, source) in wanted {
            if running.contains_key(name) {
                continue;
            }
            let stop = CancellationToken::new();
            match SourceSpec::try_from(source.clone()) {
                Ok(spec) => {
                    let bus = self.counted(&spec.bus);
                    let relay = Relay::new(spec, bus, self.metrics.clone(), stop.clone());
                    relays.spawn(relay.run());
                }
                Err(error) => {
                    tracing::error!(source = name, %error, "an outbox source cannot be used");
                }
            }
            running.insert(name.to_owned(), Running { source: source.clone(), stop });
        }
    }

    /// The bus itself, not the outbox before it: until the bus has a row, the table is the safer place.
    fn counted(&self, name: &str) -> Arc<dyn EventBus> {
        let bus = self.buses.bus(name);
        Arc::new(Counted { name: name.to_owned(), bus, published: self.published.clone() })
    }
}

/// A bus whose publishes count among those of the application.
#[derive(Debug)]
struct Counted {
    name: String,
    bus: Arc<dyn EventBus>,
    published: EventMetrics,
}

impl EventBus for Counted {
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        Box::pin(async move {
            let published = self.bus.publish(topic, events).await;
            let outcome = match &published {
                Ok(_) => "bus",
                Err(error) => refusal(error.kind),
            };
            self.published.published(&self.name, topic, outcome);
            published
        })
    }

    fn consume(
        &self,
        subscription: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        self.bus.consume(subscription)
    }
}

/// The metric's word for a refusal, as for other publishes.
fn refusal(kind: PublishErrorKind) -> &'static str {
    match kind {
        PublishErrorKind::UnknownBus | PublishErrorKind::UnknownTopic => "not_found",
        PublishErrorKind::Invalid => "invalid",
        PublishErrorKind::Denied => "denied",
        PublishErrorKind::Full => "full",
        PublishErrorKind::Unavailable => "unavailable",
        PublishErrorKind::Internal => "failed",
    }
}
