//! The embedded bus, as its server and its operator see it.

use std::path::Path;

use futures::future::BoxFuture;

use super::{EmbeddedBus, consume_error};
use crate::bus::{
    Backup, ConsumeError, ManageError, ManagedBus, Start, StoredEvent, SubscriptionSpec,
    SubscriptionStatus, TopicConfig, TopicStatus,
};
use crate::log::LogError;

impl ManagedBus for EmbeddedBus {
    fn ensure_topic<'a>(
        &'a self,
        name: &'a str,
        config: TopicConfig,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.log.ensure_topic(name, config).await?) })
    }

    fn reset_topic<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.log.reset_topic(name).await?) })
    }

    fn ensure_subscription(
        &self,
        spec: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<(), ConsumeError>> {
        Box::pin(async move {
            let name = spec.name.clone();
            self.log
                .ensure_subscription(spec)
                .await
                .map_err(|error| consume_error(&self.name, &name, &error))
        })
    }

    fn remove_subscription<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.log.remove_subscription(name).await?) })
    }

    fn topics(&self) -> BoxFuture<'_, Result<Vec<TopicStatus>, ManageError>> {
        Box::pin(async { Ok(self.log.topics().await?) })
    }

    fn subscriptions(&self) -> BoxFuture<'_, Result<Vec<SubscriptionStatus>, ManageError>> {
        Box::pin(async { Ok(self.log.subscriptions().await?) })
    }

    fn read<'a>(
        &'a self,
        topic: &'a str,
        from: u64,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredEvent>, ManageError>> {
        Box::pin(async move {
            let records = self.log.read(topic, from, limit).await?;
            // Events are checked before they are stored; one of a version with other rules is as good as damaged.
            let events = records.into_iter().filter_map(|(position, record)| {
                let event = record.event?.try_into().ok()?;
                Some(StoredEvent { position, published_ms: record.published_ms, event })
            });
            Ok(events.collect())
        })
    }

    fn remove_events<'a>(
        &'a self,
        topic: &'a str,
        positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>> {
        Box::pin(async move { Ok(self.log.remove_events(topic, positions).await?) })
    }

    fn redrive<'a>(
        &'a self,
        dead_letter_topic: &'a str,
        positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>> {
        Box::pin(async move { Ok(self.log.redrive(dead_letter_topic, positions).await?) })
    }

    fn seek<'a>(
        &'a self,
        subscription: &'a str,
        to: Start,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.log.seek(subscription, to).await?) })
    }

    fn pause<'a>(
        &'a self,
        subscription: &'a str,
        paused: bool,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.log.pause(subscription, paused).await?) })
    }

    fn backup<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, Result<Backup, ManageError>> {
        Box::pin(async move { Ok(self.log.backup(dir).await?) })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.log.close().await;
            self.metrics.end();
        })
    }
}

impl From<LogError> for ManageError {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Refused(reason) => Self::Refused(reason),
            LogError::TooMany(_) => Self::Refused(error.to_string()),
            LogError::Unknown { kind, name } => Self::Unknown { kind, name },
            LogError::DiskFull
            | LogError::InUse
            | LogError::Format { .. }
            | LogError::Store(_)
            | LogError::Closed => Self::Failed(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
