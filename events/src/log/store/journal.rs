//! The journal in front of the store: a file of fixed length whose blocks are all allocated, so that a small batch is
//! durable after one write in one place and one flush of data alone. A commit of the store rewrites eight pages all over
//! its file, and takes twice as long.
//!
//! A frame is a batch; it begins on a block of its own, so that no write touches what was flushed before. Frames of one
//! *epoch* are counted from 0. Each durable commit of the store holds every batch up to some frame and names the next
//! one, in the same transaction: only frames from that one on, and of the epoch after it, are still to be written to the
//! store. Two epochs that follow each other have a half of the file each, so that the journal goes on in one while a
//! commit makes the other free. Nothing is erased.

use std::collections::BTreeSet;
use std::path::Path;

use prost::Message as _;
use xxhash_rust::xxh3::xxh3_64;

use super::super::LogError;
use super::batch::{Batch, BatchRow};
use super::mark::Mark;

mod blocks;

pub(super) use blocks::{Blocks, FileBlocks};

/// Name of the file in the log's folder.
pub(super) const FILE_NAME: &str = "log.journal";
/// What a disk writes as one. Frames begin on multiples of it.
pub(super) const BLOCK: usize = 4096;
/// Length of the file.
pub(super) const BLOCKS: usize = 2 * HALF;
/// This many small batches share one durable commit of the store, which takes some milliseconds.
const HALF: usize = 512;
/// With fewer left it is time for that commit.
const FEW_BLOCKS: usize = HALF / 16;
/// A batch with more bytes shares its flush among so many events that a commit of its own makes little difference.
const MAX_FRAME: usize = 128 << 10;

/// Bytes in front of a batch: checksum of all that follows, epoch, number of the frame, frames of the epoch before,
/// length of the batch.
const HEADER: usize = 8 + 8 + 4 + 4 + 4;

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    blocks: Box<dyn Blocks>,
    buffer: Buffer,
    epoch: u64,
    /// Frames of the epoch before.
    before: u32,
    /// Number of the next frame, and its block in the epoch's half.
    number: u32,
    block: usize,
}

/// What a journal held.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Contents {
    /// In their order.
    pub(super) batches: Vec<Batch>,
    /// Batches before, between or after them that cannot be read, as far as that can be known.
    pub(super) lost: u64,
}

impl Journal {
    /// Prepares blocks for a journal; [`read`] comes before, and [`Self::start`] after it.
    pub(super) fn open(mut blocks: Box<dyn Blocks>) -> Result<Self, LogError> {
        let prepared = blocks.prepare();
        prepared.map_err(|error| LogError::io(Path::new(FILE_NAME), &error))?;
        Ok(Self { blocks, buffer: Buffer::new(), epoch: 0, before: 0, number: 0, block: 0 })
    }

    /// Goes on with an empty half.
    pub(super) fn start(&mut self, epoch: u64) {
        let follows = epoch == self.epoch.wrapping_add(1);
        self.before = if follows { self.number } else { 0 };
        (self.epoch, self.number, self.block) = (epoch, 0, 0);
    }

    /// The next frame.
    pub(super) fn mark(&self) -> Mark {
        Mark { epoch: self.epoch, frame: self.number }
    }

    /// The first frame of the other half.
    pub(super) fn next_half(&self) -> Mark {
        Mark { epoch: self.epoch.wrapping_add(1), frame: 0 }
    }

    /// Whether anything was appended in this epoch.
    pub(super) fn is_used(&self) -> bool {
        self.block > 0
    }

    /// Whether it is better to go on in the other half.
    pub(super) fn is_nearly_full(&self) -> bool {
        HALF - self.block < FEW_BLOCKS
    }

    /// Whether a batch is small enough.
    pub(super) fn takes(batch: &Batch) -> bool {
        batch.event_bytes() <= MAX_FRAME
    }

    /// Writes a batch and returns when it is on disk; false if it is too large or there is no room, and nothing happened.
    pub(super) fn append(&mut self, batch: &BatchRow) -> Result<bool, LogError> {
        let length = batch.encoded_len();
        let blocks = (HEADER + length).div_ceil(BLOCK);
        let Ok(payload_length) = u32::try_from(length) else {
            return Ok(false);
        };
        if length > MAX_FRAME || self.block + blocks > HALF {
            return Ok(false);
        }
        let bytes = self.buffer.blocks(blocks);
        let Some((header, mut rest)) = bytes.split_at_mut_checked(HEADER) else {
            return Ok(false);
        };
        batch.encode(&mut rest).map_err(|error| LogError::Store(error.to_string()))?;
        // Whole blocks: the kernel need not read what it writes a part of.
        rest.fill(0);
        let numbers = [
            &self.epoch.to_le_bytes()[..],
            &self.number.to_le_bytes(),
            &self.before.to_le_bytes(),
            &payload_length.to_le_bytes(),
        ];
        for (at, byte) in header.iter_mut().skip(8).zip(numbers.into_iter().flatten()) {
            *at = *byte;
        }
        let sum = checksum(bytes.get(..HEADER + length).unwrap_or_default());
        for (at, byte) in bytes.iter_mut().zip(sum) {
            *at = byte;
        }
        let block = half(self.epoch) + self.block;
        let written = self.blocks.write(block, self.buffer.blocks(blocks));
        let flushed = written.and_then(|()| self.blocks.flush());
        flushed.map_err(|error| LogError::io(Path::new(FILE_NAME), &error))?;
        self.number += 1;
        self.block += blocks;
        Ok(true)
    }
}

