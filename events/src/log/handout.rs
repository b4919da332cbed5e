//! Handing events to consumers and taking their answers.

use std::collections::HashMap;
use std::time::Duration;

use duet_api::proto;
use prost::Message;
use tokio::sync::mpsc;

use super::engine::Engine;
use super::progress::RowChange;
use super::record::Record;
use super::store::Found;
use super::{LogDelivery, LogError, TopicConfig};
use crate::bus::{Settle, SubscriptionSpec};
use crate::cloudevent::clean_text;

/// Deliveries of one subscription in one turn, so that a replay does not hold up publishers.
const STEP: usize = 256;
/// Longest reason that a dead letter carries, in characters.
const MAX_REASON: usize = 512;

/// Everyone who consumes.
#[derive(Debug, Default)]
pub(super) struct Consumers {
    by_id: HashMap<u64, Consumer>,
    /// Counts hand-outs, to take turns.
    clock: u64,
}

#[derive(Debug)]
struct Consumer {
    subscription: String,
    sender: mpsc::Sender<LogDelivery>,
    max_in_flight: usize,
    /// Position by delivery.
    open: HashMap<u64, u64>,
    last_delivery: u64,
    served: u64,
}

impl Consumers {
    fn add(&mut self, id: u64, spec: &SubscriptionSpec, sender: mpsc::Sender<LogDelivery>) {
        let consumer = Consumer {
            subscription: spec.name.clone(),
            sender,
            max_in_flight: spec.max_in_flight as usize,
            open: HashMap::new(),
            last_delivery: 0,
            served: 0,
        };
        self.by_id.insert(id, consumer);
    }

    /// Drops the senders, so that the streams end.
    pub(super) fn end_all_of(&mut self, subscription: &str) {
        self.by_id.retain(|_id, consumer| consumer.subscription != subscription);
    }

    pub(super) fn in_flight(&self, subscription: &str) -> usize {
        let consumers = self.by_id.values().filter(|c| c.subscription == subscription);
        consumers.map(|consumer| consumer.open.len()).sum()
    }

    fn serves(&self, subscription: &str) -> bool {
        self.by_id.values().any(|consumer| consumer.subscription == subscription)
    }

    /// The consumer with room that has the least to do; among equals the one served longest ago.
    fn pick(&mut self, subscription: &str) -> Option<(u64, &mut Consumer)> {
        self.clock += 1;
        let with_room = self.by_id.iter_mut().filter(|(_, consumer)| {
            consumer.subscription == subscription && consumer.open.len() < consumer.max_in_flight
        });
        let (id, consumer) =
            with_room.min_by_key(|(_, consumer)| (consumer.open.len(), consumer.served))?;
        consumer.served = self.clock;
        Some((*id, consumer))
    }
}

impl Consumer {
    /// False: it is gone.
    fn send(&mut self, position: u64, attempt: u32, record: Record) -> bool {
        self.last_delivery += 1;
        let id = self.last_delivery;
        let sent = self.sender.try_send(LogDelivery { id, position, attempt, record }).is_ok();
        if sent {
            self.open.insert(id, position);
        }
        sent
    }
}

impl Engine {
    /// Declares the subscription and adds a consumer.
    pub(super) fn consume(
        &mut self,
        id: u64,
        spec: &SubscriptionSpec,
        sender: mpsc::Sender<LogDelivery>,
    ) -> Result<(), LogError> {
        self.declare(spec)?;
        self.consumers.add(id, spec, sender);
        Ok(())
    }

    /// Everything that the consumer has open is ready for others, unspent.
    pub(super) fn close_consumer(&mut self, id: u64) {
        let Some(consumer) = self.consumers.by_id.remove(&id) else {
            return;
        };
        if let Some(subscription) = self.subscriptions.get_mut(&consumer.subscription) {
            for position in consumer.open.values() {
                subscription.progress.give_back(*position);
            }
        }
    }

    /// A consumer's decision on a delivery. True if something has to be written.
    pub(super) fn settle(
        &mut self,
        consumer: u64,
        delivery: u64,
        outcome: &Settle,
        now_ms: u64,
    ) -> Result<bool, LogError> {
        let Some(consumer) = self.consumers.by_id.get_mut(&consumer) else {
            return Ok(false);
        };
        let Some(position) = consumer.open.remove(&delivery) else {
            return Ok(false);
        };
        let name = consumer.subscription.clone();
        if let Settle::DeadLetter { reason, status } = outcome {
            self.dead_letter(&name, position, reason, *status, now_ms)?;
        }
        let Some(subscription) = self.subscriptions.get_mut(&name) else {
            return Ok(false);
        };
        let progress = &mut subscription.progress;
        let change = match outcome {
            Settle::Ack | Settle::DeadLetter { .. } => progress.finish(position),
            Settle::Retry { delay } => progress.postpone(position, after(now_ms, *delay), true),
            Settle::Release { delay } if delay.is_zero() => {
                progress.give_back(position);
                return Ok(false);
            }
            Settle::Release { delay } => progress.postpone(position, after(now_ms, *delay), false),
        };
        self.changed(&name, position, change);
        Ok(true)
    }

