//! What the tables say of the journal: which of its frames are newer than they are.

use redb::{Database, ReadableDatabase, WriteTransaction};

use super::super::LogError;
use super::META;

/// Row of [`META`]: frames of earlier epochs are in the tables.
pub(super) const EPOCH: &str = "journal-epoch";
/// So many frames of an epoch are in the tables as well. Of the epoch in the third row, which is another one where
/// somebody wrote the first who does not know these.
const FRAMES: &str = "journal-frames";
const FRAMES_EPOCH: &str = "journal-frames-epoch";

/// The first frame of the journal that is newer than the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) epoch: u64,
    /// Its number: those before it are in the tables.
    pub(super) frame: u32,
}

impl Mark {
    /// None: there was no journal yet.
    pub(super) fn read(database: &Database) -> Result<Option<Self>, LogError> {
        let meta = database.begin_read()?.open_table(META)?;
        let row = |name| Ok::<_, LogError>(meta.get(name)?.map(|row| row.value()));
        let Some(epoch) = row(EPOCH)? else { return Ok(None) };
        let known = row(FRAMES_EPOCH)? == Some(epoch);
        let frame = row(FRAMES)?.filter(|_| known).and_then(|frame| u32::try_from(frame).ok());
        Ok(Some(Self { epoch, frame: frame.unwrap_or(0) }))
    }

    /// Writes it down in a commit with all that is before it.
    pub(super) fn write(self, write: &WriteTransaction) -> Result<(), LogError> {
        let mut meta = write.open_table(META)?;
        meta.insert(EPOCH, self.epoch)?;
        meta.insert(FRAMES, u64::from(self.frame))?;
        meta.insert(FRAMES_EPOCH, self.epoch)?;
        Ok(())
    }
}
