//! What the bucket of state says: which subscription is where, and the attempts spent. It is read message by message, from
//! the leader of its stream: a copy may be behind what was just written, and the bucket's own list of keys leaves a consumer
//! on the server each time.

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::RawMessageErrorKind;
use serde::{Deserialize, Serialize};
use tokio::time::{Duration, sleep};

use super::hub::now_ms;
use super::names::token;
use super::shared::{NatsError, Shared, is_overtaken};
use crate::bus::{Start, SubscriptionSpec, TopicConfig};

/// Events that are asked for how often they were tried, for an operator: each is a question of its own.
const MOST_LOOKED_AT: usize = 500;

/// Tries of a write that others overtake, and the pause after the first; each is longer than the one before.
const MOST_OVERTAKEN: u32 = 10;
const OVERTAKEN: Duration = Duration::from_millis(20);

/// Counts how often somebody else has written a record in between.
#[derive(Debug, Default)]
pub(super) struct Overtaken(u32);

impl Overtaken {
    /// Waits a little. An error once it looks as if the servers say so for ever.
    pub(super) async fn again(&mut self) -> Result<(), NatsError> {
        self.0 += 1;
        if self.0 >= MOST_OVERTAKEN {
            let text = "a subscription's record is being written by others all the time";
            return Err(NatsError::Away(text.to_owned()));
        }
        sleep(OVERTAKEN * self.0).await;
        Ok(())
    }
}

/// What the bucket says of a subscription.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) topic: String,
    /// Empty in one that was written before this was part of it.
    #[serde(default)]
    dead_letter_topic: String,
    /// JetStream forgets the subscription when nobody consumes it for a while. `None` in a record that was written
    /// before this was part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<bool>,
    /// A resource declared it.
    #[serde(default)]
    declared: bool,
    /// The bus that it is of. Empty in one that was written before this was part of it.
    #[serde(default)]
    bus: String,
    /// Counts how often it was moved: what its deliveries carry as their generation.
    #[serde(default)]
    pub(super) epoch: u64,
    /// Where its consumer is to start, while it is being moved: it may have none for a moment, or until somebody finishes
    /// what was interrupted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) moving_to: Option<Start>,
}

/// A record, and which writing of it.
#[derive(Clone, Debug)]
pub(super) struct Recorded {
    pub(super) record: Record,
    pub(super) revision: u64,
}

impl Record {
    /// Of a subscription as it is now; `before` is what was on record.
    pub(super) fn new(spec: &SubscriptionSpec, bus: &str, before: Option<&Self>) -> Self {
        Self {
            name: spec.name.clone(),
            topic: spec.topic.clone(),
            dead_letter_topic: spec.dead_letter_topic.clone(),
            expires: Some(spec.idle_expiry.is_some()),
            declared: before.is_some_and(|before| before.declared),
            bus: bus.to_owned(),
            epoch: before.map_or(0, |before| before.epoch),
            moving_to: None,
        }
    }

    /// Of one whose record the servers have lost. Its generation is one that was never there: a later replay must not have
    /// that of an earlier one. It gets all that its topic has.
    pub(super) fn lost(spec: &SubscriptionSpec, bus: &str) -> Self {
        let (epoch, moving_to) = (now_ms(), Some(Start::Earliest));
        Self { declared: spec.declared, epoch, moving_to, ..Self::new(spec, bus, None) }
    }

    pub(super) fn dead_letter_topic(&self) -> String {
        match self.dead_letter_topic.as_str() {
            "" => format!("{}.dead-letter", self.topic),
            named => named.to_owned(),
        }
    }

    /// Whether a resource declared it for this bus. What it declared for another one is not this one's to forget.
    pub(super) fn is_declared_for(&self, bus: &str) -> bool {
        self.declared && (self.bus.is_empty() || self.bus == bus)
    }

    /// Whether a resource declares it.
    pub(super) fn is_declared(&self) -> bool {
        self.declared
    }

    /// Whether it stays without a consumer. Nobody knows of one whose record was written before this was part of it.
    pub(super) fn is_kept(&self) -> bool {
        self.expires == Some(false)
    }
}

fn record_key(name: &str) -> String {
    format!("s.{}", token(name))
}

fn attempts_key(name: &str, position: u64) -> String {
    format!("a.{}.{position}", token(name))
}

