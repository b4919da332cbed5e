//! The journal as a file: what is found in it again, whatever happened to its bytes.

use std::fs::OpenOptions;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn batch(position: u64, bytes: usize) -> Batch {
    Batch { events: vec![((1, position), vec![7; bytes])], ..Batch::default() }
}

fn blocks(dir: &TempDir) -> Box<dyn Blocks> {
    Box::new(FileBlocks::open(dir.path()).unwrap())
}

/// Blocks some of which cannot be read.
#[derive(Debug)]
struct Unreadable<'a>(&'a TempDir, &'a [usize]);

impl Blocks for Unreadable<'_> {
    fn read(&self, block: usize, out: &mut [u8]) -> std::io::Result<()> {
        if self.1.contains(&block) {
            return Err(std::io::Error::other("bad sector"));
        }
        blocks(self.0).read(block, out)
    }
    fn prepare(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn write(&mut self, _: usize, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn fill(dir: &TempDir, epoch: u64, batches: impl IntoIterator<Item = Batch>) -> Journal {
    let mut journal = Journal::open(blocks(dir)).unwrap();
    journal.start(epoch);
    for batch in batches {
        assert!(journal.append(&batch.into()).unwrap());
    }
    journal
}

fn read(dir: &TempDir, epoch: u64) -> Contents {
    super::read(&*blocks(dir), Mark { epoch, frame: 0 })
}

/// Changes one byte of a block.
fn flip(dir: &TempDir, block: usize, at: usize) {
    let path = dir.path().join(FILE_NAME);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[block * BLOCK + at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn batches_of_the_epoch_come_back_in_order_and_others_do_not() {
    let dir = TempDir::new().unwrap();
    fill(&dir, 4, (1..=4).map(|at| batch(at, 10)));
    let mut journal = fill(&dir, 6, [batch(9, 5000), batch(10, 1)]);
    journal.start(8);
    assert_eq!(read(&dir, 6), Contents { batches: vec![batch(9, 5000), batch(10, 1)], lost: 0 });
    assert_eq!(read(&dir, 8), Contents::default());
    // Block 3 was not written again: the last of the four. Those before it are gone.
    assert_eq!(read(&dir, 4), Contents { batches: vec![batch(4, 10)], lost: 3 });
}

#[test]
fn an_epoch_and_the_next_one_have_a_half_each() {
    let dir = TempDir::new().unwrap();
    let mut journal = fill(&dir, 7, [batch(1, 10), batch(2, 10)]);
    journal.start(8);
    assert!(journal.append(&batch(3, 10).into()).unwrap());
    let all = vec![batch(1, 10), batch(2, 10), batch(3, 10)];
    assert_eq!(read(&dir, 7), Contents { batches: all, lost: 0 });
    assert_eq!(read(&dir, 8), Contents { batches: vec![batch(3, 10)], lost: 0 });
    // The last of the older one; only the newer one knows that there was one more.
    flip(&dir, HALF + 1, 21);
    let left = vec![batch(1, 10), batch(3, 10)];
    assert_eq!(read(&dir, 7), Contents { batches: left, lost: 1 });
    journal.start(9);
    assert_eq!(read(&dir, 8), Contents { batches: vec![batch(3, 10)], lost: 0 });
}

#[test]
fn a_torn_frame_at_the_end_was_never_acknowledged() {
    let dir = TempDir::new().unwrap();
    fill(&dir, 6, [batch(1, 10), batch(2, 6000)]);
    flip(&dir, 2, 100);
    assert_eq!(read(&dir, 6), Contents { batches: vec![batch(1, 10)], lost: 0 });
}

#[test]
fn a_damaged_frame_is_counted_and_those_after_it_are_found() {
    let dir = TempDir::new().unwrap();
    fill(&dir, 6, [batch(1, 10), batch(2, 6000), batch(3, 10)]);
    // In its header, so that not even its length is known.
    flip(&dir, 1, 21);
    assert_eq!(read(&dir, 6), Contents { batches: vec![batch(1, 10), batch(3, 10)], lost: 1 });
}

#[test]
fn frames_before_the_first_that_is_wanted_are_neither_read_nor_missed() {
    let dir = TempDir::new().unwrap();
    let mut journal = fill(&dir, 6, [batch(1, 10), batch(2, 10), batch(3, 10), batch(4, 10)]);
    let read = |frame| super::read(&*blocks(&dir), Mark { epoch: 6, frame });
    assert_eq!(read(3), Contents { batches: vec![batch(4, 10)], lost: 0 });
    assert_eq!(read(4), Contents::default());
    flip(&dir, 1, 21);
    assert_eq!(read(2), Contents { batches: vec![batch(3, 10), batch(4, 10)], lost: 0 });
    assert_eq!(read(1), Contents { batches: vec![batch(3, 10), batch(4, 10)], lost: 1 });
    flip(&dir, 3, 21);
    assert_eq!(read(4), Contents::default());
    journal.start(7);
    assert!(journal.append(&batch(5, 10).into()).unwrap());
    assert_eq!(read(4), Contents { batches: vec![batch(5, 10)], lost: 0 });
    assert_eq!(read(3), Contents { batches: vec![batch(5, 10)], lost: 1 });
}

#[test]
fn what_is_too_large_or_has_no_room_is_left_to_the_store() {
    let dir = TempDir::new().unwrap();
    let mut journal = fill(&dir, 6, []);
    assert!(!Journal::takes(&batch(1, MAX_FRAME + 1)));
    // Small enough, until it is encoded.
    assert!(!journal.append(&batch(1, MAX_FRAME).into()).unwrap());
    let mut taken = 0;
    while journal.append(&batch(taken, MAX_FRAME - 100).into()).unwrap() {
        taken += 1;
    }
    assert!(journal.is_nearly_full());
    assert_eq!(read(&dir, 6).batches.len() as u64, taken);
    journal.start(7);
    assert!(!journal.is_nearly_full());
    assert!(journal.append(&batch(1, 1).into()).unwrap());
}

#[test]
fn a_short_file_is_made_whole_and_keeps_what_it_has() {
    let dir = TempDir::new().unwrap();
    fill(&dir, 6, [batch(1, 10)]);
    let path = dir.path().join(FILE_NAME);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(2 * BLOCK as u64 + 7).unwrap();
    // Another would begin in the second block, which is there; but the next epoch may have begun.
    assert_eq!(read(&dir, 6), Contents { batches: vec![batch(1, 10)], lost: 1 });
    drop(Journal::open(blocks(&dir)).unwrap());
    assert_eq!(read(&dir, 6), Contents { batches: vec![batch(1, 10)], lost: 0 });
    assert_eq!(file.metadata().unwrap().len(), (BLOCKS * BLOCK) as u64);
}

#[test]
fn a_file_that_ends_within_an_epoch_may_have_had_more() {
    let dir = TempDir::new().unwrap();
    fill(&dir, 6, [batch(1, 10), batch(2, 6000), batch(3, 10)]);
    let file = OpenOptions::new().write(true).open(dir.path().join(FILE_NAME)).unwrap();
    file.set_len(2 * BLOCK as u64).unwrap();
    assert_eq!(read(&dir, 6), Contents { batches: vec![batch(1, 10)], lost: 1 });
    file.set_len(BLOCK as u64).unwrap();
    assert_eq!(read(&dir, 6), Contents { batches: vec![batch(1, 10)], lost: 1 });
    std::fs::remove_file(dir.path().join(FILE_NAME)).unwrap();
    assert_eq!(read(&dir, 6), Contents { batches: vec![], lost: 1 });
}

#[test]
fn a_block_that_cannot_be_read_hides_no_other() {
    let dir = TempDir::new().unwrap();
    fill(&dir, 6, [batch(1, 10), batch(2, 6000), batch(3, 10)]);
    let read = |unreadable: &[usize]| {
        let contents = super::read(&Unreadable(&dir, unreadable), Mark { epoch: 6, frame: 0 });
        let positions = contents.batches.iter().map(|batch| batch.events[0].0.1);
        (positions.collect::<Vec<_>>(), contents.lost)
    };
    assert_eq!(read(&[2]), (vec![1, 3], 1));
    assert_eq!(read(&[3]), (vec![1, 2], 1), "the last");
    assert_eq!(read(&[4]), (vec![1, 2, 3], 1), "nobody knows");
    assert_eq!(read(&[5, 300]), (vec![1, 2, 3], 0), "another would begin before");
    assert_eq!(read(&(0..BLOCKS).collect::<Vec<_>>()), (vec![], 1));
}

#[test]
fn no_room_for_a_journal_is_a_full_disk() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(FILE_NAME);
    // A name for a device on which there never is room.
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    assert_eq!(Journal::open(blocks(&dir)).unwrap_err(), LogError::DiskFull);
}

fn rows() -> impl Strategy<Value = Option<Vec<u8>>> {
    proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20))
}

prop_compose! {
    fn any_batch()(
        topics in proptest::collection::btree_map("[a-z]{1,9}", any::<Vec<u8>>(), 0..3),
        events in proptest::collection::vec((any::<(u32, u64)>(), any::<Vec<u8>>()), 0..5),
        trims in proptest::collection::vec((any::<u32>(), any::<std::ops::Range<u64>>()), 0..3),
        subscriptions in proptest::collection::btree_map("[a-z]{1,9}", rows(), 0..3),
        progress in proptest::collection::btree_map(any::<u32>(), rows(), 0..3),
        attempts in proptest::collection::btree_map(any::<(u32, u64)>(), rows(), 0..3),
        forget: Vec<u32>,
    ) -> Batch {
        Batch { topics, events, trims, subscriptions, progress, attempts, forget }
    }
}

proptest! {
    #[test]
    fn every_part_of_a_batch_comes_back(batch in any_batch()) {
        let bytes = BatchRow::from(batch.clone()).encode_to_vec();
        prop_assert_eq!(Batch::from(BatchRow::decode(bytes.as_slice()).unwrap()), batch);
    }

    #[test]
    fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), epoch: bool) {
        if epoch && bytes.len() > 16 {
            bytes[8..16].copy_from_slice(&7_u64.to_le_bytes());
        }
        prop_assert_eq!(frame(&bytes, 7), None);
    }
}
