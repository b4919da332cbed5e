//! Where the journal's blocks lie: a file of a fixed length, all of which is allocated. A test has something else that
//! loses them as a disk does.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::{BLOCK, BLOCKS, FILE_NAME};

/// The blocks, by number.
pub(in crate::log::store) trait Blocks: std::fmt::Debug + Send {
    /// Reads a block. An error: it is not there, in part or at all, or cannot be read.
    fn read(&self, block: usize, out: &mut [u8]) -> Result<()>;

    /// Allocates all of them, durably, so that a later write changes nothing but contents. Comes before the first write.
    fn prepare(&mut self) -> Result<()>;

    /// Writes whole blocks.
    fn write(&mut self, block: usize, bytes: &[u8]) -> Result<()>;

    /// Returns when everything written is durable.
    fn flush(&mut self) -> Result<()>;
}

/// Those of a real journal.
#[derive(Debug)]
pub(in crate::log::store) struct FileBlocks {
    path: PathBuf,
    /// None: there is none yet.
    file: Option<File>,
    /// Past the kernel's cache, which is a copy less and leaves nothing to write back. Not every file system can.
    direct: Option<File>,
}

impl FileBlocks {
    /// Those in a folder, as far as they are there.
    pub(in crate::log::store) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            opened => Some(opened?),
        };
        Ok(Self { path, file, direct: None })
    }

    fn file(&self) -> Result<&File> {
        self.file.as_ref().ok_or_else(|| Error::from(ErrorKind::NotFound))
    }

    fn create(&self) -> Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&self.path)
    }
}

impl Blocks for FileBlocks {
    fn read(&self, block: usize, out: &mut [u8]) -> Result<()> {
        self.file()?.read_exact_at(out, (block * BLOCK) as u64)
    }

    fn prepare(&mut self) -> Result<()> {
        let old_length = match &self.file {
            Some(file) => Some(file.metadata()?.len()),
            None => None,
        };
        if self.file.is_none() {
            self.file = Some(self.create()?);
        }
        let file = self.file()?;
        if let Err(error) = allocate(file, old_length.unwrap_or(0)) {
            // Half a journal is of no use, and would keep the last room of a full disk. If that fails as well, it is no
            // worse than before.
            let undone = match old_length {
                Some(length) => file.set_len(length),
                None => fs::remove_file(&self.path),
            };
            undone.unwrap_or_default();
            return Err(error);
        }
        let folder = self.path.parent().unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
        self.direct = open_direct(&self.path).ok();
        Ok(())
    }

    fn write(&mut self, block: usize, bytes: &[u8]) -> Result<()> {
        let at = (block * BLOCK) as u64;
        if let Some(direct) = &self.direct {
            match direct.write_all_at(bytes, at) {
                // Blocks may have to be larger there: not worth more than going the usual way.
                Err(error) if error.kind() == ErrorKind::InvalidInput => self.direct = None,
                written => return written,
            }
        }
        self.file()?.write_all_at(bytes, at)
    }

    fn flush(&mut self) -> Result<()> {
        if self.direct.is_some() {
            return Ok(());
        }
        self.file()?.sync_data()
    }
}

/// A write that is durable when it returns is one turn less than a write and a flush. Not `O_SYNC`: that waits for the
/// time of change as well, which moves with every tick of the kernel's clock, and takes a commit of the file system's
/// own journal each time.
fn open_direct(path: &Path) -> Result<File> {
    // rustix 1.1 has the value of `O_SYNC` for `O_DSYNC`.
    OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(path)
}

/// Writes zeros where the file is too short. It is flushed in any case: whoever made it that long may have died before.
fn allocate(file: &File, length: u64) -> Result<()> {
    let missing = ((BLOCKS * BLOCK) as u64).saturating_sub(length);
    let missing = usize::try_from(missing).unwrap_or(BLOCKS * BLOCK);
    file.write_all_at(&vec![0; missing], length)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_waits_for_its_data_and_not_for_the_time_of_change() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join(FILE_NAME);
        fs::write(&path, []).unwrap();
        let Ok(file) = open_direct(&path) else {
            println!("not checked: this file system has no direct writes");
            return;
        };
        let flags = rustix::fs::fcntl_getfl(&file).unwrap().bits();
        let sync = flags & libc::O_SYNC.cast_unsigned();
        assert_eq!(sync, libc::O_DSYNC.cast_unsigned(), "flags {flags:o}");
    }
}
