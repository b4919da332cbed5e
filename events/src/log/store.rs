//! The embedded store (`redb`) behind the log: tables, batches, flushes, and the journal in front. All calls block; only
//! the log's own thread makes them.
//!
//! A batch goes to the journal, which is one write and one flush; then it is durable and may be acknowledged. When a half
//! of the journal is nearly full or some seconds old, its batches go into the tables in a durable commit, on a thread of
//! its own, while the log goes on in the other half; many of them go there in steps before. A batch that is too large for
//! the journal, and a quiet second, flush the tables at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
};

use super::LogError;
use super::record::{Place, Record};

mod backend;
mod background;
mod batch;
mod error;
mod journal;
mod mark;
mod opening;
mod pending;
mod reader;
mod replay;
mod snapshot;
mod walk;

use backend::Gate;
use background::Writing;
pub(super) use batch::Batch;
use batch::BatchRow;
use journal::Journal;
use mark::Mark;
use pending::Pending;
pub(super) use reader::Found;
use reader::Reader;
pub(super) use snapshot::Snapshot;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const TOPICS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("topics");
const EVENTS: TableDefinition<'_, Place, &[u8]> = TableDefinition::new("events");
const SUBSCRIPTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("subscriptions");
const PROGRESS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("progress");
const ATTEMPTS: TableDefinition<'_, Place, &[u8]> = TableDefinition::new("attempts");

/// What the tables hold; a newer one is not ours to read. The first had no journal.
const FORMAT: u64 = 2;
const FORMAT_WITHOUT_JOURNAL: u64 = 1;
/// Name of the store's file in the log's folder.
pub(crate) const FILE_NAME: &str = "log.redb";
/// What is acknowledged is durable in the journal alone for about so long, at most.
const LONGEST_IN_JOURNAL: Duration = Duration::from_secs(10);
/// Bytes of events that go into the tables together.
const MOST_UNWRITTEN: usize = 1 << 20;
/// A file larger than this, and mostly unused, is compacted when it is opened.
const COMPACT_FROM_BYTES: u64 = 64 << 20;

/// What is read at the start: everything but the events.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) topics: Vec<(String, Vec<u8>)>,
    pub(super) subscriptions: Vec<(String, Vec<u8>)>,
    pub(super) progress: Vec<(u32, Vec<u8>)>,
    pub(super) attempts: Vec<(Place, Vec<u8>)>,
    /// The highest id of a topic that has events, also where its row is lost.
    pub(super) last_topic: Option<u32>,
}

/// An open store.
pub(super) struct Store {
    /// As of the last change of the tables. Ahead of `database`, so that it goes first.
    reader: Option<Reader>,
    database: Arc<Database>,
    gate: Gate,
    /// None for a store that is only looked at, and for tests.
    journal: Option<Journal>,
    /// What is in the journal's present half, and not in the tables.
    unwritten: Pending,
    /// What is on its way into the tables: of the other half, or of this one.
    writing: Option<Writing>,
    /// When the oldest batch came that is in the journal's present half.
    journaled_since: Option<Instant>,
    /// Opening would have to write what is in the journal.
    unsettled: bool,
    /// Batches of the journal that could not be read, or written.
    lost_batches: u64,
}

impl Store {
    /// Batches of the journal that could not be read, or written, when the store was opened.
    pub(super) fn lost_batches(&self) -> u64 {
        self.lost_batches
    }

    /// Writes what is only in the journal to the tables, and flushes them, so that opening has nothing to write. For quiet
    /// moments.
    pub(super) fn settle(&mut self) -> Result<(), LogError> {
        if self.unsettled {
            self.flush(&Batch::default())?;
            self.unsettled = false;
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
        let events = read.open_table(EVENTS)?;
        let last = reader::readable(|| Ok(events.last()?.map(|(place, _record)| place.value())))?;
        contents.last_topic = last.flatten().map(|(topic, _position)| topic);
        Ok(contents)
    }

    /// Makes a batch durable, all of it or nothing.
    pub(super) fn commit(&mut self, batch: Batch) -> Result<(), LogError> {
        self.unsettled = true;
        if !Journal::takes(&batch) {
            return self.flush(&batch);
        }
        let row = BatchRow::from(batch);
        let appended = self.append(&row);
        let batch = Batch::from(row);
        match appended {
            Ok(true) => {}
            Ok(false) => return self.flush(&batch),
            Err(error) => {
                self.flush(&batch)?;
                // After the flush, which names an epoch of which nothing is in the journal.
                tracing::error!(%error, "the journal cannot be written: the log goes without");
                self.journal = None;
                return Ok(());
            }
        }
        self.journaled_since.get_or_insert_with(Instant::now);
        self.unwritten.push(batch);
        Ok(())
    }

    /// Puts a batch into the journal, in its other half if there is no room in this one. False: it belongs into the tables.
    fn append(&mut self, batch: &BatchRow) -> Result<bool, LogError> {
        for _half in 0..2 {
            let Some(journal) = &mut self.journal else {
                break;
            };
            if journal.append(batch)? {
                return Ok(true);
            }
            self.begin_writing()?;
        }
        Ok(false)
    }

    /// What is better done while nobody waits.
    pub(super) fn catch_up(&mut self) -> Result<(), LogError> {
        if self.writing.as_ref().is_some_and(Writing::is_done) {
            self.end_writing()?;
        }
        if self.writing.is_some() {
            return Ok(());
        }
        let old = self.journaled_since.is_some_and(|at| at.elapsed() >= LONGEST_IN_JOURNAL);
        if old || self.journal.as_ref().is_some_and(Journal::is_nearly_full) {
            return self.begin_writing();
        }
        if self.unwritten.bytes() >= MOST_UNWRITTEN { self.write_ahead() } else { Ok(()) }
    }

    /// Brings a part of the present half into the tables: so that the commit that makes the half free does not take
    /// processors and disk from everybody at once.
    fn write_ahead(&mut self) -> Result<(), LogError> {
        self.end_writing()?;
        let mark = self.journal.as_ref().map(Journal::mark);
        let batches = std::mem::take(&mut self.unwritten);
        self.writing = Some(Writing::start(&self.database, &self.gate, batches, mark));
        Ok(())
    }

    /// Goes on in the journal's other half, while a thread of its own brings this one's batches into the tables.
    fn begin_writing(&mut self) -> Result<(), LogError> {
        self.end_writing()?;
        if let Some(journal) = self.journal.as_mut().filter(|journal| journal.is_used()) {
            let mark = journal.next_half();
            journal.start(mark.epoch);
            self.journaled_since = None;
            let batches = std::mem::take(&mut self.unwritten);
            self.writing = Some(Writing::start(&self.database, &self.gate, batches, Some(mark)));
        }
        Ok(())
    }

    /// Waits until the other half is free. After an error nothing is written any more: the next commit of the tables would
    /// say that they hold what that half has.
    fn end_writing(&mut self) -> Result<(), LogError> {
        if let Some(writing) = &mut self.writing {
            writing.finish()?;
            self.writing = None;
            // An older view keeps the pages alive that were freed.
            self.reader = None;
        }
        Ok(())
    }

    /// Writes what is only in the journal to the tables, without a flush.
    fn write(&mut self) -> Result<(), LogError> {
        self.end_writing()?;
        if self.unwritten.is_empty() {
            return Ok(());
        }
        self.reader = None;
        self.put(self.unwritten.batches())?;
        self.unwritten = Pending::default();
        Ok(())
    }

    /// Puts batches into the tables, all or none, without a flush.
    fn put<'b>(&self, batches: impl IntoIterator<Item = &'b Batch>) -> Result<(), LogError> {
        self.gate.write(|| {
            let mut write = self.database.begin_write()?;
            let durability = write.set_durability(Durability::None);
            durability.map_err(|error| LogError::Store(error.to_string()))?;
            for batch in batches {
                batch.write(&write)?;
            }
            Ok(write.commit()?)
        })
    }

