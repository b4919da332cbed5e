//! The embedded store (`redb`) behind the log: tables, batches, flushes. All calls block; only the log's own
//! thread makes them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use redb::{
    Database, ReadOnlyTable, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    StorageBackend, TableDefinition, WriteTransaction,
};

use super::LogError;
use super::record::{Place, Record, unseal};

mod snapshot;

pub(super) use snapshot::Snapshot;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const TOPICS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("topics");
const EVENTS: TableDefinition<'_, Place, &[u8]> = TableDefinition::new("events");
const SUBSCRIPTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("subscriptions");
const PROGRESS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("progress");
const ATTEMPTS: TableDefinition<'_, Place, &[u8]> = TableDefinition::new("attempts");

/// What the tables hold; a newer one is not ours to read.
const FORMAT: u64 = 1;
/// Name of the store's file in the log's folder.
pub(crate) const FILE_NAME: &str = "log.redb";
/// A file larger than this, and mostly unused, is compacted when it is opened.
const COMPACT_FROM_BYTES: u64 = 64 << 20;

/// All changes of one commit.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) topics: BTreeMap<String, Vec<u8>>,
    pub(super) events: Vec<(Place, Vec<u8>)>,
    /// Positions to remove, by topic id.
    pub(super) trims: Vec<(u32, Range<u64>)>,
    pub(super) subscriptions: BTreeMap<String, Option<Vec<u8>>>,
    pub(super) progress: BTreeMap<u32, Option<Vec<u8>>>,
    pub(super) attempts: BTreeMap<Place, Option<Vec<u8>>>,
    /// Subscriptions whose attempts all go.
    pub(super) forget: Vec<u32>,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.topics.is_empty()
            && self.events.is_empty()
            && self.trims.is_empty()
            && self.subscriptions.is_empty()
            && self.progress.is_empty()
            && self.attempts.is_empty()
            && self.forget.is_empty()
    }
}

/// What is read at the start: everything but the events.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) topics: Vec<(String, Vec<u8>)>,
    pub(super) subscriptions: Vec<(String, Vec<u8>)>,
    pub(super) progress: Vec<(u32, Vec<u8>)>,
    pub(super) attempts: Vec<(Place, Vec<u8>)>,
}

/// An open store.
pub(super) struct Store {
    database: Database,
    /// Opening would have to look through the file: the last commit left the allocator's state out.
    unsettled: Cell<bool>,
}

impl Store {
    /// Opens or creates the store in a folder.
    pub(super) fn open(dir: &Path, cache_bytes: usize) -> Result<Self, LogError> {
        let failed = |error: std::io::Error| LogError::io(dir, &error);
        let made = !dir.exists();
        fs::create_dir_all(dir).map_err(failed)?;
        let path = dir.join(FILE_NAME);
        let existed = path.exists();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let backend = redb::backends::FileBackend::new(file)?;
        let mut store = Self::with_backend(backend, cache_bytes)?;
        // Names have to survive as well as contents.
        let parent = dir.parent().filter(|_parent| made);
        for folder in parent.into_iter().chain((!existed).then_some(dir)) {
            let flushed = fs::File::open(folder).and_then(|folder| folder.sync_all());
            flushed.map_err(failed)?;
        }
        store.compact_if_hollow(length)?;
        Ok(store)
    }

