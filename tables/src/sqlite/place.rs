//! Which file a database is, and the log beside it.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::spec::SourceError;

/// The file that a connection has open: one of the same name may take its place.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    file: FileId,
    /// `FILE-wal`, kept open so that no other file gets its number.
    wal: OnceLock<File>,
}

/// Device and number.
type FileId = (u64, u64);

impl Place {
    pub(super) fn find(path: &Path) -> Result<Self, SourceError> {
        Ok(Self { path: path.to_owned(), file: file_id(path)?, wal: OnceLock::new() })
    }

    /// Remembers the log, which is there once something was read from a database in WAL mode.
    pub(super) fn find_wal(&self) {
        if self.wal.get().is_none()
            && let Ok(file) = File::open(wal(&self.path))
        {
            self.wal.get_or_init(|| file);
        }
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.file == other.file
    }

    /// Whether its file is where it was.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        if file_id(&self.path)? == self.file {
            return Ok(());
        }
        let reason = format!("another file took the place of {}", self.path.display());
        Err(SourceError::Settings(reason))
    }

    /// A new file may be opened only once the log of the old one is gone: SQLite knows a log by its name, and would
    /// write what is in it over the new file. As a rule the last one to close a database removes the log, but the
    /// application closes while the sidecar has it open, and whoever has lost the file leaves the log alone.
    pub(super) fn check_next(&self, next: &Self) -> Result<(), SourceError> {
        let same_log = || -> io::Result<bool> {
            let Some(old) = self.wal.get() else { return Ok(false) };
            let found = std::fs::metadata(wal(&next.path))?;
            Ok(found.len() > 0 && id_of(&found) == id_of(&old.metadata()?))
        };
        // One that cannot be found is gone.
        if self.is_same(next) || !same_log().unwrap_or(false) {
            return Ok(());
        }
        let path = next.path.display();
        Err(SourceError::Settings(format!(
            "another file took the place of {path}, but {path}-wal is still that of the old one, and SQLite would \
             write it over the new one: stop the application, remove {path}-wal and {path}-shm"
        )))
    }
}

fn wal(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

fn file_id(path: &Path) -> Result<FileId, SourceError> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| SourceError::Settings(format!("{}: {error}", path.display())))?;
    Ok(id_of(&metadata))
}

fn id_of(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}
