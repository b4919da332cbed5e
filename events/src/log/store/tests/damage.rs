//! The store on a disk that alters what it holds, or cannot read it any more.

use std::fs;
use std::ops::{Range, RangeInclusive};

use duet_api::proto;
use prost::Message as _;
use tempfile::TempDir;

use super::super::super::record::{TopicRow, Unsealed};
use super::*;

const PAGE: usize = 4096;

/// The frame of an event full of one byte, which is its position.
fn frame(position: u64, bytes: usize) -> Vec<u8> {
    let data = Some(vec![u8::try_from(position % 256).unwrap(); bytes].into());
    let event = Some(proto::Event { data, ..proto::Event::default() });
    let record = Record { published_ms: 0, event, route: String::new() };
    Unsealed::new(&record).seal((1, position))
}

/// Events of topic 1, and its row.
fn published(positions: RangeInclusive<u64>, bytes: usize) -> Batch {
    let row = TopicRow { id: 1, first: 1, next: positions.end() + 1, ..TopicRow::default() };
    Batch {
        topics: [("t".to_owned(), row.encode_to_vec())].into(),
        events: positions.map(|at| ((1, at), frame(at, bytes))).collect(),
        ..Batch::default()
    }
}

/// A disk whose tables have events from 1 on.
fn filled(count: u64, bytes: usize) -> Disk {
    let disk = Disk::new();
    let mut store = open(&disk).unwrap();
    store.commit(published(1..=count, bytes)).unwrap();
    store.settle().unwrap();
    drop(store);
    disk
}

/// Changes the pages that have an event, each at its beginning or where the event is. Returns where they are.
fn damage(image: &mut [u8], position: u8, change: impl Fn(&mut [u8], usize)) -> Vec<Range<usize>> {
    let mut changed = Vec::new();
    for (number, page) in image.chunks_mut(PAGE).enumerate() {
        if let Some(at) = page.windows(90).position(|part| part.iter().all(|b| *b == position)) {
            change(page, at);
            changed.push(number * PAGE..(number + 1) * PAGE);
        }
    }
    assert!(!changed.is_empty());
    changed
}

/// Turns one bit of an event.
fn turn_bit(page: &mut [u8], at: usize) {
    page[at] ^= 1;
}

/// Takes away what says how a page is laid out.
fn break_page(page: &mut [u8], _at: usize) {
    page[..16].fill(0xff);
}

fn is_found(store: &mut Store, position: u64) -> bool {
    matches!(store.find((1, position)).unwrap(), Found::Record(..))
}

fn next(store: &Store) -> u64 {
    let topics = store.contents().unwrap().topics;
    TopicRow::decode(topics[0].1.as_slice()).unwrap().next
}

#[test]
fn a_bit_that_turned_costs_one_event_also_after_a_crash() {
    type Commit = fn(&mut Store);
    let in_background: Commit = |store| {
        store.commit(published(21..=21, 90)).unwrap();
        store.begin_writing().unwrap();
        store.end_writing().unwrap();
    };
    let ahead: Commit = |store| {
        store.commit(published(21..=21, 90)).unwrap();
        store.write_ahead().unwrap();
        store.end_writing().unwrap();
    };
    let at_once: Commit = |store| store.commit(published(21..=21, 200_000)).unwrap();
    for commit in [in_background, ahead, at_once] {
        let disk = filled(20, 3000);
        damage(&mut disk.tables.image.lock().now, 5, turn_bit);
        let mut store = open(&disk).unwrap();
        commit(&mut store);
        let after = disk.after_power_cut(|| false);
        drop(store);
        let mut store = open(&after).unwrap();
        let lost = (1..=21).filter(|at| !is_found(&mut store, *at));
        assert_eq!(lost.collect::<Vec<_>>(), [5]);
    }
}

#[test]
fn a_damaged_frame_that_is_in_the_tables_already_changes_nothing() {
    let disk = Disk::new();
    let mut store = open(&disk).unwrap();
    for position in 1..=11 {
        store.commit(published(position..=position, 2000)).unwrap();
    }
    store.write_ahead().unwrap();
    store.end_writing().unwrap();
    store.commit(published(12..=12, 2000)).unwrap();
    let after = disk.after_power_cut(|| false);
    drop(store);
    damage(&mut after.journal.image.lock().now, 11, turn_bit);
    damage(&mut after.journal.image.lock().now, 12, turn_bit);
    let mut store = open(&after).unwrap();
    assert_eq!((next(&store), store.lost_batches()), (12, 0));
    assert!(is_found(&mut store, 11), "it was acknowledged");
}

