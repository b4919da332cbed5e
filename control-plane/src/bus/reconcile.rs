//! Keeps topics and subscriptions on the buses as the resources declare them. A subscription exists from its
//! declaration on, whether or not anybody consumes. The bus remembers which ones resources declared, so that one whose
//! resource went while no control plane ran is forgotten as well.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use duet_api::resource::{Resource, TopicSpec};
use duet_events::bus::{ConsumeError, SubscriptionSpec, TopicConfig};
use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{BusError, Buses};
use crate::compile;
use crate::index::Index;
use crate::store::Store;

/// How long the bus keeps a subscription, or the settings of a topic, that is no longer declared: a file that somebody is
/// still editing must not cost the events that wait. It begins when no file has errors: after a restart there is no last
/// good state of one that cannot be read.
const UNDECLARED_GRACE: Duration = Duration::from_secs(600);
/// Wait before another try after a bus refused something.
const RETRY: Duration = Duration::from_secs(2);

/// What the resources declare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Declared {
    buses: BTreeSet<String>,
    topics: BTreeMap<String, TopicSpec>,
    subscriptions: BTreeMap<String, SubscriptionSpec>,
}

fn declared(index: &Index) -> Declared {
    let mut declared = Declared::default();
    declared.buses.insert(duet_api::DEFAULT_BUS.to_owned());
    for (_, located) in index.resources() {
        if let Resource::EventBus(bus) = &located.resource {
            declared.buses.insert(bus.metadata.name.clone());
        } else if let Resource::Topic(topic) = &located.resource {
            declared.topics.insert(topic.metadata.name.clone(), topic.spec.clone());
        } else if let Resource::Subscription(resource) = &located.resource
            // Each replica of a broadcast declares its own when it comes.
            && !resource.spec.broadcast
            // What does not convert was refused when its file was read.
            && let Ok(spec) = SubscriptionSpec::try_from(compile::subscription(resource))
        {
            declared.subscriptions.insert(spec.name.clone(), spec);
        }
    }
    declared.topics.retain(|_, topic| declared.buses.contains(&topic.bus));
    declared.subscriptions.retain(|_, spec| declared.buses.contains(&spec.bus));
    declared
}

impl Declared {
    /// Whether something is to be on a bus.
    fn has(&self, kept: &Kept) -> bool {
        match kept {
            Kept::Topic { bus, name } => {
                self.topics.get(name).is_some_and(|topic| topic.bus == *bus)
            }
            Kept::Subscription { bus, name } => {
                self.subscriptions.get(name).is_some_and(|spec| spec.bus == *bus)
            }
        }
    }
}

/// What a bus keeps because a resource declares it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Kept {
    Topic { bus: String, name: String },
    Subscription { bus: String, name: String },
}

impl Kept {
    fn topic(bus: &str, name: &str) -> Self {
        Self::Topic { bus: bus.to_owned(), name: name.to_owned() }
    }

    fn subscription(bus: &str, name: &str) -> Self {
        Self::Subscription { bus: bus.to_owned(), name: name.to_owned() }
    }

    /// The bus, and what people call it.
    fn parts(&self) -> (&str, &'static str, &str) {
        match self {
            Self::Topic { bus, name } => (bus, "topic", name),
            Self::Subscription { bus, name } => (bus, "subscription", name),
        }
    }
}

/// What a bus keeps because resources declared it, as of an opening.
#[derive(Debug)]
struct OnBus {
    opening: Option<u64>,
    kept: Vec<Kept>,
}

/// Names, what is declared of them, and what became of declaring it.
type Outcomes<'w, T> = Vec<(&'w String, &'w T, anyhow::Result<()>)>;

/// What became of bringing one bus to what is declared.
#[derive(Debug)]
struct Brought<'w> {
    /// It is where its resource has it, or waits for a restart.
    there: bool,
    found: anyhow::Result<Option<OnBus>>,
    topics: Outcomes<'w, TopicSpec>,
    subscriptions: Outcomes<'w, SubscriptionSpec>,
}

/// Brings buses to what is declared, and keeps them there.
#[derive(Debug)]
pub struct Reconciler {
    buses: Arc<Buses>,
    store: Arc<Store>,
    done: Declared,
    /// The change up to which the resources were looked at.
    seen: u64,
    /// Everything is as declared.
    settled: bool,
    /// Buses whose own record of what was declared has been read, as of this opening.
    compared: BTreeMap<String, Option<u64>>,
    /// What no resource declares any more and is kept for now, and until when.
    undeclared: HashMap<Kept, Instant>,
}

impl Reconciler {
    /// Declares everything that the resources say, before anybody publishes: a subscription misses nothing that is
    /// published after it was declared.
    pub async fn start(buses: Arc<Buses>, store: Arc<Store>) -> Self {
        let mut reconciler = Self {
            buses,
            store,
            done: Declared::default(),
            seen: 0,
            settled: false,
            compared: BTreeMap::new(),
            undeclared: HashMap::new(),
        };
        reconciler.look().await;
        reconciler
    }

