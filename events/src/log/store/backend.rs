//! The tables' file, as the database is to see it.

use std::io::{Error, Result};
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use redb::{BackendError, StorageBackend};

use super::super::LogError;

/// In front of it lies the database's header, without which there is nothing.
const HEADER: u64 = 4096;
/// A disk that was away for a moment may be back.
const READ_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Open until a write to the tables fails. From then on nothing is written: the database writes more when it is closed,
/// and what it has in memory after a panic must not get to the disk. What is there is as of the last commit.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate(Arc<AtomicBool>);

impl Gate {
    pub(super) fn close(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Does what writes to the tables. A panic is an error: the database takes its own pages on trust, and one that was
    /// altered behind its back may make it panic.
    pub(super) fn write<T>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, LogError>,
    ) -> std::result::Result<T, LogError> {
        let done = catch_unwind(AssertUnwindSafe(work));
        let done = done.unwrap_or_else(|_panic| Err(panicked()));
        if done.is_err() {
            self.close();
        }
        done
    }

    fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Acquire) {
            return Err(Error::other("a write failed before"));
        }
        Ok(())
    }
}

fn panicked() -> LogError {
    LogError::Store("the store panicked".to_owned())
}

/// The file behind its gate. What the disk cannot read is zeros: a page that makes no sense costs the events on it, and
/// an error of the disk would cost all, as the database goes on after none.
#[derive(Debug)]
pub(super) struct Guarded<B> {
    file: B,
    gate: Gate,
}

impl<B: StorageBackend> Guarded<B> {
    pub(super) fn new(file: B, gate: Gate) -> Self {
        Self { file, gate }
    }
}

impl<B: StorageBackend> StorageBackend for Guarded<B> {
    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let bad = |error: &Error| error.raw_os_error() == Some(libc::EIO) && offset >= HEADER;
        match self.file.read(offset, out) {
            Err(error) if bad(&error) => thread::sleep(READ_AGAIN_AFTER),
            read => return read,
        }
        match self.file.read(offset, out) {
            Err(error) if bad(&error) => {
                let bytes = out.len();
                tracing::error!(offset, bytes, %error, "the disk cannot read a part of the log's file");
                out.fill(0);
                Ok(())
            }
            read => read,
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.gate.check()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<()> {
        self.gate.check()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.gate.check()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> Result<()> {
        self.file.close()
    }

    fn try_lock_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
