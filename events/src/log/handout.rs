//! Handing events to consumers and taking their answers.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::mpsc;

use super::consumers::Open;
use super::engine::Engine;
use super::progress::Refill;
use super::record::Record;
use super::store::Found;
use super::{LogDelivery, LogError, TopicConfig};
use crate::bus::dead_letter::{self, Verdict};
use crate::bus::{Settle, SubscriptionSpec};
use crate::cloudevent::{self, DELIVER_AT, EXPIRY_TIME};

/// Deliveries of one subscription in one turn, so that a replay does not hold up publishers.
const STEP: usize = 256;
/// Records that are read again in one turn.
const REFILL_READS: u64 = 1024;
/// Bytes of a topic whose events are carried elsewhere that may be of such as are there already, and wait for one before
/// them to go.
const MOST_CARRIED: u64 = 4 << 20;

impl Engine {
    /// Declares the subscription and adds a consumer.
    pub(super) fn consume(
        &mut self,
        id: u64,
        spec: &SubscriptionSpec,
        as_is: bool,
        sender: mpsc::Sender<LogDelivery>,
    ) -> Result<(), LogError> {
        self.declare(spec)?;
        let name: Arc<str> = spec.name.as_str().into();
        if let Some(subscription) = self.subscriptions.get_mut(&*name) {
            subscription.as_is = as_is;
            subscription.consumers.add(id, spec.max_in_flight as usize, sender);
            self.served.add(&name, &spec.topic);
            self.owners.insert(id, name);
        }
        Ok(())
    }

    /// Everything that the consumer has open is ready for others, unspent.
    pub(super) fn close_consumer(&mut self, id: u64) {
        let Some(name) = self.owners.remove(&id) else {
            return;
        };
        let Some(subscription) = self.subscriptions.get_mut(&*name) else {
            return;
        };
        for open in subscription.consumers.remove(id) {
            if open.epoch == subscription.row.epoch {
                subscription.progress.give_back(open.position);
            }
        }
        if subscription.consumers.is_empty() {
            self.served.remove(&name, &subscription.row.topic);
        }
        self.served.stir(&name);
    }

