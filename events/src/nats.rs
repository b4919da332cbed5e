//! A bus on a NATS JetStream cluster: a stream for each topic, a durable pull consumer for each subscription.
//!
//! What JetStream cannot say is kept beside it in one bucket: which subscription is where, and the attempts spent
//! (JetStream counts every hand-out, also those that were nobody's fault). `docs/nats.md` tells what is promised and
//! what JetStream cannot promise.
//!
//! Imports [`crate::bus`] and [`crate::cloudevent`].

mod held;
mod hub;
mod import;
mod later;
mod login;
mod manage;
mod message;
mod metrics;
mod names;
mod patience;
mod payload;
mod publish;
mod record;
mod room;
mod settle;
mod shared;
mod status;
mod stream;
mod subscription;
mod wanted;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use crate::bus::{
    ConsumeError, Consumer, ConsumerBackend, EventBus, PublishError, Published, Settle,
    SubscriptionSpec,
};
use crate::cloudevent::Event;
use hub::{Command, Hub};
pub use login::NatsLogin;
use metrics::NatsMetrics;
pub use payload::payload_warning;
use shared::Shared;
pub use shared::{NatsError, NatsOptions, NatsTls};

/// A bus on a NATS cluster.
#[derive(Debug)]
pub struct NatsBus {
    shared: Arc<Shared>,
    /// Keeps the order of publishes.
    order: tokio::sync::Mutex<()>,
    /// A hub for each subscription that is consumed here. Short, and never held across an await.
    hubs: Arc<Hubs>,
    members: AtomicU64,
}

type Hubs = Mutex<HashMap<String, HubHandle>>;

#[derive(Clone, Debug)]
struct HubHandle {
    commands: mpsc::UnboundedSender<Command>,
    spec: SubscriptionSpec,
    /// Closed once it has given everything back.
    finished: tokio::sync::watch::Receiver<()>,
}

impl NatsBus {
    /// A bus of this name. Returns at once: while no server answers, everything fails as unavailable, and connecting
    /// goes on. Its metrics carry the name as label `bus`.
    ///
    /// # Errors
    /// When the settings cannot be used, or when the registry has a bus of this name.
    pub async fn open(
        name: &str,
        options: NatsOptions,
        registry: &prometheus::Registry,
    ) -> Result<Self, NatsError> {
        let metrics = NatsMetrics::register(registry, name)
            .map_err(|error| NatsError::Settings(format!("metrics of bus {name}: {error}")))?;
        let shared = Arc::new(Shared::connect(name, options, metrics).await?);
        let hubs = Arc::default();
        watch::start(&shared, &hubs);
        Ok(Self { shared, order: tokio::sync::Mutex::default(), hubs, members: AtomicU64::new(1) })
    }

    /// Tries whether a bus can be kept there, and leaves nothing running.
    ///
    /// # Errors
    /// When the settings cannot be used, no server answers within `wait`, or JetStream does not do what a bus needs.
    pub async fn reach(options: &NatsOptions, wait: std::time::Duration) -> Result<(), NatsError> {
        shared::reach(options, wait).await
    }

    /// Waits until there is a connection.
    ///
    /// # Errors
    /// When there is none after `wait`.
    pub async fn connected(&self, wait: std::time::Duration) -> Result<(), NatsError> {
        let mut connects = self.shared.connects.clone();
        let connected = connects.wait_for(|count| *count > 0);
        if tokio::time::timeout(wait, connected).await.is_err() {
            return Err(NatsError::Away(format!("no server answered within {wait:?}")));
        }
        self.shared.connected()
    }

    /// Whether a running hub works by other settings.
    fn differs(&self, spec: &SubscriptionSpec) -> bool {
        let settings = |spec: &SubscriptionSpec| {
            (spec.ordered, spec.once, spec.dead_letter_topic.clone(), spec.idle_expiry)
        };
        self.hubs.lock().get(&spec.name).is_some_and(|hub| settings(&hub.spec) != settings(spec))
    }

    fn tell(&self, subscription: &str, command: Command) {
        if let Some(hub) = self.hubs.lock().get(subscription)
            && hub.commands.send(command).is_err()
        {
            // It ended meanwhile, and has nothing to be told.
        }
    }

