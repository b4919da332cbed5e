//! The task that brings waiting events to their bus, those of each topic strictly in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{sleep, timeout};

use super::{Outbox, Spool, size};
use crate::bus::{EventBus, PublishError, PublishErrorKind, Settle};
use crate::cloudevent::{EnvelopeError, Event};
use crate::log::{Log, LogConsumer, LogDelivery, LogError, now_ms};

/// Bytes of one publish to the bus; an event larger than this goes alone.
const GROUP_BYTES: u64 = 1 << 20;
/// Between two tries while the bus is away.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// With nothing to forward for this long, the count of what waits is checked.
const DRIFT_CHECK: Duration = Duration::from_secs(1);

pub(super) struct Forwarder {
    outbox: Arc<Outbox>,
    spool: Arc<Spool>,
    bus: Arc<dyn EventBus>,
}

/// An event in hand.
struct Held {
    delivery: u64,
    published_ms: u64,
    route: String,
    event: Event,
}

impl Forwarder {
    pub(super) fn new(outbox: Arc<Outbox>, spool: Arc<Spool>, bus: Arc<dyn EventBus>) -> Self {
        Self { outbox, spool, bus }
    }

    /// Runs until it is aborted.
    pub(super) async fn run(self) {
        while self.spool.waiting.lock().events == 0 {
            self.spool.filled.notified().await;
        }
        loop {
            // It ends only when the store failed; the store opens again by itself.
            if let Err(error) = self.forward_all().await {
                tracing::error!(bus = self.spool.bus, %error, "the outbox cannot be read; trying again");
            }
            sleep(LONGEST_PAUSE).await;
        }
    }

    async fn forward_all(&self) -> Result<(), LogError> {
        let log = self.outbox.log().await?;
        let spec = self.outbox.prepare(&log, &self.spool).await?;
        let subscription = spec.name.clone();
        let mut consumer = log.consume_as_is(spec).await?;
        self.recount(&log, &subscription).await?;
        let mut next = None;
        loop {
            let first = match next.take() {
                Some(held) => held,
                None => match timeout(DRIFT_CHECK, consumer.deliveries.recv()).await {
                    Ok(Some(delivery)) => match self.hold(delivery, &consumer) {
                        Some(held) => held,
                        None => continue,
                    },
                    Ok(None) => return Err(LogError::Closed),
                    Err(_nothing_came) => {
                        self.recount(&log, &subscription).await?;
                        continue;
                    }
                },
            };
            let oldest_ms = first.published_ms;
            let mut group = vec![first];
            next = self.fill(&mut group, &mut consumer);
            // All topics at once: one publish for each change of topic would bring an application that writes to several
            // ones no faster than the bus answers, and its new events queue behind the old ones.
            let topics = by_topic(group).into_values();
            join_all(topics.map(|group| self.forward(group, oldest_ms, &consumer))).await;
        }
    }

    /// Compares the count with what the log holds, while nothing is in hand. A record that was damaged on disk is skipped by
    /// the log and would be counted for ever; one that was forwarded and comes again, since the log failed before it wrote
    /// that down, was counted off.
    async fn recount(&self, log: &Log, subscription: &str) -> Result<(), LogError> {
        let kept_before = self.spool.waiting.lock().kept;
        let backlog = log.backlog(subscription).await?;
        let waiting = self.spool.waiting.lock();
        if waiting.appending > 0 || waiting.kept != kept_before {
            return Ok(());
        }
        let lost = waiting.events.saturating_sub(backlog.events);
        let again = backlog.events.saturating_sub(waiting.events);
        drop(waiting);
        if again > 0 {
            self.outbox.count_in(&self.spool, again, 0);
        }
        if lost == 0 {
            return Ok(());
        }
        tracing::error!(bus = self.spool.bus, lost, "events in the outbox were damaged on disk");
        self.outbox.remove(&self.spool, lost, 0);
        Ok(())
    }

    /// Adds what is there already. What is too much is returned.
    fn fill(&self, group: &mut Vec<Held>, consumer: &mut LogConsumer) -> Option<Held> {
        let mut bytes: u64 = group.iter().map(|held| size(&held.event)).sum();
        while bytes < GROUP_BYTES {
            let Ok(delivery) = consumer.deliveries.try_recv() else {
                return None;
            };
            let Some(held) = self.hold(delivery, consumer) else {
                continue;
            };
            bytes += size(&held.event);
            if bytes > GROUP_BYTES {
                return Some(held);
            }
            group.push(held);
        }
        None
    }

