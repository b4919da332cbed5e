//! Reading events from the tables, which may be damaged.

use std::panic::{AssertUnwindSafe, catch_unwind};

use redb::{ReadOnlyTable, ReadTransaction, StorageError};

use super::super::LogError;
use super::super::record::{Place, Record, unseal};
use super::EVENTS;

/// Reads events as of one moment.
pub(super) struct Reader {
    events: ReadOnlyTable<Place, &'static [u8]>,
}

/// What was found at a place.
#[derive(Debug)]
pub(in crate::log) enum Found {
    /// The record and the bytes that it takes.
    Record(Box<Record>, u64),
    /// Something, but not what was written.
    Damaged(u64),
    /// Nothing.
    Nothing,
}

impl Found {
    pub(super) fn of(place: Place, frame: &[u8]) -> Self {
        let length = frame.len() as u64;
        match unseal(place, frame) {
            Some(record) => Self::Record(Box::new(record), length),
            None => Self::Damaged(length),
        }
    }
}

impl Reader {
    pub(super) fn new(read: &ReadTransaction) -> Result<Self, LogError> {
        Ok(Self { events: read.open_table(EVENTS)? })
    }

    /// A few positions from a place on that hold something.
    pub(super) fn positions(&self, from: Place, end: u64) -> Result<Vec<u64>, LogError> {
        let found = readable(|| {
            let mut positions = Vec::new();
            for row in self.events.range(from..(from.0, end))?.take(4) {
                positions.push(row?.0.value().1);
            }
            Ok(positions)
        });
        Ok(found?.unwrap_or_default())
    }

    pub(super) fn get(&self, place: Place) -> Result<Found, LogError> {
        Ok(match readable(|| self.events.get(place))? {
            Some(Some(frame)) => Found::of(place, frame.value()),
            Some(None) => Found::Nothing,
            None => Found::Damaged(0),
        })
    }
}

/// Reads. None: a page is damaged. The store takes its own pages on trust: one that was altered behind its back may make it
/// panic.
pub(super) fn readable<T>(
    read: impl FnOnce() -> Result<T, StorageError>,
) -> Result<Option<T>, LogError> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(found)) => Ok(Some(found)),
        Ok(Err(StorageError::Corrupted(_))) | Err(_) => Ok(None),
        Ok(Err(error)) => Err(error.into()),
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}
