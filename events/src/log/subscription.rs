//! One subscription in memory: its row, how far it is, and who consumes it.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;

use duet_api::proto;
use prost::Message;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::consumers::Consumers;
use super::metrics::LogMetrics;
use super::progress::{Progress, RowChange};
use super::record::{AttemptRow, ProgressRow, SubscriptionRow};
use super::store::{Batch, Contents};
use super::topic::Topic;
use crate::bus::SubscriptionSpec;
use crate::cloudevent::order_key;

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) row: SubscriptionRow,
    pub(super) progress: Progress,
    /// Progress is ahead of what the store knows.
    pub(super) dirty: bool,
    pub(super) consumers: Consumers,
    /// Its consumer takes every event as it is; see [`super::Log::consume_as_is`].
    pub(super) as_is: bool,
}

impl Subscription {
    /// A new one, not in the store yet.
    pub(super) fn new(row: SubscriptionRow, progress: Progress) -> Self {
        Self { row, progress, dirty: true, consumers: Consumers::default(), as_is: false }
    }

    /// Takes new settings; what it has handled stays handled.
    pub(super) fn configure(&mut self, spec: &SubscriptionSpec, batch: &mut Batch) {
        let old = self.row.clone();
        let new = new_row(old.id, spec);
        self.row.dead_letter_topic = new.dead_letter_topic;
        self.row.ordered = new.ordered;
        self.row.idle_expiry_ms = new.idle_expiry_ms;
        if self.row != old {
            batch.subscriptions.insert(spec.name.clone(), Some(self.row.encode_to_vec()));
        }
    }

    /// Notes that a resource declares it, whoever made it. True if that is news.
    pub(super) fn mark_declared(&mut self, name: &str, batch: &mut Batch) -> bool {
        let news = !std::mem::replace(&mut self.row.declared, true);
        if news {
            batch.subscriptions.insert(name.to_owned(), Some(self.row.encode_to_vec()));
        }
        news
    }

    /// Counts how long nobody consumes it. True: for longer than it asked for.
    pub(super) fn is_forgotten(&mut self, name: &str, now_ms: u64, batch: &mut Batch) -> bool {
        let since = self.row.idle_since_ms;
        let idle = self.consumers.is_empty() && self.row.idle_expiry_ms.is_some();
        if idle == (since == 0) {
            self.row.idle_since_ms = if idle { now_ms.max(1) } else { 0 };
            batch.subscriptions.insert(name.to_owned(), Some(self.row.encode_to_vec()));
        }
        let limit = self.row.idle_expiry_ms.unwrap_or(u64::MAX);
        idle && since > 0 && now_ms.saturating_sub(since) >= limit
    }

    /// The clock was set back: nothing waits longer for that.
    pub(super) fn clock_set_back(&mut self, by_ms: u64) {
        self.progress.clock_set_back(by_ms);
        if self.row.idle_since_ms > 0 {
            self.row.idle_since_ms = self.row.idle_since_ms.saturating_sub(by_ms).max(1);
        }
    }

    /// Orders as it and its topic ask for. A change waits until nothing has to be read again by the old order.
    pub(super) fn order_as(&mut self, name: &str, order_by: &str, batch: &mut Batch) {
        let wanted = if self.row.ordered { order_by } else { "" };
        if self.row.order_by == wanted || !self.progress.may_reorder() {
            return;
        }
        self.progress.reorder();
        wanted.clone_into(&mut self.row.order_by);
        batch.subscriptions.insert(name.to_owned(), Some(self.row.encode_to_vec()));
    }