    fn hold(&self, delivery: LogDelivery, consumer: &LogConsumer) -> Option<Held> {
        let record = delivery.record;
        let event = record.event.unwrap_or_default();
        match event.try_into() {
            Ok(event) => Some(Held {
                delivery: delivery.id,
                published_ms: record.published_ms,
                route: record.route,
                event,
            }),
            Err(error) => {
                // Written by a version with other rules: not ours to send, not ours to lose.
                let error: EnvelopeError = error;
                self.reject(delivery.id, 0, &error.to_string(), consumer);
                None
            }
        }
    }

    /// Returns when the bus has all of this topic, or will never take them.
    async fn forward(&self, group: Vec<Held>, oldest_ms: u64, consumer: &LogConsumer) {
        let Err(error) = self.publish(&group, oldest_ms).await else {
            self.done(&group, consumer);
            return;
        };
        if let [poison] = group.as_slice() {
            self.reject(poison.delivery, size(&poison.event), &error.to_string(), consumer);
            return;
        }
        // One of them is poison; the others must not suffer, nor change places.
        for held in group {
            let alone = [held];
            match self.publish(&alone, oldest_ms).await {
                Ok(()) => self.done(&alone, consumer),
                Err(error) => {
                    let [held] = alone;
                    self.reject(held.delivery, size(&held.event), &error.to_string(), consumer);
                }
            }
        }
    }

    /// Tries until the bus takes them or says that it never will.
    async fn publish(&self, group: &[Held], oldest_ms: u64) -> Result<(), PublishError> {
        let Some(first) = group.first() else {
            return Ok(());
        };
        let mut pause = FIRST_PAUSE;
        let mut said = None;
        loop {
            let age_ms = now_ms().saturating_sub(oldest_ms);
            let oldest = self.outbox.metrics.oldest_seconds.with_label_values(&[&self.spool.bus]);
            oldest.set(age_ms as f64 / 1e3);
            let events = group.iter().map(|held| held.event.clone()).collect();
            match self.bus.publish(&first.route, events).await {
                Ok(_published) => return Ok(()),
                Err(error) if is_poison(&error) => return Err(error),
                Err(error) => {
                    let bus = &self.spool.bus;
                    if error.is_unavailable() {
                        tracing::debug!(bus, %error, "the outbox waits for the bus");
                    } else if said.as_ref() != Some(&error.message) {
                        // It may be so for ever, and all that comes later waits.
                        let topic = &first.route;
                        tracing::warn!(bus, topic, %error, "the bus does not take what waits in the outbox");
                        said = Some(error.message);
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    fn done(&self, group: &[Held], consumer: &LogConsumer) {
        for held in group {
            consumer.backend.settle(held.delivery, Settle::Ack);
        }
        let count = group.len() as u64;
        self.outbox.metrics.forwarded.with_label_values(&[&self.spool.bus]).inc_by(count);
        let bytes = group.iter().map(|held| size(&held.event)).sum();
        self.outbox.remove(&self.spool, count, bytes);
    }

    /// Moves one event aside, where people can look at it.
    fn reject(&self, delivery: u64, bytes: u64, reason: &str, consumer: &LogConsumer) {
        tracing::error!(
            bus = self.spool.bus,
            reason,
            "the bus will never take this event; moved aside"
        );
        let dead = Settle::DeadLetter { reason: reason.to_owned(), status: 0 };
        consumer.backend.settle(delivery, dead);
        self.outbox.metrics.rejected.with_label_values(&[&self.spool.bus]).inc();
        self.outbox.remove(&self.spool, 1, bytes);
    }
}

/// Those of each topic, in their order.
fn by_topic(group: Vec<Held>) -> BTreeMap<String, Vec<Held>> {
    let mut topics = BTreeMap::<String, Vec<Held>>::new();
    for held in group {
        topics.entry(held.route.clone()).or_default().push(held);
    }
    topics
}

/// A bus that is not known may be declared again; an event or topic that is refused stays refused.
fn is_poison(error: &PublishError) -> bool {
    use PublishErrorKind::{
        Denied, Full, Internal, Invalid, Unavailable, UnknownBus, UnknownTopic,
    };
    match error.kind {
        Invalid | UnknownTopic | Denied => true,
        UnknownBus | Full | Unavailable | Internal => false,
    }
}
