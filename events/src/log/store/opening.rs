//! Opening a store: the tables, and what the journal has that they do not.

use std::fs::{self, OpenOptions};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTableMetadata, StorageBackend};
use uuid::Uuid;

use super::super::LogError;
use super::batch::Batch;
use super::journal::{self, Blocks, FileBlocks, Journal};
use super::pending::Pending;
use super::{
    ATTEMPTS, COMPACT_FROM_BYTES, EPOCH, EVENTS, FILE_NAME, FORMAT, FORMAT_WITHOUT_JOURNAL, META,
    PROGRESS, SUBSCRIPTIONS, Store, TOPICS,
};

impl Store {
    /// Opens or creates the store in a folder.
    pub(in crate::log) fn open(dir: &Path, cache_bytes: usize) -> Result<Self, LogError> {
        let failed = |error: std::io::Error| LogError::io(dir, &error);
        let made = !dir.exists();
        fs::create_dir_all(dir).map_err(failed)?;
        let path = dir.join(FILE_NAME);
        let existed = path.exists();
        let length = if existed { fs::metadata(&path).map_err(failed)?.len() } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let backend = || Ok(FileBackend::new(options.open(&path).map_err(failed)?)?);
        let blocks = Box::new(FileBlocks::open(dir).map_err(failed)?);
        let mut store = Self::open_on(backend, blocks, cache_bytes)?;
        // Names have to survive as well as contents.
        let parent = dir.parent().filter(|_parent| made);
        for folder in parent.into_iter().chain((!existed).then_some(dir)) {
            let flushed = fs::File::open(folder).and_then(|folder| folder.sync_all());
            flushed.map_err(failed)?;
        }
        store.compact_if_hollow(length)?;
        Ok(store)
    }

    /// The same on any storage: writes what the journal has and the tables do not, and uses the journal from now on.
    pub(super) fn open_on<B: StorageBackend>(
        backend: impl Fn() -> Result<B, LogError>,
        blocks: Box<dyn Blocks>,
        cache_bytes: usize,
    ) -> Result<Self, LogError> {
        let mut store = Self::with_backend(backend()?, cache_bytes)?;
        let contents = match store.named_epoch()? {
            Some(epoch) => journal::read(&*blocks, epoch),
            None => journal::Contents::default(),
        };
        let nothing = contents.batches.is_empty() && contents.lost == 0;
        match store.begin_journal(blocks, &contents.batches) {
            // What is stored must go on being delivered. The epoch that the tables name has no frames, so whatever
            // goes into the tables from now on is newer than the journal.
            Err(LogError::DiskFull) if nothing => {
                tracing::warn!("the disk has no room for the log's journal: it goes without");
                // Tables whose write failed take no other.
                drop(store);
                store = Self::with_backend(backend()?, cache_bytes)?;
            }
            begun => begun?,
        }
        store.lost_batches += contents.lost;
        if store.lost_batches > 0 {
            let lost = store.lost_batches;
            tracing::error!(lost, "batches of events are lost: the log's journal is damaged");
        }
        Ok(store)
    }

    /// Opens a store's file as it is, to look at it.
    pub(super) fn open_file(path: &Path, cache_bytes: usize) -> Result<Self, LogError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
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
        let database = builder.create_with_backend(backend)?;
        let store = Self {
            reader: None,
            database: Arc::new(database),
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

    /// The epoch whose frames are newer than the tables.
    pub(super) fn named_epoch(&self) -> Result<Option<u64>, LogError> {
        let named = self.database.begin_read()?.open_table(META)?.get(EPOCH)?;
        Ok(named.map(|epoch| epoch.value()))
    }

    /// Writes what the journal had and goes on with an empty one. All of it or nothing: what is replayed is durable with
    /// the name of the next epoch only, and is replayed again where that does not come to be.
    pub(super) fn begin_journal(
        &mut self,
        blocks: Box<dyn Blocks>,
        batches: &[Batch],
    ) -> Result<(), LogError> {
        let mut journal = match Journal::open(blocks) {
            Err(LogError::DiskFull) if !batches.is_empty() => None,
            opened => Some(opened?),
        };
        self.lost_batches += self.replay_all(batches)?;
        // By chance: this store may be a copy that is put beside the journal of another life.
        let epoch = Uuid::new_v4().as_u64_pair().0;
        let mut write = self.database.begin_write()?;
        write.set_quick_repair(true);
        {
            let mut meta = write.open_table(META)?;
            meta.insert("format", FORMAT)?;
            meta.insert(EPOCH, epoch)?;
        }
        write.commit()?;
        if let Some(journal) = &mut journal {
            journal.start(epoch);
        }
        self.journal = journal;
        if !batches.is_empty() {
            let batches = batches.len();
            tracing::info!(batches, "wrote into the store what its journal held");
        }
        Ok(())
    }

    /// Puts batches into the tables, without a flush. Returns how many could not be: where tables are damaged, those
    /// that would go there are given up, as otherwise the log would never open again.
    fn replay_all(&self, batches: &[Batch]) -> Result<u64, LogError> {
        if batches.is_empty() || self.replay(batches)? {
            return Ok(0);
        }
        let mut lost = 0;
        for batch in batches {
            lost += u64::from(!self.replay(std::slice::from_ref(batch))?);
        }
        Ok(lost)
    }

    /// False: it cannot be done, and nothing was. What is wrong with all of the file fails the next commit as well.
    fn replay(&self, batches: &[Batch]) -> Result<bool, LogError> {
        match catch_unwind(AssertUnwindSafe(|| self.put(batches))) {
            Ok(Ok(())) => Ok(true),
            Ok(Err(LogError::Store(reason))) => {
                tracing::error!(reason, "a part of the journal does not go into the tables");
                Ok(false)
            }
            Ok(Err(error)) => Err(error),
            // The store takes its own pages on trust, see `Reader`.
            Err(_panic) => Ok(false),
        }
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
            // Nobody else has it: it was just opened.
            let compacted = Arc::get_mut(&mut self.database).map(Database::compact).transpose()?;
            tracing::info!(length, stored, ?compacted, "compacted the log's file");
        }
        Ok(())
    }
}
