//! One topic in memory: bounds, settings, and what it saw lately.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use duet_api::proto;

use super::dedup::{Dedup, Fingerprint};
use super::record::{Place, TopicRow, Unsealed};
use super::store::{Batch, Found, Store};
use super::{LogError, Prepared, TopicConfig};
use crate::bus::{Published, dead_letter};

/// Most records that one trim looks at, so that publishers do not wait for it. The next one comes in the next turn.
pub(super) const TRIM_STEP: u64 = 2048;

/// A clock may be corrected by so much, in milliseconds.
const FUTURE_MS: u64 = 60_000;

#[derive(Debug)]
pub(super) struct Topic {
    row: TopicRow,
    dedup: Dedup,
    /// The last trim ended before it was through.
    trims_more: bool,
    /// One past the last position that is in the store.
    stored_end: u64,
    /// (`source`, `id`) by position of events that are in the current batch, so not in the store yet.
    unwritten: BTreeMap<u64, (String, String)>,
}

impl Topic {
    pub(super) fn new(id: u32, config: &TopicConfig) -> Self {
        let row = TopicRow {
            id,
            first: 1,
            next: 1,
            bytes: 0,
            dedup_window_ms: millis(config.dedup_window),
            retention_age_ms: config.retention_age.map(millis),
            retention_bytes: config.retention_bytes,
            holes: 0,
            drop_unhandled: config.drop_unhandled,
            order_by: config.order_by.clone(),
            declared: false,
        };
        Self {
            dedup: Dedup::new(row.dedup_window_ms),
            row,
            trims_more: false,
            stored_end: 1,
            unwritten: BTreeMap::new(),
        }
    }

    /// Reads the youngest records back, as far as the window reaches.
    pub(super) fn restore(row: TopicRow, store: &mut Store, now_ms: u64) -> Result<Self, LogError> {
        let dedup = Dedup::new(row.dedup_window_ms);
        let stored_end = row.next;
        let unwritten = BTreeMap::new();
        let mut topic = Self { row, dedup, trims_more: false, stored_end, unwritten };
        topic.remember_window(store, now_ms)?;
        Ok(topic)
    }

    /// Positions below `end` were given to events already, whatever became of those. True if that is news.
    pub(super) fn begin_at(&mut self, end: u64) -> bool {
        let missing = end.saturating_sub(self.row.next);
        self.row.next += missing;
        self.row.holes += missing;
        self.stored_end = self.row.next;
        missing > 0
    }

    fn remember_window(&mut self, store: &mut Store, now_ms: u64) -> Result<(), LogError> {
        if !self.dedup.is_on() {
            return Ok(());
        }
        let horizon = self.dedup.horizon_ms(now_ms);
        for position in (self.row.first..self.row.next).rev() {
            let Found::Record(record, _) = store.find(self.place(position))? else {
                continue;
            };
            if record.published_ms < horizon {
                break;
            }
            // One that was moved back is for a single subscription: others are to get what is published anew.
            let Some(event) = record.event.filter(|event| !is_redriven(event)) else {
                continue;
            };
            let print = self.dedup.fingerprint(&event.source, &event.id);
            if !self.dedup.insert_older(print, position, record.published_ms) {
                break;
            }
        }
        Ok(())
    }

    /// Takes new settings, and whether a resource has them, while none of its events is in the batch. True if they differ
    /// from the old ones, and have to be written.
    pub(super) fn configure(
        &mut self,
        config: &TopicConfig,
        declared: bool,
        store: &mut Store,
        now_ms: u64,
    ) -> Result<bool, LogError> {
        let old = self.row.clone();
        self.row.declared = declared;
        self.row.dedup_window_ms = millis(config.dedup_window);
        self.row.retention_age_ms = config.retention_age.map(millis);
        self.row.retention_bytes = config.retention_bytes;
        self.row.drop_unhandled = config.drop_unhandled;
        self.row.order_by.clone_from(&config.order_by);
        if self.row.dedup_window_ms != old.dedup_window_ms {
            self.reread_window(store, now_ms)?;
        }
        Ok(self.row != old)
    }

