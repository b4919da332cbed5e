//! A disk in memory that knows what was flushed, and whose power can be cut at any write.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use redb::StorageBackend;

use super::super::journal::{BLOCK, BLOCKS, Blocks};

/// A disk that knows what was flushed: the file of the tables, and that of the journal.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    pub(super) faults: Arc<Mutex<Faults>>,
    pub(super) tables: File,
    pub(super) journal: File,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    /// Writes until the power goes.
    pub(super) left: Option<usize>,
    /// Writes until one finds no room.
    pub(super) full_in: Option<usize>,
    /// So far.
    pub(super) writes: usize,
}

#[derive(Clone, Debug, Default)]
pub(super) struct File {
    pub(super) faults: Arc<Mutex<Faults>>,
    /// No write to it succeeds.
    pub(super) broken: Arc<AtomicBool>,
    /// Bytes that cannot be read.
    pub(super) bad: Arc<Mutex<Vec<Range<usize>>>>,
    pub(super) image: Arc<Mutex<Image>>,
}

#[derive(Debug, Default)]
pub(super) struct Image {
    pub(super) flushed: Vec<u8>,
    pub(super) since: Vec<Write>,
    /// With `since`.
    pub(super) now: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(super) enum Write {
    Length(usize),
    Bytes(usize, Vec<u8>),
}

impl Write {
    pub(super) fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::Length(length) => image.resize(*length, 0),
            Self::Bytes(at, bytes) => {
                let end = at + bytes.len();
                image.resize(image.len().max(end), 0);
                image[*at..end].copy_from_slice(bytes);
            }
        }
    }
}

impl Disk {
    pub(super) fn new() -> Self {
        Self::of(Image::default(), Image::default())
    }

    pub(super) fn of(tables: Image, journal: Image) -> Self {
        let faults = Arc::<Mutex<Faults>>::default();
        let file = |image| File {
            faults: Arc::clone(&faults),
            broken: Arc::default(),
            bad: Arc::default(),
            image: Arc::new(Mutex::new(image)),
        };
        Self { tables: file(tables), journal: file(journal), faults: Arc::clone(&faults) }
    }

    /// The same disk when the power is back.
    pub(super) fn after_power_cut(&self, mut survives: impl FnMut() -> bool) -> Self {
        let tables = self.tables.after_power_cut(&mut survives);
        Self::of(tables, self.journal.after_power_cut(&mut survives))
    }
}

impl Image {
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        Self { flushed: bytes.clone(), since: Vec::new(), now: bytes }
    }
}

impl File {
    pub(super) fn add(&self, write: Write) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("the disk is broken"));
        }
        let faults = &mut *self.faults.lock();
        faults.writes += 1;
        let gone = |left: &mut Option<usize>| match left {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        if gone(&mut faults.left) {
            return Err(io::Error::other("the power is gone"));
        }
        if gone(&mut faults.full_in) {
            faults.full_in = None;
            return Err(io::ErrorKind::StorageFull.into());
        }
        let image = &mut *self.image.lock();
        write.apply(&mut image.now);
        image.since.push(write);
        Ok(())
    }

    pub(super) fn load(&self, at: usize, out: &mut [u8]) -> io::Result<()> {
        let end = at + out.len();
        if self.bad.lock().iter().any(|bad| bad.start < end && at < bad.end) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let image = self.image.lock();
        let bytes = image.now.get(at..at + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        if self.faults.lock().left == Some(0) {
            return Err(io::Error::other("the power is gone"));
        }
        let image = &mut *self.image.lock();
        image.flushed.clone_from(&image.now);
        image.since.clear();
        Ok(())
    }

    pub(super) fn after_power_cut(&self, mut survives: impl FnMut() -> bool) -> Image {
        let image = self.image.lock();
        let mut left = image.flushed.clone();
        for write in image.since.iter().filter(|_write| survives()) {
            write.apply(&mut left);
        }
        Image::of(left)
    }
}

impl StorageBackend for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.image.lock().now.len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.load(usize::try_from(offset).unwrap(), out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.add(Write::Length(usize::try_from(len).unwrap()))
    }
    fn sync_data(&self) -> io::Result<()> {
        self.sync()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.add(Write::Bytes(usize::try_from(offset).unwrap(), data.to_vec()))
    }
}

impl Blocks for File {
    fn read(&self, block: usize, out: &mut [u8]) -> io::Result<()> {
        self.load(block * BLOCK, out)
    }
    fn prepare(&mut self) -> io::Result<()> {
        self.add(Write::Length(BLOCKS * BLOCK))?;
        self.sync()
    }
    fn write(&mut self, block: usize, bytes: &[u8]) -> io::Result<()> {
        // Any of them may be the last, and any may be lost.
        for (block, bytes) in (block..).zip(bytes.chunks(BLOCK)) {
            self.add(Write::Bytes(block * BLOCK, bytes.to_vec()))?;
        }
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.sync()
    }
}
