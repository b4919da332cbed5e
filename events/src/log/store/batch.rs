//! All changes of one commit: gathered by the engine, kept in the journal as one frame, written to the tables.

use std::collections::BTreeMap;
use std::ops::Range;

use prost::Message;
use redb::{ReadableTable, TableDefinition, WriteTransaction};

use super::super::LogError;
use super::super::record::Place;
use super::reader::readable;
use super::{ATTEMPTS, EVENTS, Found, PROGRESS, SUBSCRIPTIONS, TOPICS};

/// Writing a batch again, or several in their order, changes nothing: every row is absolute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::log) struct Batch {
    pub(in crate::log) topics: BTreeMap<String, Vec<u8>>,
    pub(in crate::log) events: Vec<(Place, Vec<u8>)>,
    /// Positions to remove, by topic id.
    pub(in crate::log) trims: Vec<(u32, Range<u64>)>,
    pub(in crate::log) subscriptions: BTreeMap<String, Option<Vec<u8>>>,
    pub(in crate::log) progress: BTreeMap<u32, Option<Vec<u8>>>,
    pub(in crate::log) attempts: BTreeMap<Place, Option<Vec<u8>>>,
    /// Subscriptions whose attempts all go.
    pub(in crate::log) forget: Vec<u32>,
}

impl Batch {
    pub(in crate::log) fn is_empty(&self) -> bool {
        self.topics.is_empty()
            && self.events.is_empty()
            && self.trims.is_empty()
            && self.subscriptions.is_empty()
            && self.progress.is_empty()
            && self.attempts.is_empty()
            && self.forget.is_empty()
    }

    /// The record that it puts at a place.
    pub(in crate::log) fn find(&self, place: Place) -> Option<Found> {
        if self.removed_until(place).is_some() {
            return Some(Found::Nothing);
        }
        // The last one counts.
        let (_place, frame) = self.events.iter().rev().find(|(at, _frame)| *at == place)?;
        Some(Found::of(place, frame))
    }

    /// The end of the range around a place that it removes.
    pub(super) fn removed_until(&self, place: Place) -> Option<u64> {
        let around = |(topic, positions): &&(u32, Range<u64>)| {
            *topic == place.0 && positions.contains(&place.1)
        };
        self.trims.iter().find(around).map(|(_topic, positions)| positions.end)
    }

    /// Bytes of what is usually most of it, to tell a large batch before it is encoded.
    pub(super) fn event_bytes(&self) -> usize {
        self.events.iter().map(|(_place, frame)| frame.len()).sum()
    }

    /// Writes all of it into a transaction.
    pub(super) fn write(&self, write: &WriteTransaction) -> Result<(), LogError> {
        // First: a subscription that was moved has new rows already.
        for subscription in &self.forget {
            let places = (*subscription, 0)..=(*subscription, u64::MAX);
            write.open_table(ATTEMPTS)?.retain_in(places, |_place, _row| false)?;
        }
        put_all(write, TOPICS, self.topics.iter().map(|(k, v)| (k.as_str(), Some(v))))?;
        let subscriptions = self.subscriptions.iter();
        put_all(write, SUBSCRIPTIONS, subscriptions.map(|(k, v)| (k.as_str(), v.as_ref())))?;
        put_all(write, PROGRESS, self.progress.iter().map(|(k, v)| (*k, v.as_ref())))?;
        put_all(write, ATTEMPTS, self.attempts.iter().map(|(k, v)| (*k, v.as_ref())))?;
        put_all(write, EVENTS, self.events.iter().map(|(k, v)| (*k, Some(v))))?;
        if !self.trims.is_empty() {
            let mut events = write.open_table(EVENTS)?;
            for (topic, positions) in &self.trims {
                let places = (*topic, positions.start)..(*topic, positions.end);
                if is_readable(&events, places.clone())? {
                    events.retain_in(places, |_place, _record| false)?;
                } else {
                    tracing::error!(topic, ?positions, "a page is damaged: what is there stays");
                }
            }
        }
        Ok(())
    }
}