    /// Keeps everything and takes everything, unless a resource says otherwise. True if that is new.
    pub(super) fn keep_all(&mut self) -> bool {
        let old = self.row.clone();
        if old.declared {
            return false;
        }
        (self.row.retention_age_ms, self.row.retention_bytes) = (None, None);
        self.row.dedup_window_ms = 0;
        if self.row == old {
            return false;
        }
        self.dedup = Dedup::new(0);
        true
    }

    /// Events that are there.
    pub(super) fn events(&self) -> u64 {
        let row = &self.row;
        row.next.saturating_sub(row.first).saturating_sub(row.holes)
    }

    /// After a change of the window: what the store holds of it, which is everything.
    fn reread_window(&mut self, store: &mut Store, now_ms: u64) -> Result<(), LogError> {
        self.dedup = Dedup::new(self.row.dedup_window_ms);
        self.remember_window(store, now_ms)
    }

    pub(super) fn row(&self) -> &TopicRow {
        &self.row
    }

    pub(super) fn place(&self, position: u64) -> Place {
        (self.row.id, position)
    }

    /// The attribute by which ordered subscriptions order.
    pub(super) fn order_by(&self) -> &str {
        match self.row.order_by.as_str() {
            "" => crate::cloudevent::PARTITION_KEY,
            named => named,
        }
    }

    /// One past the last position.
    pub(super) fn end(&self) -> u64 {
        self.row.next
    }

    /// The first position published at or after a time. Publishing times never fall, but for a clock that was set
    /// back.
    pub(super) fn first_at(&self, ms: u64, store: &mut Store) -> Result<u64, LogError> {
        let (mut low, mut high) = (self.row.first, self.stored_end);
        while low < high {
            let middle = low + (high - low) / 2;
            match store.first(self.place(middle), high)? {
                Some((position, record)) if record.published_ms < ms => low = position + 1,
                // Nothing is left from the middle on, or everything that is left is young enough.
                Some(_) | None => high = middle,
            }
        }
        Ok(low)
    }

    /// Adds an event to the batch, unless the window holds it already.
    pub(super) fn append(
        &mut self,
        entry: Prepared,
        batch: &mut Batch,
        store: &mut Store,
        now_ms: u64,
    ) -> Result<Published, LogError> {
        if !self.dedup.is_on() {
            let position = self.push(entry.record, batch);
            return Ok(Published { position, duplicate: false });
        }
        let print = self.dedup.fingerprint(&entry.source, &entry.id);
        if let Some(position) = self.duplicate_of(&entry, print, store, now_ms)? {
            return Ok(Published { position, duplicate: true });
        }
        let position = self.push(entry.record, batch);
        if !self.dedup.insert(print, position, now_ms) {
            tracing::warn!(topic = self.row.id, "deduplication window cut short: too many events");
        }
        self.unwritten.insert(position, (entry.source, entry.id));
        Ok(Published { position, duplicate: false })
    }

    /// Adds a record to the batch whatever it is.
    pub(super) fn push(&mut self, record: Unsealed, batch: &mut Batch) -> u64 {
        let position = self.row.next;
        let frame = record.seal(self.place(position));
        self.row.next += 1;
        self.row.bytes += frame.len() as u64;
        batch.events.push((self.place(position), frame));
        position
    }

    /// Takes an event out that is in the store.
    pub(super) fn remove(&mut self, position: u64, length: u64, batch: &mut Batch) {
        batch.trims.push((self.row.id, Range { start: position, end: position + 1 }));
        self.give_up_bytes(length);
        self.row.holes += 1;
    }

