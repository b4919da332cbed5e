//! One subscription in memory: its row, how far it is, and who consumes it.

use std::collections::{BTreeMap, HashMap};

use prost::Message;

use super::LogError;
use super::consumers::Consumers;
use super::progress::{Progress, RowChange};
use super::record::{AttemptRow, ProgressRow, SubscriptionRow};
use super::store::{Batch, Contents};

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) row: SubscriptionRow,
    pub(super) progress: Progress,
    /// Progress is ahead of what the store knows.
    pub(super) dirty: bool,
    pub(super) consumers: Consumers,
    /// Counts how often it was moved; see [`super::consumers::Open`].
    pub(super) epoch: u32,
}

impl Subscription {
    /// A new one, not in the store yet.
    pub(super) fn new(row: SubscriptionRow, progress: Progress) -> Self {
        Self { row, progress, dirty: true, consumers: Consumers::default(), epoch: 0 }
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
    pub(super) fn move_to(&mut self, position: u64, batch: &mut Batch) {
        self.progress = Progress::starting_at(position);
        self.epoch += 1;
        self.dirty = true;
        let id = self.row.id;
        batch.attempts.retain(|place, _row| place.0 != id);
        batch.forget.push(id);
    }
}

/// All subscriptions, by name.
pub(super) fn load(contents: &Contents) -> Result<BTreeMap<String, Subscription>, LogError> {
    let progress: HashMap<u32, &Vec<u8>> = contents.progress.iter().map(|(k, v)| (*k, v)).collect();
    let mut attempts: HashMap<u32, Vec<(u64, AttemptRow)>> = HashMap::new();
    for ((id, position), bytes) in &contents.attempts {
        let row = AttemptRow::decode(bytes.as_slice())
            .map_err(|error| unreadable("an attempt", &error))?;
        attempts.entry(*id).or_default().push((*position, row));
    }
    let mut subscriptions = BTreeMap::new();
    for (name, bytes) in &contents.subscriptions {
        let row =
            SubscriptionRow::decode(bytes.as_slice()).map_err(|error| unreadable(name, &error))?;
        let stored = progress.get(&row.id).map_or(&[][..], |bytes| bytes.as_slice());
        let stored = ProgressRow::decode(stored).map_err(|error| unreadable(name, &error))?;
        let attempts = attempts.remove(&row.id).unwrap_or_default();
        let progress = Progress::restore(&stored, &attempts);
        let subscription = Subscription { dirty: false, ..Subscription::new(row, progress) };
        subscriptions.insert(name.clone(), subscription);
    }
    Ok(subscriptions)
}

/// A row that makes no sense: written by something else.
pub(super) fn unreadable(name: &str, error: &prost::DecodeError) -> LogError {
    LogError::Store(format!("the row of {name} cannot be read: {error}"))
}
