//! Why the log cannot do something. Imports [`super::declare`] for a number in a message.

use super::declare::MOST_UNDECLARED;

/// Why the log cannot do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// The disk, or the quota, is full or nearly so. The log goes on by itself when there is room.
    #[error("the disk is full")]
    DiskFull,
    /// Another process, or another log of this one, has the store open.
    #[error("the store is in use by another process")]
    InUse,
    /// The store was written by a newer version.
    #[error("the store has format {found}, this version knows {known}")]
    Format {
        /// Its format.
        found: u64,
        /// Ours.
        known: u64,
    },
    /// The store failed. The log opens it again by itself.
    #[error("the store failed: {0}")]
    Store(String),
    /// The request cannot be met, whatever the store does.
    #[error("{0}")]
    Refused(String),
    /// No topic or subscription of this name.
    #[error("there is no {kind} {name:?}")]
    Unknown {
        /// `topic` or `subscription`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// As many as may be there without a resource.
    #[error(
        "there are {MOST_UNDECLARED} {0} that no resource declares, and no more are made: declare this one"
    )]
    TooMany(&'static str),
    /// The log was closed.
    #[error("the log is closed")]
    Closed,
}

impl LogError {
    pub(super) fn unknown(kind: &'static str, name: &str) -> Self {
        Self::Unknown { kind, name: name.to_owned() }
    }
}