#[test]
fn retention_that_reaches_a_damaged_page_costs_no_other_event() {
    let disk = filled(20, 3000);
    damage(&mut disk.tables.image.lock().now, 5, break_page);
    let mut store = open(&disk).unwrap();
    let trims = vec![(1, 1..8)];
    store.commit(Batch { trims, ..published(21..=21, 90) }).unwrap();
    store.begin_writing().unwrap();
    store.end_writing().unwrap();
    store.commit(Batch { trims: vec![(1, 8..10)], ..published(22..=22, 90) }).unwrap();
    let after = disk.after_power_cut(|| false);
    drop(store);
    let mut store = open(&after).unwrap();
    assert_eq!((next(&store), store.lost_batches()), (23, 0));
    let found = (8..=22).filter(|at| is_found(&mut store, *at));
    assert_eq!(found.collect::<Vec<_>>(), (10..=22).collect::<Vec<_>>());
}

#[test]
fn retention_beside_a_damaged_page_costs_no_other_event() {
    // Wherever it ends: what is left of a page may be put together with the one beside it.
    for end in (2..90).step_by(3) {
        let disk = filled(200, 90);
        let mut store = open(&disk).unwrap();
        store.commit(Batch { trims: vec![(1, 1..end)], ..published(201..=201, 90) }).unwrap();
        let after = disk.after_power_cut(|| false);
        drop(store);
        damage(&mut after.tables.image.lock().now, 90, break_page);
        for _ in 0..2 {
            let mut store = open(&after).unwrap();
            assert_eq!((next(&store), store.lost_batches()), (202, 0), "up to {end}");
            assert!(is_found(&mut store, 201) && is_found(&mut store, 150), "up to {end}");
        }
    }
}

#[test]
fn batches_that_damaged_tables_do_not_take_are_counted_and_the_store_opens() {
    let disk = filled(20, 3000);
    let mut store = open(&disk).unwrap();
    // The second goes where the damage is, the others do not.
    let other =
        |name: &str| Batch { topics: [(name.to_owned(), vec![1])].into(), ..Batch::default() };
    store.commit(other("a")).unwrap();
    store.commit(published(21..=21, 90)).unwrap();
    store.commit(other("b")).unwrap();
    let after = disk.after_power_cut(|| false);
    drop(store);
    damage(&mut after.tables.image.lock().now, 20, break_page);
    let mut lost = Vec::new();
    for _ in 0..2 {
        let mut store = open(&after).unwrap();
        lost.push(store.lost_batches());
        let topics = store.contents().unwrap().topics.into_iter().map(|(name, _)| name);
        assert_eq!(topics.collect::<Vec<_>>(), ["a", "b", "t"]);
        assert!(is_found(&mut store, 19));
    }
    assert_eq!(lost, [1, 0]);
}

#[test]
fn after_a_write_that_panicked_nothing_is_written() {
    let disk = filled(20, 3000);
    damage(&mut disk.tables.image.lock().now, 20, break_page);
    let mut store = open(&disk).unwrap();
    store.commit(published(21..=21, 90)).unwrap();
    store.begin_writing().unwrap();
    assert!(store.end_writing().is_err());
    let writes = disk.faults.lock().writes;
    assert!(store.put(&[published(21..=21, 90)]).is_err());
    drop(store);
    assert_eq!(disk.faults.lock().writes, writes);
    assert_eq!(open(&disk).unwrap().lost_batches(), 1);
}

#[test]
fn what_the_disk_cannot_read_costs_the_events_there() {
    let disk = filled(20, 3000);
    let pages = damage(&mut disk.tables.image.lock().now, 5, |_page, _at| {});
    *disk.tables.bad.lock() = pages;
    let mut store = open(&disk).unwrap();
    assert!(matches!(store.find((1, 5)), Ok(Found::Damaged(0))));
    assert!(is_found(&mut store, 4) && is_found(&mut store, 6));
    store.commit(published(21..=21, 90)).unwrap();
    store.settle().unwrap();
    assert!(is_found(&mut store, 21));
}