    /// Flushes the tables with a batch and all before. The journal is empty then.
    fn flush(&mut self, batch: &Batch) -> Result<(), LogError> {
        self.end_writing()?;
        self.reader = None;
        let mark = self.journal.as_ref().map(Journal::next_half);
        self.commit_tables(self.unwritten.batches().chain([batch]), mark)?;
        self.unwritten = Pending::default();
        self.journaled_since = None;
        if let (Some(journal), Some(mark)) = (&mut self.journal, mark) {
            journal.start(mark.epoch);
        }
        Ok(())
    }

    /// Puts batches and a mark into the tables, all or none, durably. The commit says where the file's free pages are, which
    /// takes a second flush: without, opening after a crash would look through all of the file for them, and never open
    /// one with a damaged page.
    fn commit_tables<'b>(
        &self,
        batches: impl IntoIterator<Item = &'b Batch>,
        mark: Option<Mark>,
    ) -> Result<(), LogError> {
        self.gate.write(|| {
            let mut write = self.database.begin_write()?;
            write.set_quick_repair(true);
            for batch in batches {
                batch.write(&write)?;
            }
            if let Some(mark) = mark {
                mark.write(&write)?;
            }
            Ok(write.commit()?)
        })
    }

    /// Bytes of events that are in the journal and not in the tables yet.
    pub(super) fn unwritten_bytes(&self) -> u64 {
        self.pending().map(|pending| pending.bytes() as u64).sum()
    }

    /// What is not in the tables yet, the newest first.
    fn pending(&self) -> impl Iterator<Item = &Pending> {
        [Some(&self.unwritten), self.writing.as_ref().map(Writing::batches)].into_iter().flatten()
    }

    /// The end of what is removed, and still in the tables, around a place.
    fn removed_until(&self, place: Place) -> Option<u64> {
        self.pending().find_map(|pending| pending.removed_until(place))
    }

    /// The record at a place, as of the last commit.
    pub(super) fn find(&mut self, place: Place) -> Result<Found, LogError> {
        if let Some(found) = self.pending().find_map(|pending| pending.find(place)) {
            return Ok(found);
        }
        self.open_reader()?.get(place)
    }

    /// The first record from a place on that can be read, before the position `end` of the same topic.
    pub(super) fn first(
        &mut self,
        from: Place,
        end: u64,
    ) -> Result<Option<(u64, Record)>, LogError> {
        let (topic, mut at) = from;
        loop {
            let mut positions = self.open_reader()?.positions((topic, at), end)?;
            // A topic's positions only grow: those of the tables are the oldest.
            positions.extend(self.pending().filter_map(|pending| pending.first((topic, at), end)));
            positions.sort_unstable();
            let mut removed_until = None;
            for position in positions {
                removed_until = self.removed_until((topic, position));
                if removed_until.is_some() {
                    break;
                }
                if let Found::Record(record, _) = self.find((topic, position))? {
                    return Ok(Some((position, *record)));
                }
            }
            let Some(next) = removed_until else { return Ok(None) };
            at = next;
        }
    }

    fn open_reader(&mut self) -> Result<&Reader, LogError> {
        match self.reader {
            Some(ref reader) => Ok(reader),
            None => Ok(self.reader.insert(Reader::new(&self.database.begin_read()?)?)),
        }
    }

    /// A view of everything as it is now, for another thread.
    pub(super) fn snapshot(&mut self) -> Result<Snapshot, LogError> {
        self.write()?;
        Ok(Snapshot::new(self.database.begin_read()?))
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
