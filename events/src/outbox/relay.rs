//! Publishing that survives the bus being away.

use std::sync::Arc;

use tokio::task::AbortHandle;

use super::forward::Forwarder;
use super::{Outbox, Spool};
use crate::bus::{EventBus, PublishError, Published};
use crate::cloudevent::Event;

/// How a publish was made safe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// By the bus.
    Stored(Vec<Published>),
    /// By the outbox; it follows in order.
    Spooled,
}

/// Publishes to one bus directly while it is there, through the outbox while it is not. Dropping it stops the
/// forwarding; what waits stays on disk.
#[derive(Debug)]
pub struct RelayPublisher {
    outbox: Arc<Outbox>,
    spool: Arc<Spool>,
    bus: Arc<dyn EventBus>,
    forwarder: AbortHandle,
}

impl RelayPublisher {
    pub(super) fn start(outbox: Arc<Outbox>, spool: Arc<Spool>, bus: Arc<dyn EventBus>) -> Self {
        let forwarder = Forwarder::new(Arc::clone(&outbox), Arc::clone(&spool), Arc::clone(&bus));
        let forwarder = tokio::spawn(forwarder.run()).abort_handle();
        Self { outbox, spool, bus, forwarder }
    }

    /// Makes the events safe. While older ones wait in the outbox, new ones queue behind them, so that one publisher's
    /// order never turns around. A publish that ended without a clear answer is spooled too: if the bus has
    /// the events after all, it knows them by `source` and `id`.
    ///
    /// # Errors
    /// `Full`: neither bus nor outbox has room (429). Otherwise what the bus said, or why the outbox failed.
    pub async fn publish(&self, topic: &str, events: Vec<Event>) -> Result<Accepted, PublishError> {
        if self.waiting() == 0 {
            match self.bus.publish(topic, events.clone()).await {
                Ok(published) => return Ok(Accepted::Stored(published)),
                Err(error) if error.is_unavailable() => {
                    tracing::debug!(bus = self.spool.bus, topic, %error, "publish goes to the outbox");
                }
                Err(error) => return Err(error),
            }
        }
        self.outbox.keep(&self.spool, topic, events).await?;
        Ok(Accepted::Spooled)
    }

    /// Events that wait for this bus.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.spool.waiting.lock().events
    }
}

impl Drop for RelayPublisher {
    fn drop(&mut self) {
        self.forwarder.abort();
    }
}
