//! The task that brings waiting events to their bus, those of each topic strictly in order, and no topic waiting for another.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::time::{sleep, timeout};

use super::{Outbox, Spool, size};
use crate::bus::{ConsumerBackend, EventBus, PublishError, PublishErrorKind, Settle};
use crate::cloudevent::{EnvelopeError, Event};
use crate::log::{Log, LogConsumer, LogDelivery, LogError, now_ms};

/// Bytes of one publish to the bus; an event larger than this goes alone.
const GROUP_BYTES: u64 = 1 << 20;
/// Events of one publish, and topics with a publish open.
const GROUP_EVENTS: usize = 256;
const MOST_OPEN: usize = 256;
/// Between two tries while the bus is away.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// An event that waits for longer is told in the log, once until all have left.
const LONG_WAIT_MS: u64 = 5_000;
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
    event: Event,
}

/// What is in hand of one topic, in order. A topic that the bus does not take just now holds up no other.
#[derive(Default)]
struct Lane {
    waiting: VecDeque<Held>,
    /// While a publish is open: when its first event was put here.
    open_ms: Option<u64>,
}

impl Lane {
    /// What goes next, in one publish, where none is open.
    fn next(&mut self) -> Option<Vec<Held>> {
        let first = self.waiting.front().filter(|_| self.open_ms.is_none())?;
        self.open_ms = Some(first.published_ms);
        let (mut group, mut bytes) = (Vec::new(), 0);
        while let Some(held) = self.waiting.front() {
            bytes += size(&held.event);
            if !group.is_empty() && (bytes > GROUP_BYTES || group.len() >= GROUP_EVENTS) {
                break;
            }
            group.extend(self.waiting.pop_front());
        }
        Some(group)
    }

