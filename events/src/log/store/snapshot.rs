//! The store as it was at one moment, while it goes on: for readers that must not hold up the log's thread.

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use redb::backends::FileBackend;
use redb::{Database, Key, ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};

use super::super::LogError;
use super::super::record::{Record, unseal};
use super::mark::EPOCH;
use super::walk::Walk;
use super::{ATTEMPTS, EVENTS, FILE_NAME, META, PROGRESS, SUBSCRIPTIONS, Store, TOPICS};
use crate::{database_file, private};

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
        let (from, to) = ((topic, positions.start), (topic, positions.end));
        let mut walk = Walk::new(&self.read, from, to)?;
        let (mut records, mut bytes) = (Vec::new(), 0);
        while records.len() < limit && bytes < READ_BYTES {
            let rows = walk.rows(limit - records.len())?;
            if rows.is_empty() {
                break;
            }
            bytes += rows.iter().map(|(_place, frame)| frame.len()).sum::<usize>();
            let found = rows.iter().map(|(place, frame)| Some((place.1, unseal(*place, frame)?)));
            records.extend(found.flatten());
        }
        Ok(records)
    }

    /// Writes a store with the same contents into a folder that has none. Returns how many events are not in it, as they
    /// cannot be read.
    pub(in crate::log) fn copy_to(&self, dir: &Path) -> Result<u64, LogError> {
        let path = dir.join(FILE_NAME);
        private::folder(dir).map_err(|error| LogError::io(dir, &error))?;
        if path.exists() {
            return Err(LogError::Refused(format!("{} exists already", path.display())));
        }
        self.replace(dir)
    }

    /// Writes a store with the same contents into a folder, opens it once to see that it can be, and only then gives it
    /// its name. Events that cannot be read are left out; returns how many.
    pub(super) fn replace(&self, dir: &Path) -> Result<u64, LogError> {
        let failed = |error: std::io::Error| LogError::io(dir, &error);
        let (path, partial) = (dir.join(FILE_NAME), dir.join("log.redb.partial"));
        if partial.exists() {
            fs::remove_file(&partial).map_err(failed)?;
        }
        let copied = catch_unwind(AssertUnwindSafe(|| self.copy_into(&partial)));
        let copied =
            copied.unwrap_or_else(|_panic| Err(LogError::Store("a page is damaged".to_owned())));
        let damaged = copied.inspect_err(|_error| {
            // What is half a copy is no copy.
            fs::remove_file(&partial).unwrap_or_default();
        })?;
        if damaged > 0 {
            tracing::error!(damaged, "events are not in the copy: their pages are damaged");
        }
        fs::rename(&partial, &path).map_err(failed)?;
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        Ok(damaged)
    }

    /// Returns how many events are left out.
    fn copy_into(&self, path: &Path) -> Result<u64, LogError> {
        let (events, damaged) = {
            let file = database_file::open(path).map_err(|error| LogError::io(path, &error))?;
            let mut builder = Database::builder();
            builder.set_cache_size(COPY_CACHE_BYTES);
            let database = builder.create_with_backend(FileBackend::new(file)?)?;
            let mut write = database.begin_write()?;
            write.set_quick_repair(true);
            copy(&self.read, &write, META)?;
            // A copy has no journal.
            write.open_table(META)?.remove(EPOCH)?;
            copy(&self.read, &write, TOPICS)?;
            copy(&self.read, &write, SUBSCRIPTIONS)?;
            copy(&self.read, &write, PROGRESS)?;
            copy(&self.read, &write, ATTEMPTS)?;
            let copied = copy_events(&self.read, &write)?;
            write.commit()?;
            copied
        };
        let copy = Store::open_file(path, COPY_CACHE_BYTES)?;
        copy.contents()?;
        let found = copy.count_events()?;
        if found != events {
            let reason = format!("the copy has {found} events, not {events}");
            return Err(LogError::Store(reason));
        }
        Ok(damaged)
    }
}

/// Copies a table.
fn copy<K: Key + 'static, V: redb::Value + 'static>(
    from: &ReadTransaction,
    to: &WriteTransaction,
    table: TableDefinition<'_, K, V>,
) -> Result<(), LogError> {
    let mut target = to.open_table(table)?;
    for row in from.open_table(table)?.iter()? {
        let (key, value) = row?;
        target.insert(key.value(), value.value())?;
    }
    Ok(())
}

/// Returns how many it copied, and how many it could not.
fn copy_events(from: &ReadTransaction, to: &WriteTransaction) -> Result<(u64, u64), LogError> {
    let mut target = to.open_table(EVENTS)?;
    let mut walk = Walk::new(from, (0, 0), (u32::MAX, u64::MAX))?;
    let mut copied = 0;
    loop {
        let rows = walk.rows(usize::MAX)?;
        if rows.is_empty() {
            return Ok((copied, walk.damaged()));
        }
        for (place, frame) in rows {
            target.insert(place, frame.as_slice())?;
            copied += 1;
        }
    }
}