    /// The running hub of a subscription, or a new one.
    fn hub(&self, spec: &SubscriptionSpec, topic: stream::Topic) -> HubHandle {
        let mut hubs = self.hubs.lock();
        if let Some(hub) = hubs.get(&spec.name).filter(|hub| !hub.commands.is_closed()) {
            // Other settings of one that exists count from its next start on.
            if hub.spec.topic == spec.topic {
                return hub.clone();
            }
        }
        let ends = hubs.get(&spec.name).filter(|hub| hub.commands.is_closed());
        let ends = ends.map(|hub| hub.finished.clone());
        let (commands, queue) = mpsc::unbounded_channel();
        let hub = Hub::new(Arc::clone(&self.shared), spec.clone(), topic, queue);
        let (running, finished) = tokio::sync::watch::channel(());
        let (name, own) = (spec.name.clone(), commands.downgrade());
        let (all, shared) = (Arc::downgrade(&self.hubs), Arc::clone(&self.shared));
        tokio::spawn(async move {
            if let Some(mut ends) = ends {
                // What that one still gets and gives back must not come behind what this one gets.
                let ended = async { while ends.changed().await.is_ok() {} };
                tokio::time::timeout(manage::GIVE_BACK, ended).await.ok();
            }
            Box::pin(hub.run()).await;
            // Each reader of a stream has a name of its own: without this they would add up.
            if let (Some(all), Some(own)) = (all.upgrade(), own.upgrade()) {
                let mut all = all.lock();
                if all.get(&name).is_some_and(|hub| hub.commands.same_channel(&own)) {
                    all.remove(&name);
                    shared.wanted.lock().leave(&name);
                }
            }
            drop(running);
        });
        let handle = HubHandle { commands, spec: spec.clone(), finished };
        self.shared.wanted.lock().subscribe(spec);
        hubs.insert(spec.name.clone(), handle.clone());
        handle
    }
}

impl EventBus for NatsBus {
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        Box::pin(async move {
            let published = self.shared.publish(&self.order, topic, events).await;
            published.map_err(|error| publish::publish_error(&self.shared.name, topic, &error))
        })
    }

    fn consume(
        &self,
        subscription: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        Box::pin(async move {
            let topic = Box::pin(self.shared.ensure(&subscription)).await;
            let topic = topic.map_err(|error| consume_error(&subscription, &error))?;
            let credit = usize::try_from(subscription.max_in_flight).unwrap_or(usize::MAX);
            let member = self.members.fetch_add(1, Ordering::Relaxed);
            loop {
                // One more than the credit: for the word that it is over.
                let (out, deliveries) = mpsc::channel(credit.saturating_add(1));
                let (joined, answer) = oneshot::channel();
                let hub = self.hub(&subscription, topic.clone());
                let join = Command::Join { member, credit, out, joined };
                // A hub that ends just now does not answer; the next one does.
                if hub.commands.send(join).is_ok() {
                    let backend = Arc::new(HubMember { member, commands: hub.commands });
                    // Before the answer: whoever does not wait for that leaves the hub, too.
                    let consumer = Consumer::new(ReceiverStream::new(deliveries), backend);
                    if answer.await.is_ok() {
                        return Ok(consumer);
                    }
                }
                self.shared.connected().map_err(|error| consume_error(&subscription, &error))?;
            }
        })
    }
}

/// A consumer's way back to its hub.
struct HubMember {
    member: u64,
    commands: mpsc::UnboundedSender<Command>,
}

impl ConsumerBackend for HubMember {
    fn settle(&self, delivery: u64, outcome: Settle) -> bool {
        self.tell(Command::Settle { member: self.member, delivery, outcome })
    }

    fn retire(&self) {
        self.tell(Command::Retire { member: self.member });
    }

    fn close(&self) {
        self.tell(Command::Leave { member: self.member });
    }
}

impl HubMember {
    /// False: the hub is over, and JetStream hands its events out again.
    fn tell(&self, command: Command) -> bool {
        self.commands.send(command).is_ok()
    }
}

fn consume_error(spec: &SubscriptionSpec, error: &NatsError) -> ConsumeError {
    let (subscription, reason) = (spec.name.clone(), error.to_string());
    match error {
        NatsError::Away(_) | NatsError::Closed => {
            ConsumeError::Unavailable { bus: spec.bus.clone(), reason }
        }
        NatsError::Refused(_) | NatsError::TooMany(_) => {
            ConsumeError::Refused { subscription, reason }
        }
        NatsError::Settings(_) | NatsError::Full(_) | NatsError::Failed(_) => {
            ConsumeError::Internal { subscription, reason }
        }
    }
}
