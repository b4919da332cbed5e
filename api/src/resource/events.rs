//! `EventBus`, `Topic`, `Subscription`, `OutboxSource`: the event half.

mod backend;
mod outbox_source;
mod subscription;

use std::time::Duration;

use serde::Deserialize;

pub use backend::{BusBackend, EmbeddedBackend, NatsBackend, NatsTls};
pub use outbox_source::{
    AfterRelay, Database, OutboxColumns, OutboxSource, OutboxSourceSpec, is_database_url,
};
pub use subscription::{Bulk, EventRoute, Start, Subscriber};

use super::core::IgnoredEq;
use super::meta::Metadata;
use crate::{duration, quantity};

/// A broker behind the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EventBus {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// Mesh-wide name, as in publish URLs.
    pub metadata: Metadata,
    /// The bus.
    pub spec: EventBusSpec,
    #[serde(default, rename = "status")]
    pub(super) _status: IgnoredEq,
}

/// Spec of an [`EventBus`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EventBusSpec {
    /// What keeps the events.
    pub backend: BusBackend,
    /// Refuse publishes to topics that no `Topic` resource declares. Default: false.
    #[serde(default)]
    pub declared_topics_only: bool,
}

/// Settings of a topic. A topic without this resource has the defaults.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Topic {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// Name on its bus.
    pub metadata: Metadata,
    /// The settings.
    #[serde(default)]
    pub spec: TopicSpec,
    #[serde(default, rename = "status")]
    pub(super) _status: IgnoredEq,
}

/// Spec of a [`Topic`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TopicSpec {
    /// The bus. Default: `default`.
    pub bus: String,
    /// How long handled events are kept.
    pub retention: Retention,
    /// The same (`source`, `id`) within this window is stored once. Default: 5 min.
    #[serde(deserialize_with = "duration::required")]
    pub dedup_window: Duration,
    /// The attribute by which `ordered` subscriptions keep events in order. Default: `partitionkey`.
    #[serde(deserialize_with = "attribute")]
    pub order_by: String,
}

/// Name of a CloudEvents attribute.
fn attribute<'de, D: serde::Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let name = String::deserialize(input)?;
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if (1..=64).contains(&name.len()) && name.bytes().all(fine) {
        return Ok(name);
    }
    Err(serde::de::Error::custom(format!(
        "{name:?} is not an attribute's name: 1 to 64 lower-case letters and digits"
    )))
}

impl Default for TopicSpec {
    fn default() -> Self {
        Self {
            bus: crate::DEFAULT_BUS.to_owned(),
            retention: Retention::default(),
            dedup_window: Duration::from_secs(300),
            order_by: "partitionkey".to_owned(),
        }
    }
}

/// How long events are kept after every subscription has handled them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Retention {
    /// Default: 7 days.
    #[serde(deserialize_with = "duration::option")]
    pub age: Option<Duration>,
    /// Default: 1 Gi.
    #[serde(deserialize_with = "quantity::option")]
    pub bytes: Option<u64>,
    /// Also events that a subscription has yet to handle; they are counted. Default: false.
    pub drop_unhandled: bool,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            age: Some(Duration::from_secs(7 * 86_400)),
            bytes: Some(1 << 30),
            drop_unhandled: false,
        }
    }
}

/// Events of a topic, to a service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Subscription {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// Name and namespace.
    pub metadata: Metadata,
    /// The subscription.
    pub spec: SubscriptionSpec,
    #[serde(default, rename = "status")]
    pub(super) _status: IgnoredEq,
}

/// Spec of a [`Subscription`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SubscriptionSpec {
    /// The bus. Default: `default`.
    #[serde(default = "default_bus")]
    pub bus: String,
    /// The topic.
    pub topic: String,
    /// Who gets the events: one replica of the service each.
    pub subscriber: Subscriber,
    /// CEL: what it is not true for is done without a delivery. Default: everything is delivered.
    pub filter: Option<String>,
    /// The first that matches says the path, instead of the subscriber's.
    #[serde(default)]
    pub routes: Vec<EventRoute>,
    /// Every replica gets every event that is published while it runs. Default: false.
    #[serde(default)]
    pub broadcast: bool,
    /// Deliver an event's data alone, as base64, as Dapr does where a subscription's metadata says so. Default: false.
    #[serde(default)]
    pub raw_payload: bool,
    /// Several events in one request. Default: one by one.
    pub bulk: Option<Bulk>,
    /// Flow and time bounds.
    #[serde(default)]
    pub delivery: Delivery,
    /// When a delivery fails.
    #[serde(default)]
    pub retry: EventRetry,
    /// Where events go that cannot be handled. Default: `<topic>.dead-letter`.
    pub dead_letter_topic: Option<String>,
    /// Where a new subscription starts. Default: `latest`.
    #[serde(default)]
    pub start: Start,
}

fn default_bus() -> String {
    crate::DEFAULT_BUS.to_owned()
}

/// Flow and time bounds of a subscription.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Delivery {
    /// Deliveries open at once, for each replica. Default: 64.
    #[serde(deserialize_with = "max_in_flight")]
    pub max_in_flight: u32,
    /// Bound on one answer. Default: 30 s.
    #[serde(deserialize_with = "duration::required")]
    pub ack_timeout: Duration,
    /// Events of one partition key in the order of their publication, one at a time. Default: false.
    pub ordered: bool,
    /// The subscriber's sidecar remembers what was handled, so that an acknowledgement that was lost does not
    /// bring the event twice. Default: false.
    pub once: bool,
}

impl Default for Delivery {
    fn default() -> Self {
        Self {
            max_in_flight: 64,
            ack_timeout: Duration::from_secs(30),
            ordered: false,
            once: false,
        }
    }
}

fn max_in_flight<'de, D: serde::Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    match u32::deserialize(input)? {
        n @ 1..=10_000 => Ok(n),
        n => Err(serde::de::Error::custom(format!("maxInFlight must be 1 to 10000, not {n}"))),
    }
}

/// What happens when a delivery fails.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EventRetry {
    /// Total tries; 0 for no bound. Default: 10.
    pub max_attempts: u32,
    /// Wait before the second try; doubles. Default: 1 s.
    #[serde(deserialize_with = "duration::required")]
    pub backoff: Duration,
    /// Longest wait. Default: 5 min.
    #[serde(deserialize_with = "duration::required")]
    pub max_backoff: Duration,
}

impl Default for EventRetry {
    fn default() -> Self {
        Self {
            max_attempts: 10,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(300),
        }
    }
}
