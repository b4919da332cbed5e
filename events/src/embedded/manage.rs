//! The embedded bus, as its server and its operator see it.

use futures::future::BoxFuture;

use super::{EmbeddedBus, consume_error};
use crate::bus::{
    ConsumeError, ManageError, ManagedBus, Start, StoredEvent, SubscriptionSpec,
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

    fn ensure_subscription(
        &self,
        spec: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<(), ConsumeError>> {
        Box::pin(async move {
            let name = spec.name.clone();
            self.log.ensure_subscription(spec).await.map_err(|error| consume_error(&name, &error))
        })
    }

    fn remove_subscription<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.log.remove_subscription(name).await?) })
    }

    fn topics(&self) -> BoxFuture<'_, Result<Vec<TopicStatus>, ManageError>> {
        Box::pin(async { Err(later()) })
    }

    fn subscriptions(&self) -> BoxFuture<'_, Result<Vec<SubscriptionStatus>, ManageError>> {
        Box::pin(async { Err(later()) })
    }

    fn read<'a>(
        &'a self,
        _topic: &'a str,
        _from: u64,
        _limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredEvent>, ManageError>> {
        Box::pin(async { Err(later()) })
    }

    fn remove_events<'a>(
        &'a self,
        _topic: &'a str,
        _positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>> {
        Box::pin(async { Err(later()) })
    }

    fn redrive<'a>(
        &'a self,
        _dead_letter_topic: &'a str,
        _positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>> {
        Box::pin(async { Err(later()) })
    }

    fn seek<'a>(
        &'a self,
        _subscription: &'a str,
        _to: Start,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async { Err(later()) })
    }

    fn pause<'a>(
        &'a self,
        _subscription: &'a str,
        _paused: bool,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async { Err(later()) })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.log.close())
    }
}

fn later() -> ManageError {
    ManageError::Refused("the embedded bus cannot do this yet".to_owned())
}

impl From<LogError> for ManageError {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Refused(reason) => Self::Refused(reason),
            LogError::DiskFull
            | LogError::InUse
            | LogError::Format { .. }
            | LogError::Store(_)
            | LogError::Closed => Self::Failed(error.to_string()),
        }
    }
}