    /// The lane of an event, if it has one.
    pub(super) fn key(&self, event: &proto::Event) -> Option<u64> {
        let required = [event.id.as_str(), event.source.as_str(), event.r#type.as_str()];
        let attribute = |name: &str| event.attributes.get(name).map(String::as_str);
        let key = order_key(&self.row.order_by, required, attribute)?;
        Some(xxh3_64_with_seed(key.as_bytes(), self.row.seed).max(1))
    }

    /// Writes what became of one event.
    pub(super) fn changed(&mut self, position: u64, change: RowChange, batch: &mut Batch) {
        self.dirty = true;
        let place = (self.row.id, position);
        match change {
            RowChange::None => {}
            RowChange::Put(row) => {
                batch.attempts.insert(place, Some(row.encode_to_vec()));
            }
            RowChange::Delete => {
                batch.attempts.insert(place, None);
            }
        }
    }

    /// Starts anew elsewhere. What is in flight is no longer part of it.
    pub(super) fn move_to(&mut self, name: &str, position: u64, batch: &mut Batch) {
        self.progress = Progress::starting_at(position);
        self.row.epoch = self.row.epoch.wrapping_add(1);
        batch.subscriptions.insert(name.to_owned(), Some(self.row.encode_to_vec()));
        self.dirty = true;
        let id = self.row.id;
        batch.attempts.retain(|place, _row| place.0 != id);
        batch.forget.push(id);
    }
}

/// The row of a subscription that nobody has consumed.
pub(super) fn new_row(id: u32, spec: &SubscriptionSpec) -> SubscriptionRow {
    let idle_expiry_ms =
        spec.idle_expiry.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
    SubscriptionRow {
        id,
        topic: spec.topic.clone(),
        dead_letter_topic: spec.dead_letter_topic.clone(),
        paused: false,
        ordered: spec.ordered,
        order_by: String::new(),
        seed: RandomState::new().hash_one(&spec.name),
        idle_expiry_ms,
        idle_since_ms: 0,
        declared: false,
        epoch: 0,
    }
}

/// All subscriptions, by name. What is stored of their progress and makes no sense is taken so that no event is lost.
pub(super) fn load(
    contents: &Contents,
    topics: &BTreeMap<String, Topic>,
    metrics: &LogMetrics,
    now_ms: u64,
    batch: &mut Batch,
) -> BTreeMap<String, Subscription> {
    let progress: HashMap<u32, &Vec<u8>> = contents.progress.iter().map(|(k, v)| (*k, v)).collect();
    let mut attempts: HashMap<u32, Vec<(u64, AttemptRow)>> = HashMap::new();
    for ((id, position), bytes) in &contents.attempts {
        // Without its row it would count as handled.
        let row = read_row(metrics, &format!("attempts of subscription {id} at {position}"), bytes);
        attempts.entry(*id).or_default().push((*position, row.unwrap_or_default()));
    }
    let mut subscriptions = BTreeMap::new();
    for (name, bytes) in &contents.subscriptions {
        let Some(mut row) =
            read_row::<SubscriptionRow>(metrics, &format!("subscription {name}"), bytes)
        else {
            continue;
        };
        // While the log was closed nobody could consume it; that must not count against it.
        row.idle_since_ms = 0;
        let stored = progress.get(&row.id).map_or(&[][..], |bytes| bytes.as_slice());
        let stored = read_row::<ProgressRow>(metrics, &format!("progress of {name}"), stored);
        let attempts = attempts.remove(&row.id).unwrap_or_default();
        let subscription = match stored {
            Some(stored) => {
                let progress = Progress::restore(&stored, &attempts, now_ms);
                Subscription { dirty: false, ..Subscription::new(row, progress) }
            }
            None => {
                // Everything again. Attempts would say that what is before them was handled.
                batch.forget.push(row.id);
                let first = topics.get(&row.topic).map_or(0, |topic| topic.row().first);
                Subscription::new(row, Progress::starting_at(first))
            }
        };
        subscriptions.insert(name.clone(), subscription);
    }
    subscriptions
}

/// A row of the store. One that makes no sense was altered, or written by something else: it is named, and counted.
pub(super) fn read_row<R: Message + Default>(
    metrics: &LogMetrics,
    name: &str,
    bytes: &[u8],
) -> Option<R> {
    let row = R::decode(bytes).inspect_err(|error| {
        tracing::error!(row = name, %error, "a row of the log cannot be read; it goes on without");
        metrics.damaged_records.inc();
    });
    row.ok()
}