    /// The consumer gets nothing any more, and still settles what it has.
    pub(super) fn retire_consumer(&mut self, id: u64) {
        let name = self.owners.get(&id);
        if let Some(subscription) = name.and_then(|name| self.subscriptions.get_mut(&**name)) {
            subscription.consumers.retire(id);
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
        let Some((name, Open { position, bytes, .. })) = self.answered(consumer, delivery) else {
            return Ok(false);
        };
        if let Settle::DeadLetter { reason, status } = outcome {
            self.dead_letter(&name, position, reason, *status, now_ms)?;
        }
        let Some(subscription) = self.subscriptions.get_mut(&*name) else {
            return Ok(false);
        };
        let progress = &mut subscription.progress;
        let change = match outcome {
            Settle::Ack | Settle::DeadLetter { .. } => progress.finish(position),
            Settle::Retry { delay } => progress.postpone(position, now_ms, millis(*delay), true),
            Settle::Release { delay } if delay.is_zero() => {
                progress.give_back(position);
                return Ok(false);
            }
            Settle::Release { delay } => progress.postpone(position, now_ms, millis(*delay), false),
        };
        subscription.changed(position, change, &mut self.batch);
        if subscription.as_is && matches!(outcome, Settle::Ack | Settle::DeadLetter { .. }) {
            self.carried(&name, position, bytes);
        }
        Ok(true)
    }

    /// Somebody carried an event to where it belongs, and one before it not yet: if that takes long, what was carried past
    /// it must not fill the disk.
    fn carried(&mut self, name: &str, position: u64, bytes: u64) {
        let Some(subscription) = self.subscriptions.get(name) else { return };
        let (topic, floor) = (&subscription.row.topic, subscription.progress.floor());
        if let Some(state) = self.topics.get_mut(topic)
            && position > floor
            && state.row().bytes > MOST_CARRIED
        {
            state.remove(position, bytes, &mut self.batch);
            self.batch.topics.insert(topic.clone(), state.row().encode_to_vec());
        }
    }

    /// What a delivery was of, its subscription and the rest, unless that was moved or removed meanwhile. Its consumer has room
    /// again.
    fn answered(&mut self, consumer: u64, delivery: u64) -> Option<(Arc<str>, Open)> {
        let name = Arc::clone(self.owners.get(&consumer)?);
        let subscription = self.subscriptions.get_mut(&*name)?;
        let open = subscription.consumers.settle(consumer, delivery)?;
        let is_its_own = open.epoch == subscription.row.epoch;
        self.touch(&name);
        is_its_own.then_some((name, open))
    }

    /// What was to become of a delivery cannot be now: it comes again, unspent, and not before a time. Takes nothing of the
    /// disk.
    pub(super) fn hold_back(&mut self, consumer: u64, delivery: u64, until_ms: u64) {
        let Some((name, Open { position, .. })) = self.answered(consumer, delivery) else {
            return;
        };
        if let Some(subscription) = self.subscriptions.get_mut(&*name) {
            subscription.progress.hold_back(position, until_ms);
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
        let verdict = Verdict { reason, status, topic: &row.topic, subscription: name, attempts };
        // The sidecar, which knows the event, says it louder and within bounds.
        tracing::debug!(
            subscription = name,
            topic = row.topic,
            position,
            attempts,
            reason,
            "event moved to {}",
            row.dead_letter_topic
        );
        if let Some(event) = &mut record.event {
            event.attributes.remove(dead_letter::REDRIVE_TO);
            let notes = verdict.attributes();
            event.attributes.extend(notes.map(|(name, value)| (name.to_owned(), value)));
        }
        record.published_ms = now_ms;
        self.topic(&row.dead_letter_topic, &TopicConfig::keep_all())?;
        self.push(&row.dead_letter_topic, &record);
        self.urgent = true;
        self.metrics.dead_letter(name);
        Ok(())
    }

    /// Bytes of an event that a consumer has.
    pub(super) fn bytes_in_hand(&self, consumer: u64, delivery: u64) -> u64 {
        let name = self.owners.get(&consumer);
        let subscription = name.and_then(|name| self.subscriptions.get(&**name));
        subscription.map_or(0, |subscription| subscription.consumers.bytes(consumer, delivery))
    }

    /// The clock was set back by so much.
    pub(super) fn clock_set_back(&mut self, by_ms: u64) {
        tracing::warn!(by_ms, "the clock was set back; retries do not wait for it");
        for subscription in self.subscriptions.values_mut() {
            subscription.clock_set_back(by_ms);
        }
        self.served.stir_all();
    }

    /// Hands out what is ready to whoever has room. True if there is more to do at once.
    pub(super) fn hand_out(&mut self, now_ms: u64) -> Result<bool, LogError> {
        let mut more = false;
        for name in self.served.take(now_ms) {
            if self.hand_out_one(&name, now_ms)? {
                self.served.stir(&name);
                more = true;
            }
            self.note_progress(&name);
            let active = self.subscriptions.get(&*name).filter(|known| !known.row.paused);
            self.served.wake_at(&name, active.and_then(|active| active.progress.next_wake()));
        }
        Ok(more)
    }

    fn hand_out_one(&mut self, name: &str, now_ms: u64) -> Result<bool, LogError> {
        let Some(subscription) = self.subscriptions.get_mut(name) else {
            return Ok(false);
        };
        if subscription.row.paused {
            return Ok(false);
        }
        // Even if nobody has room now: what is due must not keep the thread awake.
        // An older version may have put events off that are to go as they are.
        subscription.progress.wake(if subscription.as_is { u64::MAX } else { now_ms });
        let topic = subscription.row.topic.clone();
        let Some(state) = self.topics.get(&topic) else {
            return Ok(false);
        };
        let end = state.end();
        subscription.order_as(name, state.order_by(), &mut self.batch);
        let more = self.refill(name, &topic)?;
        for _ in 0..STEP {
            let Some(subscription) = self.subscriptions.get_mut(name) else {
                return Ok(false);
            };
            let Some(id) = subscription.consumers.pick() else {
                return Ok(false);
            };
            let Some((position, attempt)) = subscription.progress.take(end) else {
                // One that was passed over may have been the one that its key waited for.
                return Ok(more || subscription.progress.refill().is_some());
            };
            match self.find(&topic, position)? {
                Found::Record(mut record, bytes) => {
                    if self.may_go(name, position, &mut record, now_ms) {
                        self.send(id, name, (position, bytes), attempt, *record);
                    }
                }
                Found::Nothing => self.pass_over(name, position),
                Found::Damaged(_) => {
                    tracing::error!(subscription = name, topic, position, "damaged record skipped");
                    self.metrics.damaged_records.inc();
                    self.pass_over(name, position);
                }
            }
        }
        Ok(true)
    }

    /// Whether a taken event is for this subscription, now. If not, what becomes of it is noted.
    fn may_go(&mut self, name: &str, position: u64, record: &mut Record, now_ms: u64) -> bool {
        let (Some(subscription), Some(event)) =
            (self.subscriptions.get_mut(name), &mut record.event)
        else {
            return true;
        };
        if subscription.as_is {
            return true;
        }
        if let Some(only) = event.attributes.remove(dead_letter::REDRIVE_TO)
            && only != name
        {
            self.pass_over(name, position);
            return false;
        }
        let time =
            |attribute| event.attributes.get(attribute).and_then(|text| cloudevent::millis(text));
        let deliver_at = time(DELIVER_AT);
        // One that had an attempt was due already, whatever a clock says that was set back since.
        let is_new = subscription.progress.spent(position) == 0;
        if let Some(at_ms) = deliver_at.filter(|at_ms| is_new && *at_ms > now_ms) {
            let change = subscription.progress.schedule(position, at_ms);
            subscription.changed(position, change, &mut self.batch);
            return false;
        }
        let expires = time(EXPIRY_TIME);
        if let Some(key) = subscription.key(event)
            && !subscription.progress.claim(position, key, deliver_at.is_none())
        {
            return false;
        }
        // Only now: an event that was put off must be counted by the one who reads it again.
        if expires.is_some_and(|at_ms| at_ms <= now_ms) {
            self.metrics.expired(name);
            self.pass_over(name, position);
            return false;
        }
        true
    }

    /// Reads a piece of the topic again for a key that had events put off. True: there is more to read.
    fn refill(&mut self, name: &str, topic: &str) -> Result<bool, LogError> {
        let Some(subscription) = self.subscriptions.get_mut(name) else {
            return Ok(false);
        };
        if subscription.consumers.pick().is_none() {
            return Ok(false);
        }
        let Some(Refill { key, from, until }) = subscription.progress.refill() else {
            return Ok(false);
        };
        let mut found = Vec::new();
        let mut position = from;
        let piece = until.min(from.saturating_add(REFILL_READS));
        while position < piece && found.len() < STEP {
            if let Found::Record(record, _) = self.find(topic, position)?
                && self.was_put_off(name, key, &record)
            {
                found.push(position);
            }
            position += 1;
        }
        let Some(subscription) = self.subscriptions.get_mut(name) else {
            return Ok(false);
        };
        subscription.progress.refilled(key, &found, position);
        subscription.dirty = true;
        Ok(subscription.progress.refill().is_some())
    }

    /// The same that [`Engine::may_go`] looks at, as far as it does not change with time.
    fn was_put_off(&self, name: &str, key: u64, record: &Record) -> bool {
        let (Some(subscription), Some(event)) = (self.subscriptions.get(name), &record.event)
        else {
            return false;
        };
        let mine = event.attributes.get(dead_letter::REDRIVE_TO).is_none_or(|only| only == name);
        let delayed =
            event.attributes.get(DELIVER_AT).and_then(|text| cloudevent::millis(text)).is_some();
        mine && !delayed && subscription.key(event) == Some(key)
    }

    fn send(
        &mut self,
        id: u64,
        name: &str,
        (position, bytes): (u64, u64),
        attempt: u32,
        record: Record,
    ) {
        let Some(subscription) = self.subscriptions.get_mut(name) else {
            return;
        };
        let open = Open { position, epoch: subscription.row.epoch, bytes };
        if subscription.consumers.send(id, open, attempt, record) {
            return;
        }
        // Its receiver is dropped. What it settled before is still on the way, and its end comes after that.
        subscription.consumers.retire(id);
        subscription.progress.give_back(position);
    }

    /// When the next postponed event is due that someone would take.
    pub(super) fn next_wake(&self) -> Option<u64> {
        self.served.next_wake()
    }
}

fn millis(delay: Duration) -> u64 {
    u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)
}
