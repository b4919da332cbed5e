//! The journal in front of the store: a file of fixed length whose blocks are all allocated, so that a small batch is
//! durable after one write in one place and one flush of data alone. A commit of the store rewrites eight pages all over
//! its file, and takes twice as long.
//!
//! A frame is a batch; it begins on a block of its own, so that no write touches what was flushed before. Frames of one
//! *epoch* are counted from 0. Each durable commit of the store holds every batch so far and begins a new epoch, in the
//! same transaction: only frames of the epoch that the store names are still to be written to it. Nothing is erased.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use prost::Message as _;
use rustix::fs::OFlags;
use xxhash_rust::xxh3::xxh3_64;

use super::super::LogError;
use super::batch::{Batch, BatchRow};

/// Name of the file in the log's folder.
pub(super) const FILE_NAME: &str = "log.journal";
/// What a disk writes as one. Frames begin on multiples of it.
const BLOCK: usize = 4096;
/// Length of the file: this many small batches share one durable commit of the store, which takes some milliseconds.
const BLOCKS: usize = 512;
/// With fewer left it is time for that commit.
const FEW_BLOCKS: usize = BLOCKS / 16;
/// A batch with more bytes shares its flush among many already. It would only make the tables' next flush longer.
const MAX_FRAME: usize = 8 << 10;

/// Bytes in front of a batch: checksum of all that follows, epoch, number of the frame, length of the batch.
const HEADER: usize = 8 + 8 + 4 + 4;

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// Past the kernel's cache, which is a copy less and leaves nothing to write back. Not every file system can.
    direct: Option<File>,
    buffer: Buffer,
    epoch: u64,
    /// Number of the next frame, and its block.
    number: u32,
    block: usize,
}

/// What a journal held.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Contents {
    /// In their order.
    pub(super) batches: Vec<Batch>,
    /// Batches between or before them that cannot be read.
    pub(super) lost: u64,
}

impl Journal {
    /// Opens or creates the journal of a folder; [`Self::read`] and [`Self::start`] are next.
    pub(super) fn open(dir: &Path) -> Result<Self, LogError> {
        let path = dir.join(FILE_NAME);
        let failed = |error: std::io::Error| LogError::io(&path, &error);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let whole = (BLOCKS * BLOCK) as u64;
        if length < whole {
            // Zeros that are written, so that no later write has to allocate anything.
            let missing = usize::try_from(whole - length).unwrap_or(BLOCKS * BLOCK);
            file.write_all_at(&vec![0; missing], length).map_err(failed)?;
            file.sync_all().map_err(failed)?;
            let dir = File::open(dir).and_then(|dir| dir.sync_all());
            dir.map_err(failed)?;
        }
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or_default();
        let direct = OpenOptions::new().write(true).custom_flags(flags).open(&path).ok();
        Ok(Self { file, direct, buffer: Buffer::new(), epoch: 0, number: 0, block: 0 })
    }

    /// What was flushed in an epoch. A frame that is not whole and has none after it was never acknowledged.
    pub(super) fn read(&self, epoch: u64) -> Result<Contents, LogError> {
        let mut blocks = vec![0; BLOCKS * BLOCK];
        let read = self.file.read_exact_at(&mut blocks, 0);
        read.map_err(|error| LogError::Store(format!("{FILE_NAME}: {error}")))?;
        let mut contents = Contents::default();
        let (mut next, mut rest) = (0, blocks.as_slice());
        while !rest.is_empty() {
            let used = match frame(rest, epoch) {
                // Numbers only grow: a smaller one would be no frame of ours.
                Some((number, payload)) if number >= next => {
                    contents.lost += u64::from(number - next);
                    next = number.saturating_add(1);
                    match BatchRow::decode(payload) {
                        Ok(row) => contents.batches.push(row.into()),
                        Err(_) => contents.lost += 1,
                    }
                    (HEADER + payload.len()).next_multiple_of(BLOCK)
                }
                _ => BLOCK,
            };
            rest = rest.get(used..).unwrap_or_default();
        }
        Ok(contents)
    }

