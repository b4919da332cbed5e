//! The bus that lives in this process, on the durable [`crate::log`].
//!
//! Imports [`crate::bus`] and [`crate::log`].

mod manage;

use std::path::Path;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio_stream::wrappers::ReceiverStream;

use crate::bus::{
    ConsumeError, Consumer, Delivery, EventBus, PublishError, PublishErrorKind, Published,
    SubscriptionSpec,
};
use crate::cloudevent::Event;
use crate::log::{Entry, Log, LogDelivery, LogError, LogMetrics, LogOptions};

/// A bus kept in a folder of this machine.
#[derive(Debug)]
pub struct EmbeddedBus {
    name: String,
    log: Log,
    metrics: LogMetrics,
}

/// An event, and who has yet to handle it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenEvent {
    /// Its position.
    pub position: u64,
    /// The event.
    pub event: Event,
    /// Subscriptions, by name.
    pub waiting: Vec<String>,
    /// Published within the deduplication window before the topic's last one: no other has its source and id.
    pub recent: bool,
}

impl EmbeddedBus {
    /// Opens the bus of this name in `dir`, which is created if missing. Its metrics carry the name as label `bus`.
    ///
    /// # Errors
    /// When the folder cannot be used, when another process uses it, or when the registry has a bus of this name.
    pub async fn open(
        name: &str,
        dir: &Path,
        options: LogOptions,
        registry: &prometheus::Registry,
    ) -> Result<Self, LogError> {
        let metrics = LogMetrics::register(registry, name)
            .map_err(|error| LogError::Refused(format!("metrics of bus {name}: {error}")))?;
        // Whoever tries again needs the names of the metrics.
        let log = Log::open(dir, options, metrics.clone()).await.inspect_err(|_| metrics.end())?;
        Ok(Self { name: name.to_owned(), log, metrics })
    }

    /// Events that a subscription has yet to handle; 0 for one that does not exist.
    ///
    /// # Errors
    /// When the log failed.
    pub async fn subscription_lag(&self, name: &str) -> Result<u64, LogError> {
        Ok(self.log.backlog(name).await?.events)
    }

    /// Up to `limit` events of a topic from a position on, oldest first, with who has yet to handle each. Starts where
    /// the first subscription waits; of a topic without subscriptions, it gives all. For a bus that nobody consumes.
    ///
    /// # Errors
    /// When there is no such topic, or when the log failed.
    pub async fn open_events(
        &self,
        topic: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<OpenEvent>, LogError> {
        let found = self.log.open_events(topic, from, limit).await?;
        let open = found.into_iter().map(|open| {
            let event = open.record.event.unwrap_or_default().try_into();
            let event = event.map_err(|error| {
                let position = open.position;
                LogError::Store(format!("the event at position {position} is not valid: {error}"))
            })?;
            let (position, waiting, recent) = (open.position, open.waiting, open.recent);
            Ok(OpenEvent { position, event, waiting, recent })
        });
        open.collect()
    }
}

impl EventBus for EmbeddedBus {
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        Box::pin(async move {
            let entries = events.into_iter().map(|event| Entry { event, route: String::new() });
            let published = self.log.append(topic, entries.collect()).await.map_err(|error| {
                publish_error(&format!("bus {}, topic {topic}", self.name), &error)
            })?;
            let duplicates = published.iter().filter(|published| published.duplicate).count();
            let stored = published.len() - duplicates;
            self.metrics.published(topic, stored as u64, duplicates as u64);
            Ok(published)
        })
    }

    fn consume(
        &self,
        subscription: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        Box::pin(async move {
            let (bus, name) = (self.name.clone(), subscription.name.clone());
            let consumer = self.log.consume(subscription).await;
            let consumer = consumer.map_err(|error| consume_error(&bus, &name, &error))?;
            let reason = "the bus ended this consumer".to_owned();
            let over = Err(ConsumeError::Unavailable { bus, reason });
            let deliveries = ReceiverStream::new(consumer.deliveries)
                .map(move |delivery| to_delivery(&name, delivery))
                .chain(stream::once(async { over }));
            Ok(Consumer::new(deliveries, consumer.backend))
        })
    }
}

fn to_delivery(subscription: &str, delivery: LogDelivery) -> Result<Delivery, ConsumeError> {
    let LogDelivery { id, position, attempt, generation, record } = delivery;
    let event = record.event.unwrap_or_default().try_into();
    // Events are checked before they are stored, and records when they are read.
    let event = event.map_err(|error| ConsumeError::Internal {
        subscription: subscription.to_owned(),
        reason: format!("the event at position {position} is not valid: {error}"),
    })?;
    Ok(Delivery { id, position, attempt, generation, event, path: None })
}

pub(crate) fn publish_error(context: &str, error: &LogError) -> PublishError {
    let kind = match error {
        LogError::DiskFull => PublishErrorKind::Full,
        // Not full: it would be so for ever, and an outbox would hold up every other topic meanwhile.
        LogError::TooMany(_) => PublishErrorKind::UnknownTopic,
        LogError::Refused(_) | LogError::Unknown { .. } => PublishErrorKind::Invalid,
        // There will be another: after a restart, or elsewhere.
        LogError::Closed => PublishErrorKind::Unavailable,
        LogError::InUse | LogError::Format { .. } | LogError::Store(_) => {
            PublishErrorKind::Internal
        }
    };
    PublishError::new(kind, format!("{context}: {error}"))
}

fn consume_error(bus: &str, subscription: &str, error: &LogError) -> ConsumeError {
    let (subscription, reason) = (subscription.to_owned(), error.to_string());
    match error {
        LogError::Closed => ConsumeError::Unavailable { bus: bus.to_owned(), reason },
        LogError::Refused(_) | LogError::Unknown { .. } | LogError::TooMany(_) => {
            ConsumeError::Refused { subscription, reason }
        }
        LogError::DiskFull | LogError::InUse | LogError::Format { .. } | LogError::Store(_) => {
            ConsumeError::Internal { subscription, reason }
        }
    }
}

#[cfg(test)]
mod contract_tests;
#[cfg(test)]
mod tests;