    fn oldest_ms(&self) -> Option<u64> {
        self.open_ms.or_else(|| self.waiting.front().map(|held| held.published_ms))
    }
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
        let LogConsumer { mut deliveries, backend } = log.consume_as_is(spec).await?;
        self.recount(&log, &subscription).await?;
        let mut lanes = BTreeMap::<String, Lane>::new();
        let mut open = FuturesUnordered::new();
        let mut told = false;
        loop {
            // All topics at once, and each on its own: one publish for each change of topic would bring an application that
            // writes to several ones no faster than the bus answers, and its new events queue behind the old ones.
            for (topic, lane) in &mut lanes {
                if open.len() < MOST_OPEN
                    && let Some(group) = lane.next()
                {
                    open.push(self.forward(topic.clone(), group, &*backend));
                }
            }
            self.note_oldest(&lanes, &mut told);
            tokio::select! {
                Some(topic) = open.next(), if !open.is_empty() => {
                    if let Some(lane) = lanes.get_mut(&topic) {
                        lane.open_ms = None;
                    }
                    lanes.retain(|_, lane| lane.oldest_ms().is_some());
                }
                delivery = timeout(DRIFT_CHECK, deliveries.recv()) => match delivery {
                    Ok(Some(delivery)) => {
                        self.take(delivery, &mut lanes, &*backend);
                        // What is there already goes along.
                        while let Ok(delivery) = deliveries.try_recv() {
                            self.take(delivery, &mut lanes, &*backend);
                        }
                    }
                    Ok(None) => return Err(LogError::Closed),
                    Err(_nothing_came) => self.recount(&log, &subscription).await?,
                },
            }
        }
    }

    /// Says how old the oldest event is that is on its way or next.
    fn note_oldest(&self, lanes: &BTreeMap<String, Lane>, told: &mut bool) {
        let bus = &self.spool.bus;
        let oldest_ms = lanes.values().filter_map(Lane::oldest_ms).min();
        if let Some(oldest_ms) = oldest_ms {
            let age_ms = now_ms().saturating_sub(oldest_ms);
            let oldest = self.outbox.metrics.oldest_seconds.with_label_values(&[bus]);
            oldest.set(age_ms as f64 / 1e3);
            if age_ms > LONG_WAIT_MS && !std::mem::replace(told, true) {
                let events = self.spool.waiting.lock().events;
                tracing::warn!(bus, events, "events wait in the outbox until the bus takes them");
            }
        } else if std::mem::take(told) {
            tracing::info!(bus, "what waited in the outbox has left it");
        }
    }

    /// Compares the count with what the log holds, while nothing is settled. A record that was damaged on disk is skipped by
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

    /// Puts an event behind the others of its topic.
    fn take(
        &self,
        delivery: LogDelivery,
        lanes: &mut BTreeMap<String, Lane>,
        backend: &dyn ConsumerBackend,
    ) {
        let (delivery, record) = (delivery.id, delivery.record);
        let event: Result<Event, EnvelopeError> = record.event.unwrap_or_default().try_into();
        match event {
            Ok(event) => {
                let held = Held { delivery, published_ms: record.published_ms, event };
                lanes.entry(record.route).or_default().waiting.push_back(held);
            }
            // Written by a version with other rules: not ours to send, not ours to lose.
            Err(error) => self.reject(delivery, 0, &error.to_string(), backend),
        }
    }

    /// Returns the topic when the bus has all of these, or will never take them.
    async fn forward(
        &self,
        topic: String,
        group: Vec<Held>,
        backend: &dyn ConsumerBackend,
    ) -> String {
        let Err(error) = self.publish(&topic, &group).await else {
            self.done(&group, backend);
            return topic;
        };
        if let [poison] = group.as_slice() {
            self.reject(poison.delivery, size(&poison.event), &error.to_string(), backend);
            return topic;
        }
        // One of them is poison; the others must not suffer, nor change places.
        for held in group {
            let alone = [held];
            match self.publish(&topic, &alone).await {
                Ok(()) => self.done(&alone, backend),
                Err(error) => {
                    let [held] = alone;
                    self.reject(held.delivery, size(&held.event), &error.to_string(), backend);
                }
            }
        }
        topic
    }

    /// Tries until the bus takes them or says that it never will.
    async fn publish(&self, topic: &str, group: &[Held]) -> Result<(), PublishError> {
        let mut pause = FIRST_PAUSE;
        let mut said = None;
        loop {
            let events = group.iter().map(|held| held.event.clone()).collect();
            match self.bus.publish(topic, events).await {
                Ok(_published) => return Ok(()),
                Err(error) if is_poison(&error) => return Err(error),
                Err(error) => {
                    let bus = &self.spool.bus;
                    if error.is_unavailable() {
                        tracing::debug!(bus, topic, %error, "the outbox waits for the bus");
                    } else if said.as_ref() != Some(&error.message) {
                        // It may be so for ever, and all that comes later waits.
                        tracing::warn!(bus, topic, %error, "the bus does not take what waits in the outbox");
                        said = Some(error.message);
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    fn done(&self, group: &[Held], backend: &dyn ConsumerBackend) {
        for held in group {
            backend.settle(held.delivery, Settle::Ack);
        }
        let count = group.len() as u64;
        self.outbox.metrics.forwarded.with_label_values(&[&self.spool.bus]).inc_by(count);
        let bytes = group.iter().map(|held| size(&held.event)).sum();
        self.outbox.remove(&self.spool, count, bytes);
    }

    /// Moves one event aside, where people can look at it.
    fn reject(&self, delivery: u64, bytes: u64, reason: &str, backend: &dyn ConsumerBackend) {
        tracing::error!(
            bus = self.spool.bus,
            reason,
            "the bus will never take this event; moved aside"
        );
        let dead = Settle::DeadLetter { reason: reason.to_owned(), status: 0 };
        backend.settle(delivery, dead);
        self.outbox.metrics.rejected.with_label_values(&[&self.spool.bus]).inc();
        self.outbox.remove(&self.spool, 1, bytes);
    }
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