    /// Goes on with an empty journal.
    pub(super) fn start(&mut self, epoch: u64) {
        (self.epoch, self.number, self.block) = (epoch, 0, 0);
    }

    /// The epoch of what is appended now.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether it is better emptied in a moment when nobody waits.
    pub(super) fn is_nearly_full(&self) -> bool {
        BLOCKS - self.block < FEW_BLOCKS
    }

    /// Writes a batch and returns when it is on disk; false if it is too large or there is no room, and nothing happened.
    pub(super) fn append(&mut self, batch: &Batch) -> Result<bool, LogError> {
        if batch.event_bytes() > MAX_FRAME {
            return Ok(false);
        }
        let row = batch.to_row();
        let length = row.encoded_len();
        let blocks = (HEADER + length).div_ceil(BLOCK);
        let Ok(payload_length) = u32::try_from(length) else {
            return Ok(false);
        };
        if length > MAX_FRAME || self.block + blocks > BLOCKS {
            return Ok(false);
        }
        let bytes = self.buffer.blocks(blocks);
        let Some((header, mut rest)) = bytes.split_at_mut_checked(HEADER) else {
            return Ok(false);
        };
        row.encode(&mut rest).map_err(|error| LogError::Store(error.to_string()))?;
        // Whole blocks: the kernel need not read what it writes a part of.
        rest.fill(0);
        let numbers = [
            &self.epoch.to_le_bytes()[..],
            &self.number.to_le_bytes(),
            &payload_length.to_le_bytes(),
        ];
        for (at, byte) in header.iter_mut().skip(8).zip(numbers.into_iter().flatten()) {
            *at = *byte;
        }
        let sum = checksum(bytes.get(..HEADER + length).unwrap_or_default());
        for (at, byte) in bytes.iter_mut().zip(sum) {
            *at = byte;
        }
        let flushed = self.write(blocks);
        flushed.map_err(|error| LogError::io(Path::new(FILE_NAME), &error))?;
        self.number += 1;
        self.block += blocks;
        Ok(true)
    }

    /// Writes the buffer's first blocks to the next ones of the file, and flushes them.
    fn write(&mut self, blocks: usize) -> std::io::Result<()> {
        let (at, bytes) = ((self.block * BLOCK) as u64, self.buffer.blocks(blocks));
        if let Some(direct) = &self.direct {
            match direct.write_all_at(bytes, at) {
                // Blocks may have to be larger there: not worth more than going the usual way.
                Err(error) if error.kind() == ErrorKind::InvalidInput => self.direct = None,
                written => return written.and_then(|()| direct.sync_data()),
            }
        }
        self.file.write_all_at(bytes, at)?;
        self.file.sync_data()
    }
}

/// Bytes that begin on a block in memory, too: that is what a write past the cache asks for.
#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let bytes = vec![0; (MAX_FRAME + HEADER).next_multiple_of(BLOCK) + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    /// The first of its blocks.
    fn blocks(&mut self, count: usize) -> &mut [u8] {
        let end = self.start.saturating_add(count * BLOCK);
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }
}

fn checksum(frame: &[u8]) -> [u8; 8] {
    xxh3_64(frame.get(8..).unwrap_or_default()).to_le_bytes()
}

/// Number and batch of the frame that bytes begin with, if it is whole and of that epoch.
fn frame(bytes: &[u8], epoch: u64) -> Option<(u32, &[u8])> {
    let found = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
    let number = u32::from_le_bytes(bytes.get(16..20)?.try_into().ok()?);
    let length = u32::from_le_bytes(bytes.get(20..24)?.try_into().ok()?);
    let end = HEADER.checked_add(usize::try_from(length).ok()?)?;
    let frame = bytes.get(..end)?;
    let whole = found == epoch && frame.get(..8)? == checksum(frame);
    whole.then(|| (number, frame.get(HEADER..).unwrap_or_default()))
}

#[cfg(test)]
mod tests;
