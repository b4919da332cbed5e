//! What every bus offers: publish, and consume a subscription. The embedded bus, the remote one and
//! the outbox's forwarder meet here.
//!
//! Imports [`crate::cloudevent`] and `duet_api`; no bus implementation.

mod answer;
mod consumer;
pub mod dead_letter;
mod error;
mod managed;
mod spec;
mod topic;

use futures::future::BoxFuture;

use crate::cloudevent::Event;

pub use answer::{AppAnswer, Settle, next_delay, on_answer};
pub use consumer::{Consumer, ConsumerBackend, Delivery, Settler};
pub use error::{ConsumeError, PublishError, PublishErrorKind};
pub use managed::{
    Backup, FirstWaiting, Import, ManageError, ManagedBus, StoredEvent, SubscriptionStatus,
    TopicStatus,
};
pub(crate) use spec::check_name;
pub use spec::{Bulk, MAX_EXPRESSION_BYTES, Route, Start, SubscriptionError, SubscriptionSpec};
pub use topic::TopicConfig;

/// A place that keeps events and hands them to subscribers. Object-safe: the sidecar holds one `Arc<dyn EventBus>`
/// for each bus of the mesh.
pub trait EventBus: Send + Sync + std::fmt::Debug {
    /// Stores the events, all or none, in order. Success means that they are flushed to disk. One [`Published`] for each
    /// event, in order. Calls take effect in the order in which their futures are first polled, so whoever serves
    /// several publishes of one stream at once polls them in order, and does not spawn them.
    ///
    /// # Cancel safety
    /// Dropping the future does not take the events back: they may or may not be stored.
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>>;

    /// Becomes one of the consumers of a subscription, which is declared by this if it does not exist.
    /// Several consumers of one subscription compete: each event goes to one of them.
    fn consume(
        &self,
        subscription: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<Consumer, ConsumeError>>;
}

/// Where an event was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Position in the topic, from 1.
    pub position: u64,
    /// The topic already held this (`source`, `id`); `position` is the older event's.
    pub duplicate: bool,
}

impl From<Published> for duet_api::proto::Published {
    fn from(value: Published) -> Self {
        Self { position: value.position, duplicate: value.duplicate }
    }
}

impl From<duet_api::proto::Published> for Published {
    fn from(value: duet_api::proto::Published) -> Self {
        Self { position: value.position, duplicate: value.duplicate }
    }
}
