//! Events that their bus will never take, for people to look at and to settle. Imports what the outbox does.

use crate::bus::{PublishError, dead_letter};
use crate::cloudevent::Event;
use crate::embedded::publish_error;
use crate::log::record::Record;
use crate::log::{LogError, store};

use super::Outbox;

/// An event that was moved aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Names it to [`Outbox::redrive`] and [`Outbox::drop_rejected`].
    pub position: u64,
    /// When it was moved aside, in milliseconds since the epoch.
    pub rejected_ms: u64,
    /// The topic that it was published to.
    pub topic: String,
    /// What the bus said.
    pub reason: String,
    /// The event as it was published; `None` for one that this version cannot read.
    pub event: Option<Event>,
}

impl From<(u64, Record)> for Rejected {
    fn from((position, record): (u64, Record)) -> Self {
        let mut event = record.event.unwrap_or_default();
        let reason = event.attributes.get(dead_letter::REASON).cloned().unwrap_or_default();
        let mut attributes = event.attributes.into_iter().collect();
        dead_letter::strip(&mut attributes);
        event.attributes = attributes.into_iter().collect();
        let (rejected_ms, topic) = (record.published_ms, record.route);
        Self { position, rejected_ms, topic, reason, event: event.try_into().ok() }
    }
}

/// Where what a bus will not take lies in the outbox.
pub(super) fn topic(bus: &str) -> String {
    format!("{bus}.rejected")
}

impl Outbox {
    /// Up to `limit` events that a bus will never take, from a position on, oldest first.
    ///
    /// # Errors
    /// When the store failed.
    pub async fn rejected(
        &self,
        bus: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Rejected>, LogError> {
        // Looking makes no store.
        if !self.options.dir.join(store::FILE_NAME).exists() {
            return Ok(Vec::new());
        }
        match self.log().await?.read(&topic(bus), from, limit).await {
            Ok(found) => Ok(found.into_iter().map(Rejected::from).collect()),
            Err(LogError::Unknown { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Puts rejected events at the end of what waits for their bus, and returns how many. One that this version cannot
    /// read stays. A crash between the two steps leaves an event in both places; the bus knows it by `source` and `id`.
    ///
    /// # Errors
    /// When the store failed, or the outbox has no room.
    pub async fn redrive(&self, bus: &str, positions: &[u64]) -> Result<u64, PublishError> {
        let context = format!("outbox for bus {bus}");
        let failed = |error: LogError| publish_error(&context, &error);
        let spool = self.spool(bus);
        let mut redriven = 0;
        for position in positions {
            let found = self.rejected(bus, *position, 1).await.map_err(failed)?;
            let Some(found) = found.into_iter().find(|found| found.position == *position) else {
                continue;
            };
            if let Some(event) = found.event {
                self.keep_all(&spool, &found.topic, vec![event]).await?;
                redriven += self.drop_rejected(bus, vec![*position]).await.map_err(failed)?;
            }
        }
        Ok(redriven)
    }

    /// Removes rejected events for good, and returns how many.
    ///
    /// # Errors
    /// When the store failed.
    pub async fn drop_rejected(&self, bus: &str, positions: Vec<u64>) -> Result<u64, LogError> {
        if !self.options.dir.join(store::FILE_NAME).exists() {
            return Ok(0);
        }
        match self.log().await?.remove_events(&topic(bus), positions).await {
            Err(LogError::Unknown { .. }) => Ok(0),
            removed => removed,
        }
    }
}
