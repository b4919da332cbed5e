//! Reading events from the tables, which may be damaged.

use std::panic::{AssertUnwindSafe, catch_unwind};

use redb::{ReadOnlyTable, ReadTransaction};

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
        let found = catch_unwind(AssertUnwindSafe(|| {
            let mut positions = Vec::new();
            for row in self.events.range(from..(from.0, end))?.take(4) {
                positions.push(row?.0.value().1);
            }
            Ok(positions)
        }));
        match found {
            Ok(Ok(positions)) => Ok(positions),
            Ok(Err(redb::StorageError::Corrupted(_))) | Err(_) => Ok(Vec::new()),
            Ok(Err(error)) => Err(error.into()),
        }
    }

    pub(super) fn get(&self, place: Place) -> Result<Found, LogError> {
        // The store takes its own pages on trust: one that was altered behind its back may make it panic.
        let found = catch_unwind(AssertUnwindSafe(|| self.events.get(place)));
        let frame = match found {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return Ok(Found::Nothing),
            Ok(Err(redb::StorageError::Corrupted(_))) | Err(_) => return Ok(Found::Damaged(0)),
            Ok(Err(error)) => return Err(error.into()),
        };
        Ok(Found::of(place, frame.value()))
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}