    /// One event goes. What lies on a page that cannot be read has no length any more, and is taken for one like the
    /// others: retention by size would count it for ever.
    fn give_up_bytes(&mut self, length: u64) {
        let bytes = self.row.bytes;
        self.row.bytes = match (self.events(), length) {
            (0 | 1, _) => 0,
            (events, 0) => bytes - bytes / events,
            (_, length) => bytes.saturating_sub(length),
        };
    }

    fn duplicate_of(
        &self,
        entry: &Prepared,
        print: Fingerprint,
        store: &mut Store,
        now_ms: u64,
    ) -> Result<Option<u64>, LogError> {
        let horizon = self.dedup.horizon_ms(now_ms);
        for position in self.dedup.candidates(print) {
            if let Some((source, id)) = self.unwritten.get(&position) {
                if (source, id) == (&entry.source, &entry.id) {
                    return Ok(Some(position));
                }
                continue;
            }
            let Found::Record(record, _) = store.find(self.place(position))? else {
                continue;
            };
            let same = |event: &proto::Event| event.source == entry.source && event.id == entry.id;
            if record.published_ms >= horizon && record.event.as_ref().is_some_and(same) {
                return Ok(Some(position));
            }
        }
        Ok(None)
    }

    /// Whether there are events in the batch.
    pub(super) fn has_unwritten(&self) -> bool {
        self.stored_end < self.row.next
    }

    /// The store has the batch now.
    pub(super) fn written(&mut self) {
        self.unwritten.clear();
        self.stored_end = self.row.next;
    }

    /// Removes what retention allows, below `floor`, the lowest position that a subscription still needs (unless this
    /// topic takes that as well), and older than the deduplication window. True if the row changed.
    pub(super) fn trim(
        &mut self,
        floor: u64,
        batch: &mut Batch,
        store: &mut Store,
        now_ms: u64,
    ) -> Result<bool, LogError> {
        self.dedup.expire(now_ms);
        // What is still in the batch cannot be seen yet, which is not the same as gone.
        let floor = if self.row.drop_unhandled { u64::MAX } else { floor };
        let floor = floor.min(self.stored_end);
        let start = self.row.first;
        // More than publishers bring at the same time.
        let step = TRIM_STEP.max(batch.events.len() as u64 * 2);
        self.trims_more = false;
        while self.row.first < floor {
            if self.row.first - start == step {
                self.trims_more = true;
                break;
            }
            let (published_ms, length) = match store.find(self.place(self.row.first))? {
                Found::Record(record, length) => (record.published_ms, length),
                // Nothing of it can be delivered any more, so nothing is lost.
                Found::Damaged(length) => (0, length),
                Found::Nothing => {
                    self.row.first += 1;
                    self.row.holes = self.row.holes.saturating_sub(1);
                    continue;
                }
            };
            if !self.may_go(published_ms, now_ms) {
                break;
            }
            self.give_up_bytes(length);
            self.row.first += 1;
        }
        if self.row.first == start {
            return Ok(false);
        }
        batch.trims.push((self.row.id, Range { start, end: self.row.first }));
        Ok(true)
    }

    /// From the next trim on, looks again for what retention may take.
    pub(super) fn trim_anew(&mut self) {
        self.trims_more = true;
    }

    /// Whether the last trim ended before it was through.
    pub(super) fn trims_more(&self) -> bool {
        self.trims_more
    }

    fn may_go(&self, published_ms: u64, now_ms: u64) -> bool {
        let age = now_ms.saturating_sub(published_ms);
        let too_old = self.row.retention_age_ms.is_some_and(|limit| age >= limit);
        let too_large = self.row.retention_bytes.is_some_and(|limit| self.row.bytes > limit);
        // After the clock was set back nobody knows how old it is; the disk must not fill up until it says so again.
        let from_the_future = published_ms > now_ms.saturating_add(FUTURE_MS);
        (too_old || too_large) && (age >= self.row.dedup_window_ms || from_the_future)
    }
}

fn is_redriven(event: &proto::Event) -> bool {
    event.attributes.contains_key(dead_letter::REDRIVE_TO)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