    fn changed(&mut self, name: &str, position: u64, change: RowChange) {
        let Some(subscription) = self.subscriptions.get_mut(name) else {
            return;
        };
        subscription.dirty = true;
        let place = (subscription.row.id, position);
        match change {
            RowChange::None => {}
            RowChange::Put(row) => {
                self.batch.attempts.insert(place, Some(row.encode_to_vec()));
            }
            RowChange::Delete => {
                self.batch.attempts.insert(place, None);
            }
        }
    }

    /// Copies an event to the dead-letter topic, in the same batch that will settle it.
    fn dead_letter(
        &mut self,
        name: &str,
        position: u64,
        reason: &str,
        status: u32,
        now_ms: u64,
    ) -> Result<(), LogError> {
        let Some(subscription) = self.subscriptions.get(name) else {
            return Ok(());
        };
        let attempts = subscription.progress.spent(position).saturating_add(1);
        let row = subscription.row.clone();
        let Found::Record(mut record, _) = self.find(&row.topic, position)? else {
            return Ok(());
        };
        let reason: String = reason.chars().take(MAX_REASON).collect();
        tracing::warn!(
            subscription = name,
            topic = row.topic,
            position,
            attempts,
            reason,
            "event moved to {}",
            row.dead_letter_topic
        );
        if let Some(event) = &mut record.event {
            let notes = [
                ("deadletterreason", clean_text(&reason)),
                ("deadletterstatus", status.to_string()),
                ("deadlettertopic", row.topic.clone()),
                ("deadlettersub", name.to_owned()),
                ("deadletterattempts", attempts.to_string()),
            ];
            note(event, notes);
        }
        record.published_ms = now_ms;
        self.topic(&row.dead_letter_topic, &TopicConfig::keep_all())?;
        if let Some(topic) = self.topics.get_mut(&row.dead_letter_topic) {
            topic.push(&record.encode_to_vec(), &mut self.batch);
            let row_bytes = topic.row().encode_to_vec();
            self.batch.topics.insert(row.dead_letter_topic, row_bytes);
        }
        self.urgent = true;
        self.metrics.dead_letter(name);
        Ok(())
    }

    /// Hands out what is ready to whoever has room. True if there is more to do at once.
    pub(super) fn hand_out(&mut self, now_ms: u64) -> Result<bool, LogError> {
        let mut more = false;
        let names: Vec<String> = self.subscriptions.keys().cloned().collect();
        for name in names {
            if self.consumers.serves(&name) {
                more |= self.hand_out_one(&name, now_ms)?;
            }
        }
        Ok(more)
    }

    fn hand_out_one(&mut self, name: &str, now_ms: u64) -> Result<bool, LogError> {
        if let Some(subscription) = self.subscriptions.get_mut(name) {
            // Even if nobody has room now: what is due must not keep the thread awake.
            subscription.progress.wake(now_ms);
        }
        for _ in 0..STEP {
            let Some((id, _)) = self.consumers.pick(name) else {
                return Ok(false);
            };
            let Some(subscription) = self.subscriptions.get_mut(name) else {
                return Ok(false);
            };
            let topic = subscription.row.topic.clone();
            let end = self.topics.get(&topic).map_or(0, super::topic::Topic::end);
            let Some((position, attempt)) = subscription.progress.take(end) else {
                return Ok(false);
            };
            match self.find(&topic, position)? {
                Found::Record(record, _) => self.send(id, name, position, attempt, *record),
                Found::Damaged(_) | Found::Nothing => self.skip_damaged(name, &topic, position),
            }
        }
        Ok(true)
    }

    fn send(&mut self, id: u64, name: &str, position: u64, attempt: u32, record: Record) {
        let consumer = self.consumers.by_id.get_mut(&id);
        if consumer.is_some_and(|consumer| consumer.send(position, attempt, record)) {
            return;
        }
        // It went away without saying so: its receiver is dropped.
        if let Some(subscription) = self.subscriptions.get_mut(name) {
            subscription.progress.give_back(position);
        }
        self.close_consumer(id);
    }

    fn skip_damaged(&mut self, name: &str, topic: &str, position: u64) {
        tracing::error!(subscription = name, topic, position, "damaged record skipped");
        self.metrics.damaged_records.inc();
        if let Some(subscription) = self.subscriptions.get_mut(name) {
            let change = subscription.progress.finish(position);
            self.changed(name, position, change);
        }
    }

    /// When the next postponed event is due that someone would take.
    pub(super) fn next_wake(&self) -> Option<u64> {
        let served = self.subscriptions.iter().filter(|(name, _)| self.consumers.serves(name));
        served.filter_map(|(_, subscription)| subscription.progress.next_wake()).min()
    }
}

fn after(now_ms: u64, delay: Duration) -> u64 {
    now_ms.saturating_add(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX))
}

fn note<const N: usize>(event: &mut proto::Event, notes: [(&str, String); N]) {
    for (name, value) in notes {
        event.attributes.insert(name.to_owned(), value);
    }
}