    /// Opens a store's file as it is, to look at it.
    fn open_file(path: &Path, cache_bytes: usize) -> Result<Self, LogError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|error| LogError::io(path, &error))?;
        Self::with_backend(redb::backends::FileBackend::new(file)?, cache_bytes)
    }

    /// Opens a store on any storage; tests bring one that fails.
    pub(super) fn with_backend(
        backend: impl StorageBackend,
        cache_bytes: usize,
    ) -> Result<Self, LogError> {
        let mut builder = Database::builder();
        builder.set_cache_size(cache_bytes);
        let database = builder.create_with_backend(backend)?;
        let store = Self { database, unsettled: Cell::new(false) };
        store.prepare()?;
        Ok(store)
    }

    fn prepare(&self) -> Result<(), LogError> {
        let found = match self.database.begin_read()?.open_table(META) {
            Ok(meta) => meta.get("format")?.map(|format| format.value()),
            Err(redb::TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(error.into()),
        };
        match found {
            Some(FORMAT) => return Ok(()),
            Some(other) => {
                return Err(LogError::Format { found: other, known: FORMAT });
            }
            None => {}
        }
        let write = self.database.begin_write()?;
        {
            write.open_table(META)?.insert("format", FORMAT)?;
            write.open_table(TOPICS)?;
            write.open_table(EVENTS)?;
            write.open_table(SUBSCRIPTIONS)?;
            write.open_table(PROGRESS)?;
            write.open_table(ATTEMPTS)?;
        }
        Ok(write.commit()?)
    }

    /// Writes down where the file's free pages are, if that is not known: opening after a crash then reads no data. Dearer
    /// than a commit by one flush, so it is for quiet moments.
    pub(super) fn settle(&self) -> Result<(), LogError> {
        if self.unsettled.get() {
            let mut write = self.database.begin_write()?;
            write.set_quick_repair(true);
            write.commit()?;
            self.unsettled.set(false);
        }
        Ok(())
    }

    fn compact_if_hollow(&mut self, length: u64) -> Result<(), LogError> {
        if length < COMPACT_FROM_BYTES {
            return Ok(());
        }
        let stored = {
            let stats = self.database.begin_read()?.open_table(EVENTS)?.stats()?;
            stats.stored_bytes() + stats.metadata_bytes() + stats.fragmented_bytes()
        };
        if stored < length / 4 {
            let compacted = self.database.compact()?;
            tracing::info!(length, stored, compacted, "compacted the log's file");
        }
        Ok(())
    }

    /// How many records it holds.
    fn count_events(&self) -> Result<u64, LogError> {
        Ok(self.database.begin_read()?.open_table(EVENTS)?.len()?)
    }

    /// Reads all but the events.
    pub(super) fn contents(&self) -> Result<Contents, LogError> {
        let read = self.database.begin_read()?;
        let mut contents = Contents::default();
        for row in read.open_table(TOPICS)?.iter()? {
            let (name, value) = row?;
            contents.topics.push((name.value().to_owned(), value.value().to_vec()));
        }
        for row in read.open_table(SUBSCRIPTIONS)?.iter()? {
            let (name, value) = row?;
            contents.subscriptions.push((name.value().to_owned(), value.value().to_vec()));
        }
        for row in read.open_table(PROGRESS)?.iter()? {
            let (id, value) = row?;
            contents.progress.push((id.value(), value.value().to_vec()));
        }
        for row in read.open_table(ATTEMPTS)?.iter()? {
            let (place, value) = row?;
            contents.attempts.push((place.value(), value.value().to_vec()));
        }
        Ok(contents)
    }

    /// Writes everything, or nothing, and returns when it is on disk: one flush, and checksums say after a crash whether
    /// it was whole.
    pub(super) fn commit(&self, batch: &Batch) -> Result<(), LogError> {
        let write = self.database.begin_write()?;
        self.unsettled.set(true);
        {
            // First: a subscription that was moved has new rows already.
            for subscription in &batch.forget {
                let places = (*subscription, 0)..=(*subscription, u64::MAX);
                write.open_table(ATTEMPTS)?.retain_in(places, |_place, _row| false)?;
            }
            put_all(&write, TOPICS, batch.topics.iter().map(|(k, v)| (k.as_str(), Some(v))))?;
            let subscriptions = batch.subscriptions.iter();
            put_all(&write, SUBSCRIPTIONS, subscriptions.map(|(k, v)| (k.as_str(), v.as_ref())))?;
            put_all(&write, PROGRESS, batch.progress.iter().map(|(k, v)| (*k, v.as_ref())))?;
            put_all(&write, ATTEMPTS, batch.attempts.iter().map(|(k, v)| (*k, v.as_ref())))?;
            put_all(&write, EVENTS, batch.events.iter().map(|(k, v)| (*k, Some(v))))?;
            if !batch.trims.is_empty() {
                let mut events = write.open_table(EVENTS)?;
                for (topic, positions) in &batch.trims {
                    let places = (*topic, positions.start)..(*topic, positions.end);
                    events.retain_in(places, |_place, _record| false)?;
                }
            }
        }
        Ok(write.commit()?)
    }

    /// A view of everything as it is now, for another thread.
    pub(super) fn snapshot(&self) -> Result<Snapshot, LogError> {
        Ok(Snapshot::new(self.database.begin_read()?))
    }

    /// A view of the events as they are now.
    pub(super) fn reader(&self) -> Result<Reader, LogError> {
        Ok(Reader { events: self.database.begin_read()?.open_table(EVENTS)? })
    }
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

/// Reads events as of one moment.
pub(super) struct Reader {
    events: ReadOnlyTable<Place, &'static [u8]>,
}

/// What was found at a place.
#[derive(Debug)]
pub(super) enum Found {
    /// The record and the bytes that it takes.
    Record(Box<Record>, u64),
    /// Something, but not what was written.
    Damaged(u64),
    /// Nothing.
    Nothing,
}

impl Reader {
    /// The first record from a place on that can be read, before the position `end` of the same topic.
    pub(super) fn first(&self, from: Place, end: u64) -> Result<Option<(u64, Record)>, LogError> {
        for position in self.positions(from, end)? {
            if let Found::Record(record, _) = self.get((from.0, position))? {
                return Ok(Some((position, *record)));
            }
        }
        Ok(None)
    }

    /// A few positions from a place on that hold something.
    fn positions(&self, from: Place, end: u64) -> Result<Vec<u64>, LogError> {
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
        let length = frame.value().len() as u64;
        Ok(match unseal(place, frame.value()) {
            Some(record) => Found::Record(Box::new(record), length),
            None => Found::Damaged(length),
        })
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

macro_rules! from_store_error {
    ($($error:ident),*) => { $(
        impl From<redb::$error> for LogError {
            fn from(error: redb::$error) -> Self {
                store_error(&error.into())
            }
        }
    )* };
}

from_store_error!(
    StorageError,
    TransactionError,
    TableError,
    CommitError,
    DatabaseError,
    CompactionError
);

fn store_error(error: &redb::Error) -> LogError {
    if matches!(error, redb::Error::DatabaseAlreadyOpen) {
        return LogError::InUse;
    }
    if let redb::Error::Io(io) = error
        && is_full(io)
    {
        return LogError::DiskFull;
    }
    LogError::Store(error.to_string())
}

fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

impl LogError {
    pub(super) fn io(dir: &Path, error: &std::io::Error) -> Self {
        if is_full(error) {
            return Self::DiskFull;
        }
        Self::Store(format!("{}: {error}", dir.display()))
    }
}