#[test]
fn a_disk_that_cannot_read_the_beginning_is_an_error() {
    let disk = filled(2, 3000);
    disk.tables.bad.lock().push(0..PAGE);
    open(&disk).unwrap_err();
    disk.tables.bad.lock().clear();
    assert!(is_found(&mut open(&disk).unwrap(), 1));
}

#[test]
fn damaged_pages_are_left_out_of_what_is_read_and_of_a_copy() {
    for damaged in [vec![1], vec![5], vec![20], vec![1, 2, 3, 9]] {
        let disk = filled(20, 3000);
        for position in &damaged {
            damage(&mut disk.tables.image.lock().now, *position, break_page);
        }
        let mut store = open(&disk).unwrap();
        let snapshot = store.snapshot().unwrap();
        let whole = (1..=20).filter(|at| !damaged.contains(&u8::try_from(*at).unwrap()));
        let whole: Vec<u64> = whole.collect();
        let read = |limit| {
            let records = snapshot.records(1, 0..u64::MAX, limit).unwrap();
            records.into_iter().map(|(position, _)| position).collect::<Vec<_>>()
        };
        assert_eq!(read(100), whole);
        assert_eq!(read(4), whole[..4]);
        let dir = TempDir::new().unwrap();
        assert_eq!(snapshot.copy_to(dir.path()).unwrap(), damaged.len() as u64);
        let mut copy = Store::open(dir.path(), 1 << 20).unwrap();
        assert_eq!(copy.count_events().unwrap(), whole.len() as u64);
        assert!(whole.iter().all(|at| is_found(&mut copy, *at)));
    }
}

#[test]
fn a_store_whose_creation_was_cut_short_is_made_anew() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join(FILE_NAME), [0; 73_728]).unwrap();
    let mut store = Store::open(dir.path(), 1 << 20).unwrap();
    store.commit(published(1..=1, 10)).unwrap();
}

/// Nearly all of its file is unused, but not its end.
fn hollow(dir: &TempDir) {
    let mut store = Store::open(dir.path(), 1 << 20).unwrap();
    for first in (1..=100).step_by(10) {
        store.commit(published(first..=first + 9, 1 << 20)).unwrap();
    }
    store.commit(published(101..=120, 3000)).unwrap();
    store.commit(Batch { trims: vec![(1, 1..100)], ..Batch::default() }).unwrap();
    store.settle().unwrap();
}

fn length(dir: &TempDir) -> u64 {
    fs::metadata(dir.path().join(FILE_NAME)).unwrap().len()
}

#[test]
fn a_file_that_is_mostly_unused_is_shortened_also_where_pages_are_damaged() {
    for damaged in [false, true] {
        let dir = TempDir::new().unwrap();
        hollow(&dir);
        assert!(length(&dir) > COMPACT_FROM_BYTES, "{}", length(&dir));
        let path = dir.path().join(FILE_NAME);
        if damaged {
            let mut image = fs::read(&path).unwrap();
            damage(&mut image, 105, break_page);
            fs::write(&path, image).unwrap();
        }
        let mut store = Store::open(dir.path(), 1 << 20).unwrap();
        assert!(length(&dir) < COMPACT_FROM_BYTES / 4, "{}", length(&dir));
        assert_eq!(Store::open(dir.path(), 1 << 20).unwrap_err(), LogError::InUse);
        let lost = (100..=120).filter(|at| !is_found(&mut store, *at));
        assert_eq!(lost.count(), usize::from(damaged));
        store.commit(published(121..=121, 90)).unwrap();
        drop(store);
        assert!(is_found(&mut Store::open(dir.path(), 1 << 20).unwrap(), 121));
    }
}

#[test]
fn a_file_that_cannot_be_shortened_is_used_as_it_is() {
    let dir = TempDir::new().unwrap();
    hollow(&dir);
    // In the way of the copy.
    fs::create_dir(dir.path().join("log.redb.partial")).unwrap();
    let mut store = Store::open(dir.path(), 1 << 20).unwrap();
    assert!(length(&dir) > COMPACT_FROM_BYTES);
    assert!(is_found(&mut store, 101));
}