/// What was flushed from a frame on, in its epoch and the one after it. A frame that is not whole and has none after it was
/// never acknowledged, unless a part of it is there and cannot be read.
pub(super) fn read(blocks: &dyn Blocks, from: Mark) -> Contents {
    let mut contents = Contents::default();
    let older = Half::read(blocks, from.epoch);
    let frames = older.frames(from.frame, &mut contents);
    let newer = Half::read(blocks, from.epoch.wrapping_add(1));
    let after = newer.frames(0, &mut contents);
    if after.count > 0 {
        contents.lost += u64::from(after.before.saturating_sub(frames.count));
    }
    let hidden = after.count == 0 && older.may_hide_more(&frames);
    contents.lost += u64::from(hidden || newer.may_hide_more(&after));
    contents
}

/// One epoch's blocks.
struct Half {
    epoch: u64,
    bytes: Vec<u8>,
    /// Blocks of it that cannot be read.
    gaps: BTreeSet<usize>,
}

/// What was found in a half.
#[derive(Default)]
struct Frames {
    /// How many were written, as far as that can be known.
    count: u32,
    /// Frames of the epoch before, as they say.
    before: u32,
    /// The block after the last one.
    end: usize,
}

impl Half {
    fn read(blocks: &dyn Blocks, epoch: u64) -> Self {
        let mut bytes = vec![0; HALF * BLOCK];
        let mut gaps = BTreeSet::new();
        for (number, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
            // One bad sector must not hide all others.
            if let Err(error) = blocks.read(half(epoch) + number, block) {
                if gaps.is_empty() {
                    tracing::warn!(block = number, %error, "the log's journal cannot be read in full");
                }
                gaps.insert(number);
            }
        }
        Self { epoch, bytes, gaps }
    }

    /// Takes its frames, but for those before the first that is wanted. Those must not be taken: were the last of them
    /// damaged, the others would bring back what it had changed.
    fn frames(&self, first: u32, contents: &mut Contents) -> Frames {
        let (mut found, mut at) = (Frames::default(), 0);
        while let Some(rest) = self.bytes.get(at * BLOCK..).filter(|rest| !rest.is_empty()) {
            match frame(rest, self.epoch) {
                // Numbers only grow: a smaller one would be no frame of ours.
                Some(frame) if frame.number >= found.count => {
                    let missing = frame.number.saturating_sub(found.count.max(first));
                    contents.lost += u64::from(missing);
                    if frame.number >= first {
                        match BatchRow::decode(frame.batch) {
                            Ok(row) => contents.batches.push(row.into()),
                            Err(_) => contents.lost += 1,
                        }
                    }
                    at += (HEADER + frame.batch.len()).div_ceil(BLOCK);
                    let count = frame.number.saturating_add(1);
                    found = Frames { count, before: frame.before, end: at };
                }
                _ => at += 1,
            }
        }
        found.count = found.count.max(first);
        found
    }

    /// Whether a frame may have been in the blocks after the last one that cannot be read.
    fn may_hide_more(&self, found: &Frames) -> bool {
        let end = found.end;
        // Frames follow each other: the next one would begin there.
        let begins = self.gaps.contains(&end)
            || self.bytes.get(end * BLOCK..).and_then(epoch_of) == Some(self.epoch);
        let most = end + (HEADER + MAX_FRAME).div_ceil(BLOCK);
        begins && self.gaps.range(end..most).next().is_some()
    }
}

/// The first block of an epoch's half: two that follow each other have one each.
fn half(epoch: u64) -> usize {
    if epoch.is_multiple_of(2) { 0 } else { HALF }
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

fn epoch_of(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?))
}

#[derive(Debug, PartialEq)]
struct Frame<'b> {
    number: u32,
    before: u32,
    batch: &'b [u8],
}

/// The frame that bytes begin with, if it is whole and of that epoch.
fn frame(bytes: &[u8], epoch: u64) -> Option<Frame<'_>> {
    let found = epoch_of(bytes)?;
    let number = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    let (order, before, length) = (number(16)?, number(20)?, number(24)?);
    let end = HEADER.checked_add(usize::try_from(length).ok()?)?;
    let frame = bytes.get(..end)?;
    let whole = found == epoch && frame.get(..8)? == checksum(frame);
    whole.then(|| Frame { number: order, before, batch: frame.get(HEADER..).unwrap_or_default() })
}

#[cfg(test)]
mod tests;
