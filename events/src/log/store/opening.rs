//! Opening a store: the tables, and what the journal has that they do not.

use std::cell::Cell;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use prost::Message as _;
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, StorageBackend};
use uuid::Uuid;

use super::super::LogError;
use super::super::record::TopicRow;
use super::backend::{Gate, Guarded};
use super::journal::{self, Blocks, FileBlocks, Journal};
use super::mark::Mark;
use super::pending::Pending;
use super::{
    ATTEMPTS, COMPACT_FROM_BYTES, EVENTS, FILE_NAME, FORMAT, FORMAT_WITHOUT_JOURNAL, META,
    PROGRESS, SUBSCRIPTIONS, Store, TOPICS,
};
use crate::{database_file, private};

impl Store {
    /// Opens or creates the store in a folder.
    pub(in crate::log) fn open(dir: &Path, cache_bytes: usize) -> Result<Self, LogError> {
        let failed = |error: std::io::Error| LogError::io(dir, &error);
        let made = !dir.exists();
        private::folder(dir).map_err(failed)?;
        let path = dir.join(FILE_NAME);
        let existed = path.exists();
        let opened = Cell::new(None);
        let backend = || {
            let file = database_file::open(&path).map_err(failed)?;
            opened.set(Some(identity(&file.metadata().map_err(failed)?)));
            Ok(FileBackend::new(file)?)
        };
        let open = || {
            let blocks = Box::new(FileBlocks::open(dir).map_err(failed)?);
            let store = Self::open_on(backend, blocks, cache_bytes)?;
            // Whoever had it may have put another one in its place while we waited for it.
            let there = identity(&fs::metadata(&path).map_err(failed)?);
            if opened.get() == Some(there) { Ok(store) } else { Err(LogError::InUse) }
        };
        let length = if existed { fs::metadata(&path).map_err(failed)?.len() } else { 0 };
        let store = open()?;
        // Names have to survive as well as contents.
        let parent = dir.parent().filter(|_parent| made);
        for folder in parent.into_iter().chain((!existed).then_some(dir)) {
            let flushed = fs::File::open(folder).and_then(|folder| folder.sync_all());
            flushed.map_err(failed)?;
        }
        if store.is_hollow(length)? { store.rewritten(dir, open) } else { Ok(store) }
    }

    /// The same on any storage: writes what the journal has and the tables do not, and uses the journal from now on.
    pub(super) fn open_on<B: StorageBackend>(
        backend: impl Fn() -> Result<B, LogError>,
        blocks: Box<dyn Blocks>,
        cache_bytes: usize,
    ) -> Result<Self, LogError> {
        let open = || Self::with_backend(backend()?, cache_bytes);
        let store = open()?;
        let contents = match Mark::read(&store.database)? {
            Some(mark) => journal::read(&*blocks, mark),
            None => journal::Contents::default(),
        };
        let (batches, mut lost) = (contents.batches.len(), contents.lost);
        let (mut store, refused) = store.replay(contents.batches, open)?;
        lost += refused;
        match store.begin_journal(blocks, batches > 0) {
            // What is stored must go on being delivered. The epoch that the tables name has no frames, so whatever
            // goes into the tables from now on is newer than the journal.
            Err(LogError::DiskFull) if batches == 0 && lost == 0 => {
                tracing::warn!("the disk has no room for the log's journal: it goes without");
                // Tables whose write failed take no other.
                drop(store);
                store = open()?;
            }
            begun => begun?,
        }
        if batches > 0 {
            tracing::info!(batches, "wrote into the store what its journal held");
        }
        if lost > 0 {
            tracing::error!(lost, "batches of events are lost: the log's files are damaged");
        }
        store.lost_batches = lost;
        Ok(store)
    }

    /// Opens a store's file as it is, to look at it.
    pub(super) fn open_file(path: &Path, cache_bytes: usize) -> Result<Self, LogError> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|error| LogError::io(path, &error))?;
        Self::with_backend(FileBackend::new(file)?, cache_bytes)
    }

    /// Opens a store on any storage; tests bring one that fails.
    pub(in crate::log) fn with_backend(
        backend: impl StorageBackend,
        cache_bytes: usize,
    ) -> Result<Self, LogError> {
        let mut builder = Database::builder();
        builder.set_cache_size(cache_bytes);
        let gate = Gate::default();
        let database = builder.create_with_backend(Guarded::new(backend, gate.clone()))?;
        let store = Self {
            reader: None,
            database: Arc::new(database),
            gate,
            journal: None,
            unwritten: Pending::default(),
            writing: None,
            unsettled: false,
            journaled_since: None,
            lost_batches: 0,
        };
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
            Some(FORMAT | FORMAT_WITHOUT_JOURNAL) => return Ok(()),
            Some(other) => {
                return Err(LogError::Format { found: other, known: FORMAT });
            }
            None => {}
        }
        let mut write = self.database.begin_write()?;
        write.set_quick_repair(true);
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

    /// Goes on with an empty journal. What was replayed is durable with the name of the next epoch only, and is replayed
    /// again where that does not come to be: all of it or nothing.
    fn begin_journal(&mut self, blocks: Box<dyn Blocks>, replayed: bool) -> Result<(), LogError> {
        let mut journal = match Journal::open(blocks) {
            Err(LogError::DiskFull) if replayed => None,
            opened => Some(opened?),
        };
        // By chance: this store may be a copy that is put beside the journal of another life.
        let epoch = Uuid::new_v4().as_u64_pair().0;
        self.gate.write(|| {
            let mut write = self.database.begin_write()?;
            write.set_quick_repair(true);
            write.open_table(META)?.insert("format", FORMAT)?;
            Mark { epoch, frame: 0 }.write(&write)?;
            Ok(write.commit()?)
        })?;
        if let Some(journal) = &mut journal {
            journal.start(epoch);
        }
        self.journal = journal;
        Ok(())
    }

    /// Whether a file of this length is mostly unused.
    fn is_hollow(&self, length: u64) -> Result<bool, LogError> {
        if length < COMPACT_FROM_BYTES {
            return Ok(false);
        }
        let mut stored = 0;
        for (_name, row) in self.contents()?.topics {
            let Ok(topic) = TopicRow::decode(row.as_slice()) else { return Ok(false) };
            stored += topic.bytes;
        }
        Ok(stored < length / 4)
    }

    /// Puts a copy in the place of the file, which then is as long as it needs to be. In place of that, because the database
    /// could not be opened again if it ended halfway and a page was damaged. Without the copy it is no worse than before.
    fn rewritten(
        mut self,
        dir: &Path,
        open: impl Fn() -> Result<Self, LogError>,
    ) -> Result<Self, LogError> {
        match self.snapshot().and_then(|snapshot| snapshot.replace(dir)) {
            Ok(_damaged) => {
                tracing::info!("the log's file was mostly unused, and is a shorter one now");
            }
            Err(error) => {
                tracing::warn!(%error, "the log's file is mostly unused, and cannot be shortened");
                return Ok(self);
            }
        }
        // What it writes when it is closed goes to the file that has no name any more.
        drop(self);
        open()
    }
}

/// Tells a file from another that had its name.
fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}
