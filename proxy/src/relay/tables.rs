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
use tokio::task::JoinHandle;
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

/// The relays' tasks, of each name one at a time.
#[derive(Debug, Default)]
struct Tasks {
    all: TaskTracker,
    /// The newest of each name, which may have ended.
    newest: BTreeMap<String, JoinHandle<()>>,
}

impl Tasks {
    /// Starts one, once the one before it has ended: its last words would be about the new one.
    fn start(&mut self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        self.newest.retain(|_, task| !task.is_finished());
        let before = self.newest.remove(name);
        let task = self.all.spawn(async move {
            if let Some(before) = before {
                // One that panicked has ended, too.
                before.await.unwrap_or_default();
            }
            task.await;
        });
        self.newest.insert(name.to_owned(), task);
    }
}

impl Tables {
    /// Runs until phase two of the drain, as the application writes until then; returns when every batch in hand is
    /// settled.
    async fn run(mut self) {
        let mut relays = Tasks::default();
        let mut running = BTreeMap::new();
        let stop = self.drain.outbound.clone();
        loop {
            self.apply(&mut running, &mut relays);
            let changed = tokio::select! {
                changed = self.workload.changed() => changed.is_ok(),
                () = stop.cancelled() => false,
            };
            if !changed {
                break;
            }
        }
        running.values().for_each(|running| running.stop.cancel());
        relays.all.close();
        tokio::select! {
            () = relays.all.wait() => {}
            () = self.drain.force.cancelled() => {}
        }
    }

    fn apply(&mut self, running: &mut BTreeMap<String, Running>, relays: &mut Tasks) {
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
                    relays.start(name, relay.run());
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

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_relay_starts_when_the_one_before_it_has_ended() {
        let ended = Arc::new(Mutex::new(Vec::new()));
        let (open, gate) = oneshot::channel::<()>();
        let mut tasks = Tasks::default();
        let says = |what: &'static str| {
            let ended = Arc::clone(&ended);
            async move { ended.lock().push(what) }
        };
        let first = says("first");
        tasks.start("a", async {
            gate.await.unwrap();
            first.await;
        });
        tasks.start("a", says("second"));
        tasks.start("b", says("other"));
        tasks.newest.remove("b").unwrap().await.unwrap();
        assert_eq!(*ended.lock(), ["other"]);
        open.send(()).unwrap();
        tasks.all.close();
        tasks.all.wait().await;
        assert_eq!(*ended.lock(), ["other", "first", "second"]);
    }
}