fn attempts(found: &StreamMessage) -> u32 {
    std::str::from_utf8(&found.payload).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

impl Shared {
    pub(super) async fn record(&self, name: &str) -> Result<Option<Record>, NatsError> {
        Ok(self.read_record(name).await?.0)
    }

    /// A record, and the revision that is to be written over: there may be a mark of what was removed, or nothing (0).
    pub(super) async fn read_record(&self, name: &str) -> Result<(Option<Record>, u64), NatsError> {
        let found = self.first(&record_key(name), 1, "a subscription's record").await?;
        let Some(found) = found else { return Ok((None, 0)) };
        Ok((serde_json::from_slice(&found.payload).ok(), found.sequence))
    }

    /// Whether the servers do not know of a subscription that is wanted here.
    pub(super) async fn is_lost(&self, name: &str) -> Result<bool, NatsError> {
        let known = self.record(name).await?.is_some();
        Ok(!known && self.wanted.lock().subscription(name).is_some())
    }

    /// Every record, by name.
    pub(super) async fn records(&self) -> Result<Vec<Recorded>, NatsError> {
        let (mut records, mut next) = (Vec::new(), 1);
        while let Some(found) = self.first("s.>", next, "the records").await? {
            next = found.sequence.saturating_add(1);
            // What is no record any more is a mark of what was removed.
            records.extend(
                serde_json::from_slice(&found.payload)
                    .ok()
                    .map(|record: Record| Recorded { record, revision: found.sequence }),
            );
        }
        records.sort_by(|a, b| a.record.name.cmp(&b.record.name));
        Ok(records)
    }

    /// The first that the bucket has under a key, or under several, from a revision on.
    async fn first(
        &self,
        key: &str,
        from: u64,
        what: &str,
    ) -> Result<Option<StreamMessage>, NatsError> {
        let store = self.state().await?;
        let question = store.stream.raw_message_builder().sequence(from);
        match question.next_by_subject(format!("$KV.{}.{key}", store.name)).send().await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(self.state_error(what, &error)),
        }
    }

    /// Notes that a resource declares a subscription, whoever made it.
    pub(super) async fn mark_declared(&self, name: &str) -> Result<(), NatsError> {
        let mut overtaken = Overtaken::default();
        loop {
            let (record, revision) = self.read_record(name).await?;
            let Some(record) = record.filter(|record| !record.declared) else { return Ok(()) };
            let declared = Record { declared: true, ..record };
            if self.put_record(&declared, revision).await?.is_some() {
                return Ok(());
            }
            overtaken.again().await?;
        }
    }

    /// Writes a record over this revision of it. Returns the new one; `None` where somebody, here or at another control
    /// plane, wrote it meanwhile: two that heal the same subscription must not give it two generations, nor take back
    /// what a replay counted.
    pub(super) async fn put_record(
        &self,
        record: &Record,
        revision: u64,
    ) -> Result<Option<u64>, NatsError> {
        let bytes = serde_json::to_vec(record).unwrap_or_default();
        let store = self.state().await?;
        match store.update(record_key(&record.name), bytes.into(), revision).await {
            Ok(revision) => Ok(Some(revision)),
            Err(error) if is_overtaken(&error) => Ok(None),
            Err(error) => Err(self.state_error("a subscription's record", &error)),
        }
    }

    pub(super) async fn forget(&self, name: &str) -> Result<(), NatsError> {
        self.wanted.lock().forget(name);
        if let Some(record) = self.record(name).await? {
            self.delete_consumer(&record.topic, name).await?;
            self.purge_state(&record_key(name)).await?;
        }
        // Once more: it may have been looked at meanwhile.
        self.wanted.lock().pause(name, false);
        Ok(())
    }

    /// Forgets what is left of a subscription whose consumer JetStream forgot, unless it was written again since.
    pub(super) async fn forget_expired(&self, gone: &Recorded) -> Result<(), NatsError> {
        let Record { name, topic, .. } = &gone.record;
        let topic = self.topic(topic, TopicConfig::undeclared(topic)).await?;
        if self.consumer(&topic, name).await?.is_some() {
            return Ok(());
        }
        self.wanted.lock().pause(name, false);
        self.purge_state(&format!("a.{}.>", token(name))).await?;
        let store = self.state().await?;
        let filter = format!("$KV.{}.{}", store.name, record_key(name));
        let purged = store.stream.purge().sequence(gone.revision.saturating_add(1)).filter(filter);
        purged.await.map(drop).map_err(|error| self.state_error("the bucket of state", &error))
    }

    /// Attempts spent on an event.
    pub(super) async fn spent(&self, name: &str, position: u64) -> Result<u32, NatsError> {
        let found = self.first(&attempts_key(name, position), 1, "spent attempts").await?;
        Ok(found.map_or(0, |found| attempts(&found)))
    }

    /// Most attempts spent on one event that is not handled, as far as that many are looked at.
    pub(super) async fn most_spent(&self, name: &str) -> Result<u32, NatsError> {
        let key = format!("a.{}.>", token(name));
        let (mut most, mut next) = (0, 1);
        for _ in 0..MOST_LOOKED_AT {
            let Some(found) = self.first(&key, next, "spent attempts").await? else { break };
            next = found.sequence.saturating_add(1);
            most = most.max(attempts(&found));
        }
        Ok(most)
    }

    pub(super) async fn spend(
        &self,
        name: &str,
        position: u64,
        spent: u32,
    ) -> Result<(), NatsError> {
        let put = self.state().await?;
        let put = put.put(attempts_key(name, position), spent.to_string().into()).await;
        put.map(drop).map_err(|error| self.state_error("spent attempts", &error))
    }

    /// Removes what is remembered of an event.
    pub(super) async fn forget_spent(&self, name: &str, position: u64) -> Result<(), NatsError> {
        self.purge_state(&attempts_key(name, position)).await
    }

    pub(super) async fn purge_state(&self, key: &str) -> Result<(), NatsError> {
        let store = self.state().await?;
        // Not the bucket's own purge: that leaves a mark for each key for ever.
        let filter = format!("$KV.{}.{key}", store.name);
        let purged = store.stream.purge().filter(filter).await;
        purged.map(drop).map_err(|error| self.state_error("the bucket of state", &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_record_that_others_write_all_the_time_is_given_up() {
        let (mut overtaken, started) = (Overtaken::default(), tokio::time::Instant::now());
        for _ in 1..MOST_OVERTAKEN {
            overtaken.again().await.unwrap();
        }
        assert_eq!(started.elapsed(), OVERTAKEN * 45, "a little longer each time");
        assert!(matches!(overtaken.again().await, Err(NatsError::Away(_))));
    }
}
