//! What whoever serves a bus can do with it, beyond publishing and consuming.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::BoxFuture;

use super::{ConsumeError, EventBus, Start, SubscriptionSpec, TopicConfig};
use crate::cloudevent::Event;

/// A copy of a bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// The one file in its folder, on which the bus can be opened.
    pub file: PathBuf,
    /// Events that are not in it, since they cannot be read any more where the bus is.
    pub missing_events: u64,
}

/// A bus as its server and its operator see it. The same for every backend; `duet events` works on this.
pub trait ManagedBus: EventBus {
    /// Creates the topic or changes its settings. Topics that nobody declares are created by the first publish or
    /// subscription, with the defaults.
    fn ensure_topic<'a>(
        &'a self,
        name: &'a str,
        config: TopicConfig,
    ) -> BoxFuture<'a, Result<(), ManageError>>;

    /// Forgets that a resource declared a topic: it gets the settings of those that nobody declares. One that does not
    /// exist is fine.
    fn reset_topic<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ManageError>>;

    /// Declares a subscription: from now on events wait for it, whether or not anyone consumes. One that exists keeps
    /// its place; if its topic is another one now, it starts anew there.
    fn ensure_subscription(
        &self,
        spec: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<(), ConsumeError>>;

    /// Forgets a subscription; its consumers end, and nothing is kept for it any more. One that does not exist is fine.
    fn remove_subscription<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ManageError>>;

    /// All topics, by name.
    fn topics(&self) -> BoxFuture<'_, Result<Vec<TopicStatus>, ManageError>>;

    /// All subscriptions, by name.
    fn subscriptions(&self) -> BoxFuture<'_, Result<Vec<SubscriptionStatus>, ManageError>>;

    /// Up to `limit` events of a topic from a position on, oldest first. Damaged and removed ones are left out.
    fn read<'a>(
        &'a self,
        topic: &'a str,
        from: u64,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredEvent>, ManageError>>;

    /// Removes events of a topic for good. Returns how many there were.
    fn remove_events<'a>(
        &'a self,
        topic: &'a str,
        positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>>;

    /// Moves dead letters back, to the one subscription that gave them up, with their ids and without what the
    /// dead-letter topic added; attempts start anew. Returns how many. An event whose subscription is gone stays, and
    /// is not counted.
    fn redrive<'a>(
        &'a self,
        dead_letter_topic: &'a str,
        positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>>;

    /// Stores events that another bus had, in this order, and returns when they are safe. Doing it again with the same
    /// ones, within the topic's deduplication window, stores nothing twice.
    fn import<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Import>,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        let why = format!("this bus takes no events of another one: {} of {topic}", events.len());
        Box::pin(async { Err(ManageError::Refused(why)) })
    }

    /// Makes a subscription that another bus had, as its consumers would: nobody declares it. One that exists keeps its
    /// place.
    fn adopt(&self, spec: SubscriptionSpec) -> BoxFuture<'_, Result<(), ConsumeError>> {
        let reason = "this bus takes none of another one".to_owned();
        Box::pin(async { Err(ConsumeError::Refused { subscription: spec.name, reason }) })
    }

    /// Moves a subscription. Everything from there on is delivered again, with attempts from 1; what is in flight is
    /// still settled by whoever has it.
    fn seek<'a>(
        &'a self,
        subscription: &'a str,
        to: Start,
    ) -> BoxFuture<'a, Result<(), ManageError>>;

    /// Stops or starts handing out events of a subscription. Survives a restart.
    fn pause<'a>(
        &'a self,
        subscription: &'a str,
        paused: bool,
    ) -> BoxFuture<'a, Result<(), ManageError>>;

    /// Copies everything that is stored now into a folder that holds no copy yet, while the bus goes on. Buses that are
    /// kept elsewhere refuse.
    fn backup<'a>(&'a self, _dir: &'a Path) -> BoxFuture<'a, Result<Backup, ManageError>> {
        let why = "this bus is kept on a cluster, whose own tools back it up".to_owned();
        Box::pin(async { Err(ManageError::Refused(why)) })
    }

    /// Writes what waits, ends every consumer, and closes. Everything afterwards fails.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// A topic, as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicStatus {
    /// Its name.
    pub name: String,
    /// Oldest position that is kept; one past the last where there is none.
    pub first: u64,
    /// Position of the next event.
    pub next: u64,
    /// Events that are kept.
    pub events: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// By [`ManagedBus::ensure_topic`], and not only by whoever publishes or subscribes. Survives a restart.
    pub declared: bool,
}

/// A subscription, as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscriptionStatus {
    /// `<namespace>/<name>`, with `@<replica>` for a replica's own.
    pub name: String,
    /// Its topic.
    pub topic: String,
    /// Where its dead letters go.
    pub dead_letter_topic: String,
    /// Events that it has yet to handle and that are due, those in flight included.
    pub lag: u64,
    /// Events that were published for a later time, which has not come; `None` where the bus does not tell. Those that
    /// nobody was there for to be handed to count as lag.
    pub scheduled: Option<u64>,
    /// Since when the oldest event of the lag waits, in milliseconds since the epoch: when it was published or, if later,
    /// the time that it was published for. `None` without any.
    pub oldest_ms: Option<u64>,
    /// The first event in the topic that it has yet to handle, due or not.
    pub first: Option<FirstWaiting>,
    /// Deliveries without an answer yet.
    pub in_flight: u64,
    /// Events that wait after a failed attempt.
    pub retrying: u64,
    /// Most attempts that were spent on one event that is not handled yet.
    pub attempts: u32,
    /// Connected consumers.
    pub consumers: u64,
    /// Nothing is handed out.
    pub paused: bool,
    /// By [`ManagedBus::ensure_subscription`], and not only by whoever consumes it. Survives a restart.
    pub declared: bool,
    /// Without a consumer for this long it is forgotten; `None`: never.
    pub idle_expiry: Option<Duration>,
}

impl SubscriptionStatus {
    /// Events that it has yet to handle, due or not, as far as the bus tells.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.lag.saturating_add(self.scheduled.unwrap_or(0))
    }
}

/// Where the events begin that a subscription has yet to handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstWaiting {
    /// Its position.
    pub position: u64,
    /// When it was published, in milliseconds since the epoch.
    pub published_ms: u64,
}

/// An event in its topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEvent {
    /// Its position.
    pub position: u64,
    /// When it was published, in milliseconds since the epoch.
    pub published_ms: u64,
    /// The event.
    pub event: Event,
}

/// An event that comes from another bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The event.
    pub event: Event,
    /// Its position there.
    pub position: u64,
    /// The one subscription that it is for; `None` for all.
    pub only: Option<String>,
    /// Its publisher may send it again, which is to be known as a duplicate.
    pub recent: bool,
}

/// Why a bus cannot do what its operator asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManageError {
    /// No topic or subscription of this name.
    #[error("there is no {kind} {name:?}")]
    Unknown {
        /// `topic` or `subscription`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// It cannot be done, whatever the state of the bus.
    #[error("{0}")]
    Refused(String),
    /// The bus cannot be reached, or nobody there decides just now. Trying again helps as soon as that is over.
    #[error("{0}")]
    Away(String),
    /// The bus failed. Trying again may help.
    #[error("{0}")]
    Failed(String),
}