/// Whether rows can be removed: finding out when some are removed already would cost the whole commit.
fn is_readable(
    events: &impl ReadableTable<Place, &'static [u8]>,
    places: Range<Place>,
) -> Result<bool, LogError> {
    let read = readable(|| {
        for row in events.range(places)? {
            row?;
        }
        Ok(())
    });
    Ok(read?.is_some())
}

/// Puts and, where there is no value, removes.
fn put_all<'a, K: redb::Key + 'static>(
    write: &WriteTransaction,
    table: TableDefinition<'_, K, &'static [u8]>,
    rows: impl ExactSizeIterator<Item = (K::SelfType<'a>, Option<&'a Vec<u8>>)>,
) -> Result<(), LogError> {
    if rows.len() == 0 {
        return Ok(());
    }
    let mut table = write.open_table(table)?;
    for (key, value) in rows {
        match value {
            Some(value) => drop(table.insert(key, value.as_slice())?),
            None => drop(table.remove(key)?),
        }
    }
    Ok(())
}

/// A [`Batch`] as it lies in the journal.
#[derive(Clone, PartialEq, Message)]
pub(super) struct BatchRow {
    #[prost(message, repeated, tag = "1")]
    topics: Vec<NamedRow>,
    #[prost(message, repeated, tag = "2")]
    events: Vec<PlacedRow>,
    #[prost(message, repeated, tag = "3")]
    trims: Vec<TrimRow>,
    #[prost(message, repeated, tag = "4")]
    subscriptions: Vec<NamedRow>,
    #[prost(message, repeated, tag = "5")]
    progress: Vec<PlacedRow>,
    #[prost(message, repeated, tag = "6")]
    attempts: Vec<PlacedRow>,
    #[prost(uint32, repeated, tag = "7")]
    forget: Vec<u32>,
}

/// A row with a name; without a value it goes.
#[derive(Clone, PartialEq, Message)]
struct NamedRow {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", optional, tag = "2")]
    value: Option<Vec<u8>>,
}

/// A row with an id and, but for progress, a position; without a value it goes.
#[derive(Clone, PartialEq, Message)]
struct PlacedRow {
    #[prost(uint32, tag = "1")]
    id: u32,
    #[prost(uint64, tag = "2")]
    position: u64,
    #[prost(bytes = "vec", optional, tag = "3")]
    value: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct TrimRow {
    #[prost(uint32, tag = "1")]
    id: u32,
    #[prost(uint64, tag = "2")]
    start: u64,
    #[prost(uint64, tag = "3")]
    end: u64,
}

/// Moves what is in it: a batch is made for every flush.
impl From<Batch> for BatchRow {
    fn from(batch: Batch) -> Self {
        let placed = |((id, position), value)| PlacedRow { id, position, value };
        let named = |(name, value)| NamedRow { name, value };
        let topics = batch.topics.into_iter();
        let events = batch.events.into_iter();
        let trims = batch.trims.into_iter();
        let progress = batch.progress.into_iter();
        Self {
            topics: topics.map(|(name, value)| named((name, Some(value)))).collect(),
            events: events.map(|(at, value)| placed((at, Some(value)))).collect(),
            trims: trims.map(|(id, at)| TrimRow { id, start: at.start, end: at.end }).collect(),
            subscriptions: batch.subscriptions.into_iter().map(named).collect(),
            progress: progress.map(|(id, value)| placed(((id, 0), value))).collect(),
            attempts: batch.attempts.into_iter().map(placed).collect(),
            forget: batch.forget,
        }
    }
}

impl From<BatchRow> for Batch {
    fn from(row: BatchRow) -> Self {
        let place = |row: &PlacedRow| (row.id, row.position);
        let topics = row.topics.into_iter();
        let events = row.events.into_iter();
        Self {
            topics: topics.map(|row| (row.name, row.value.unwrap_or_default())).collect(),
            events: events.map(|row| (place(&row), row.value.unwrap_or_default())).collect(),
            trims: row.trims.into_iter().map(|row| (row.id, row.start..row.end)).collect(),
            subscriptions: row.subscriptions.into_iter().map(|row| (row.name, row.value)).collect(),
            progress: row.progress.into_iter().map(|row| (row.id, row.value)).collect(),
            attempts: row.attempts.into_iter().map(|row| (place(&row), row.value)).collect(),
            forget: row.forget,
        }
    }
}
