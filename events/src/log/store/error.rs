//! What the database and the disk say, as the log says it.

use std::path::Path;

use super::super::LogError;

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
    pub(in crate::log) fn io(dir: &Path, error: &std::io::Error) -> Self {
        if is_full(error) {
            return Self::DiskFull;
        }
        Self::Store(format!("{}: {error}", dir.display()))
    }
}
