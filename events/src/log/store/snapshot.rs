//! The store as it was at one moment, while it goes on: for readers that must not hold up the log's thread.

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use redb::{Database, Key, ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};

use super::super::LogError;
use super::super::record::{Place, Record, unseal};
use super::{ATTEMPTS, EPOCH, EVENTS, FILE_NAME, META, PROGRESS, SUBSCRIPTIONS, Store, TOPICS};

/// Most bytes of one read.
const READ_BYTES: usize = 16 << 20;
/// Page cache of the copy while it is written.
const COPY_CACHE_BYTES: usize = 8 << 20;

/// Keeps what was freed since from being used again: do not hold on to it.
pub(in crate::log) struct Snapshot {
    read: ReadTransaction,
}

impl Snapshot {
    pub(super) fn new(read: ReadTransaction) -> Self {
        Self { read }
    }

    /// Up to `limit` records of a topic, and no more than 16 MiB; damaged ones are left out.
    pub(in crate::log) fn records(
        &self,
        topic: u32,
        positions: Range<u64>,
        limit: usize,
    ) -> Result<Vec<(u64, Record)>, LogError> {
        let mut records = Vec::new();
        let mut bytes = 0;
        // The store takes its own pages on trust, see `Reader`. What was read before counts.
        let read = catch_unwind(AssertUnwindSafe(|| -> Result<(), LogError> {
            let table = self.read.open_table(EVENTS)?;
            let mut rows = table.range((topic, positions.start)..(topic, positions.end))?;
            while records.len() < limit && bytes < READ_BYTES {
                let Some(row) = rows.next() else { break };
                let (place, frame) = row?;
                let place: Place = place.value();
                if let Some(record) = unseal(place, frame.value()) {
                    bytes += frame.value().len();
                    records.push((place.1, record));
                }
            }
            Ok(())
        }));
        read.unwrap_or_else(|_panic| Err(LogError::Store("a page is damaged".to_owned())))?;
        Ok(records)
    }

    /// Writes a store with the same contents into a folder, opens it once to see that it can be, and only then
    /// gives it its name.
    pub(in crate::log) fn copy_to(&self, dir: &Path) -> Result<(), LogError> {
        let failed = |error: std::io::Error| LogError::io(dir, &error);
        let (path, partial) = (dir.join(FILE_NAME), dir.join("log.redb.partial"));
        fs::create_dir_all(dir).map_err(failed)?;
        if path.exists() {
            return Err(LogError::Refused(format!("{} exists already", path.display())));
        }
        if partial.exists() {
            fs::remove_file(&partial).map_err(failed)?;
        }
        let copied = catch_unwind(AssertUnwindSafe(|| self.copy_into(&partial)));
        let copied =
            copied.unwrap_or_else(|_panic| Err(LogError::Store("a page is damaged".to_owned())));
        if let Err(error) = copied {
            // What is half a copy is no copy.
            fs::remove_file(&partial).unwrap_or_default();
            return Err(error);
        }
        fs::rename(&partial, &path).map_err(failed)?;
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
    }

    fn copy_into(&self, path: &Path) -> Result<(), LogError> {
        let events = {
            let database = Database::builder().set_cache_size(COPY_CACHE_BYTES).create(path)?;
            let mut write = database.begin_write()?;
            write.set_quick_repair(true);
            copy(&self.read, &write, META)?;
            // A copy has no journal.
            write.open_table(META)?.remove(EPOCH)?;
            copy(&self.read, &write, TOPICS)?;
            copy(&self.read, &write, SUBSCRIPTIONS)?;
            copy(&self.read, &write, PROGRESS)?;
            copy(&self.read, &write, ATTEMPTS)?;
            let events = copy(&self.read, &write, EVENTS)?;
            write.commit()?;
            events
        };
        let copy = Store::open_file(path, COPY_CACHE_BYTES)?;
        copy.contents()?;
        let found = copy.count_events()?;
        if found != events {
            let reason = format!("the copy has {found} events, not {events}");
            return Err(LogError::Store(reason));
        }
        Ok(())
    }
}

/// Copies a table; returns its rows.
fn copy<K: Key + 'static, V: redb::Value + 'static>(
    from: &ReadTransaction,
    to: &WriteTransaction,
    table: TableDefinition<'_, K, V>,
) -> Result<u64, LogError> {
    let mut target = to.open_table(table)?;
    let mut rows = 0;
    for row in from.open_table(table)?.iter()? {
        let (key, value) = row?;
        target.insert(key.value(), value.value())?;
        rows += 1;
    }
    Ok(rows)
}