    /// Follows the resources until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.store.changes();
        // A change since the start counts as new.
        changes.mark_changed();
        loop {
            let again = match self.settled {
                true => self.undeclared.values().copied().min(),
                false => Some(Instant::now() + RETRY),
            };
            let again = again.unwrap_or_else(|| Instant::now() + UNDECLARED_GRACE);
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(again) => {}
            }
            self.look().await;
            self.forget_undeclared(Instant::now()).await;
        }
    }

    async fn look(&mut self) {
        let (touched, generation) =
            self.store.read(|view| (view.events_touched_after(self.seen), view.generation));
        if touched || !self.settled {
            let declared = self.store.read(|view| declared(view.index));
            self.settled = self.bring_to(declared).await;
            self.seen = generation;
        }
    }

    /// Returns whether everything is as declared now.
    async fn bring_to(&mut self, wanted: Declared) -> bool {
        self.compared.retain(|bus, _| wanted.buses.contains(bus));
        let topics = self.done.topics.iter().map(|(name, topic)| Kept::topic(&topic.bus, name));
        let subscriptions = self.done.subscriptions.iter();
        let subscriptions = subscriptions.map(|(name, spec)| Kept::subscription(&spec.bus, name));
        let gone: Vec<_> = topics.chain(subscriptions).filter(|kept| !wanted.has(kept)).collect();
        for kept in gone {
            self.undeclare(kept);
        }
        self.undeclared.retain(|kept, _| !wanted.has(kept));
        // At once: one that takes its time to open, or to answer, holds up no other.
        let mut buses = Vec::with_capacity(wanted.buses.len());
        for bus in &wanted.buses {
            buses.push(Box::pin(self.bring(bus, &wanted)));
        }
        let brought = join_all(buses).await;
        let mut settled = true;
        let mut unknown = BTreeSet::new();
        let mut held_back = BTreeMap::new();
        for (bus, brought) in wanted.buses.iter().zip(brought) {
            settled &= brought.there;
            let compared = self.compare(bus, brought.found, &wanted);
            if !succeeded("bus", bus, compared) {
                settled = false;
                unknown.insert(bus.clone());
            }
            settled &= self.note_topics(brought.topics);
            let (done, missed) = self.note_subscriptions(brought.subscriptions);
            settled &= done;
            if !missed.is_empty() {
                held_back.insert(bus.clone(), missed);
            }
        }
        self.buses.hold_back(held_back, &unknown);
        settled
    }

    /// Brings one bus to what is declared.
    async fn bring<'w>(&self, bus: &str, wanted: &'w Declared) -> Brought<'w> {
        let there = match Box::pin(self.buses.follow_backend(bus)).await {
            Ok(there) => there,
            Err(error) => succeeded("bus", bus, Err(error)),
        };
        let found = self.look_at(bus).await;
        // Also if it cannot be opened: what was done counts for the one before.
        let anew = !self.is_compared(bus);
        let mut topics = Vec::new();
        for (name, topic) in wanted.topics.iter().filter(|(_, topic)| topic.bus == bus) {
            if anew || self.done.topics.get(name) != Some(topic) {
                topics.push((name, topic, self.topic(name, topic).await));
            }
        }
        let mut subscriptions = Vec::new();
        for (name, spec) in wanted.subscriptions.iter().filter(|(_, spec)| spec.bus == bus) {
            if anew || self.done.subscriptions.get(name) != Some(spec) {
                subscriptions.push((name, spec, self.subscription(spec).await));
            }
        }
        Brought { there, found, topics, subscriptions }
    }

    /// What a bus keeps for resources, once for each opening: some may have gone while nobody followed them.
    async fn look_at(&self, name: &str) -> anyhow::Result<Option<OnBus>> {
        let bus = self.buses.get(name).await?;
        if self.is_compared(name) {
            return Ok(None);
        }
        let opening = self.buses.opening(name);
        self.buses.moves.adopt(name, &*bus).await?;
        let topics = bus.topics().await?.into_iter();
        let topics = topics.filter(|topic| topic.declared).map(|it| Kept::topic(name, &it.name));
        let subscriptions = bus.subscriptions().await?.into_iter().filter(|it| it.declared);
        let subscriptions = subscriptions.map(|it| Kept::subscription(name, &it.name));
        Ok(Some(OnBus { opening, kept: topics.chain(subscriptions).collect() }))
    }

    /// Takes note of what a bus keeps. Of another one than before, all is forgotten that was done.
    fn compare(
        &mut self,
        name: &str,
        found: anyhow::Result<Option<OnBus>>,
        wanted: &Declared,
    ) -> anyhow::Result<()> {
        if !self.is_compared(name) {
            self.done.topics.retain(|_, topic| topic.bus != name);
            self.done.subscriptions.retain(|_, spec| spec.bus != name);
            self.undeclared.retain(|kept, _| kept.parts().0 != name);
        }
        if let Some(OnBus { opening, kept }) = found? {
            for kept in kept.into_iter().filter(|kept| !wanted.has(kept)) {
                self.undeclare(kept);
            }
            self.compared.insert(name.to_owned(), opening);
        }
        Ok(())
    }

    /// Whether a bus is the one that was compared.
    fn is_compared(&self, name: &str) -> bool {
        self.compared.get(name) == Some(&self.buses.opening(name))
    }

    /// Starts the time that a bus still keeps something for.
    fn undeclare(&mut self, kept: Kept) {
        let (bus, kind, name) = kept.parts();
        let after = match self.store.read(|view| view.is_incomplete()) {
            true => "10 minutes after the files are without errors",
            false => "in 10 minutes",
        };
        tracing::warn!(bus, kind, name, "no longer declared; the bus forgets that {after}");
        match &kept {
            // One of this name may be on another bus by now.
            Kept::Topic { bus, name } => {
                self.done.topics.retain(|is, topic| is != name || topic.bus != *bus);
            }
            Kept::Subscription { bus, name } => {
                self.done.subscriptions.retain(|is, spec| is != name || spec.bus != *bus);
            }
        }
        self.undeclared.insert(kept, Instant::now() + UNDECLARED_GRACE);
    }

    /// Returns whether all are there.
    fn note_topics(&mut self, topics: Outcomes<'_, TopicSpec>) -> bool {
        let mut settled = true;
        for (name, topic, outcome) in topics {
            if succeeded("topic", name, outcome) {
                self.done.topics.insert(name.clone(), topic.clone());
            } else {
                settled = false;
            }
        }
        settled
    }

    /// Returns whether all are there, and the topics of those that may come and would miss what is published.
    fn note_subscriptions(
        &mut self,
        subscriptions: Outcomes<'_, SubscriptionSpec>,
    ) -> (bool, BTreeSet<String>) {
        let mut settled = true;
        let mut missed = BTreeSet::new();
        for (name, spec, outcome) in subscriptions {
            // What the bus will never take must not stop the topic's publishers.
            let comes = outcome.as_ref().is_err_and(may_come);
            if succeeded("subscription", name, outcome) {
                self.done.subscriptions.insert(name.clone(), spec.clone());
            } else {
                settled = false;
            }
            if comes {
                missed.insert(spec.topic.clone());
            }
        }
        (settled, missed)
    }

    async fn topic(&self, name: &str, spec: &TopicSpec) -> anyhow::Result<()> {
        let config = TopicConfig {
            dedup_window: spec.dedup_window,
            retention_age: spec.retention.age,
            retention_bytes: spec.retention.bytes,
            drop_unhandled: spec.retention.drop_unhandled,
            order_by: spec.order_by.clone(),
        };
        Ok(self.buses.get(&spec.bus).await?.ensure_topic(name, config).await?)
    }

    async fn subscription(&self, spec: &SubscriptionSpec) -> anyhow::Result<()> {
        Ok(self.buses.get(&spec.bus).await?.ensure_subscription(spec.clone()).await?)
    }

    async fn forget_undeclared(&mut self, now: Instant) {
        if self.store.read(|view| view.is_incomplete()) {
            let start = now + UNDECLARED_GRACE;
            self.undeclared.values_mut().for_each(|until| *until = start);
            return;
        }
        let over = self.undeclared.extract_if(|_, until| *until <= now);
        let over: Vec<_> = over.collect();
        for (kept, _) in over {
            let (bus, kind, name) = kept.parts();
            if succeeded("forgetting", name, self.forget(&kept).await) {
                tracing::info!(bus, kind, name, "forgotten");
            } else {
                self.undeclared.insert(kept, now + RETRY);
            }
        }
    }

    /// Subscriptions go; topics stay, with the settings of those that nobody declares.
    async fn forget(&self, kept: &Kept) -> anyhow::Result<()> {
        let bus = match self.buses.get(kept.parts().0).await {
            Ok(bus) => bus,
            // It went as well, and is compared again should it come back.
            Err(BusError::Unknown(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match kept {
            Kept::Topic { name, .. } => bus.reset_topic(name).await?,
            Kept::Subscription { name, .. } => bus.remove_subscription(name).await?,
        }
        Ok(())
    }
}

/// Whether another try can do better.
fn may_come(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_none_or(ConsumeError::is_retryable)
}

fn succeeded<E: Into<anyhow::Error>>(what: &str, name: &str, outcome: Result<(), E>) -> bool {
    match outcome {
        Ok(()) => true,
        Err(error) => {
            let error = error.into();
            tracing::error!("{what} {name:?}: {error:#}; trying again");
            false
        }
    }
}

#[cfg(test)]
mod tests;
