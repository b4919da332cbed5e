//! The store and its journal when the power goes: of what was not flushed, any part may be on the disk.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;
use disk::{Disk, Image};

mod damage;
mod disk;

fn open(disk: &Disk) -> Result<Store, LogError> {
    Store::open_on(|| Ok(disk.tables.clone()), Box::new(disk.journal.clone()), 1 << 20)
}

type Events = BTreeMap<Place, Vec<u8>>;

fn events(store: &Store) -> Events {
    let table = store.database.begin_read().unwrap().open_table(EVENTS).unwrap();
    let rows = table.iter().unwrap().map(Result::unwrap);
    rows.map(|(place, frame)| (place.value(), frame.value().to_vec())).collect()
}

/// What a batch makes of the events.
fn write_to(events: &mut Events, batch: &Batch) {
    events.extend(batch.events.iter().cloned());
    for (topic, positions) in &batch.trims {
        events.retain(|place, _| place.0 != *topic || !positions.contains(&place.1));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Append { events: u64, bytes: usize },
    Trim(u64),
    Settle,
    CatchUp,
    OtherHalf,
    Ahead,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1_u64..5, 0_usize..3000).prop_map(|(events, bytes)| Step::Append { events, bytes }),
        1 => (70_000_usize..90_000).prop_map(|bytes| Step::Append { events: 1, bytes }),
        2 => (1_u64..5).prop_map(Step::Trim),
        1 => Just(Step::Settle),
        1 => Just(Step::CatchUp),
        1 => Just(Step::OtherHalf),
        1 => Just(Step::Ahead),
    ]
}

/// Positions of the events that are left, and the next.
#[derive(Default)]
struct Bounds {
    first: u64,
    next: u64,
}

fn batch(bounds: &mut Bounds, step: &Step) -> Option<Batch> {
    let mut batch = Batch::default();
    match step {
        Step::Append { events, bytes } => {
            for position in bounds.next..bounds.next + events {
                let fill = u8::try_from(position % 256).unwrap();
                batch.events.push(((1, position), vec![fill; *bytes]));
            }
            bounds.next += events;
        }
        Step::Trim(count) => {
            let end = (bounds.first + count).min(bounds.next);
            batch.trims.push((1, bounds.first..end));
            bounds.first = end;
        }
        Step::Settle | Step::CatchUp | Step::OtherHalf | Step::Ahead => return None,
    }
    Some(batch)
}

/// Does steps until the power goes; `acknowledged` and, after it, what the last step would have made of it.
fn run(
    store: &mut Store,
    steps: &[Step],
    bounds: &mut Bounds,
    acknowledged: &mut Events,
) -> Events {
    for step in steps {
        let Some(batch) = batch(bounds, step) else {
            let done = match step {
                Step::Settle => store.settle(),
                Step::OtherHalf => store.begin_writing(),
                Step::Ahead => store.write_ahead(),
                Step::CatchUp | Step::Append { .. } | Step::Trim(_) => store.catch_up(),
            };
            if done.is_err() {
                break;
            }
            continue;
        };
        let mut wanted = acknowledged.clone();
        write_to(&mut wanted, &batch);
        match store.commit(batch) {
            Ok(()) => acknowledged.clone_from(&wanted),
            Err(_) => return wanted,
        }
    }
    // What is there for readers is what is acknowledged, wherever it is.
    for (place, frame) in acknowledged.iter() {
        let found = store.find(*place);
        assert!(
            found.is_err()
                || matches!(found, Ok(Found::Damaged(length)) if length == frame.len() as u64)
        );
    }
    acknowledged.clone()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn after_any_power_cut_everything_acknowledged_is_there_and_nothing_else(
        lives in proptest::collection::vec(
            (proptest::collection::vec(step(), 1..25), proptest::option::of(0_usize..200)), 1..4),
        survivors in proptest::collection::vec(any::<bool>(), 1..64),
    ) {
            let (mut disk, mut bounds, mut acknowledged) = (Disk::new(), Bounds::default(), Events::new());
        let mut survivors = survivors.iter().cycle();
        for (steps, writes) in &lives {
            let mut store = open(&disk).unwrap();
            let found = events(&store);
            prop_assert_eq!(&found, &acknowledged);
            disk.faults.lock().left = *writes;
            let wanted = run(&mut store, steps, &mut bounds, &mut acknowledged);
            // Closing would write more.
            disk.faults.lock().left = Some(0);
            let after = disk.after_power_cut(|| *survivors.next().unwrap());
            drop(store);
            disk = after;
            let store = open(&disk).unwrap();
            let found = events(&store);
            prop_assert!(found == acknowledged || found == wanted);
            prop_assert_eq!(store.lost_batches(), 0);
            acknowledged = found;
            drop(store);
        }
    }
}

#[test]
fn a_full_journal_goes_into_the_tables() {
    let disk = Disk::new();
    let mut store = open(&disk).unwrap();
    let mut bounds = Bounds::default();
    let mut acknowledged = Events::new();
    let steps = vec![Step::Append { events: 1, bytes: 10 }; 2500];
    run(&mut store, &steps, &mut bounds, &mut acknowledged);
    let after = disk.after_power_cut(|| false);
    drop(store);
    assert_eq!(events(&open(&after).unwrap()), acknowledged);
}

#[test]
fn what_is_on_its_way_into_the_tables_is_found_and_removed_as_ever() {
    let mut store = open(&Disk::new()).unwrap();
    let put =
        |position: u64| Batch { events: vec![((1, position), vec![7; 9])], ..Batch::default() };
    let is_there = |store: &mut Store, position| {
        matches!(store.find((1, position)).unwrap(), Found::Damaged(9))
    };
    for position in 0..3 {
        store.commit(put(position)).unwrap();
        store.begin_writing().unwrap();
    }
    store.commit(put(3)).unwrap();
    store.commit(Batch { trims: vec![(1, 0..1), (1, 2..3)], ..Batch::default() }).unwrap();
    let left = |store: &mut Store| {
        (0..5).filter(|position| is_there(store, *position)).collect::<Vec<_>>()
    };
    assert_eq!(left(&mut store), [1, 3]);
    store.end_writing().unwrap();
    assert_eq!(left(&mut store), [1, 3]);
    store.settle().unwrap();
    assert_eq!(left(&mut store), [1, 3]);
}

#[test]
fn a_store_whose_tables_could_not_be_written_takes_nothing_and_forgets_nothing() {
    let disk = Disk::new();
    let mut store = open(&disk).unwrap();
    let put =
        |position: u64| Batch { events: vec![((1, position), vec![7; 9])], ..Batch::default() };
    store.commit(put(1)).unwrap();
    disk.tables.broken.store(true, Ordering::Relaxed);
    store.begin_writing().unwrap();
    // The journal goes on by itself.
    store.commit(put(2)).unwrap();
    assert!(store.end_writing().is_err());
    disk.tables.broken.store(false, Ordering::Relaxed);
    assert!(store.settle().is_err());
    assert!(store.begin_writing().is_err());
    assert!(matches!(store.find((1, 1)), Ok(Found::Damaged(9))), "it is still known");
    let after = disk.after_power_cut(|| false);
    drop(store);
    let found = events(&open(&after).unwrap());
    assert_eq!(found.into_keys().collect::<Vec<_>>(), [(1, 1), (1, 2)]);
}

#[test]
fn the_journal_of_another_life_is_left_alone() {
    let disk = Disk::new();
    let mut bounds = Bounds::default();
    let mut acknowledged = Events::new();
    let mut store = open(&disk).unwrap();
    run(
        &mut store,
        &vec![Step::Append { events: 1, bytes: 10 }; 20],
        &mut bounds,
        &mut acknowledged,
    );
    let journal = disk.journal.after_power_cut(|| true);
    drop(store);
    drop(open(&disk).unwrap());
    // An older journal comes back.
    *disk.journal.image.lock() = journal;
    let store = open(&disk).unwrap();
    assert_eq!(events(&store), acknowledged);
    assert_eq!(store.lost_batches(), 0);
}

#[test]
fn a_store_from_before_the_journal_is_taken_over() {
    let disk = Disk::new();
    let old = Store::with_backend(disk.tables.clone(), 1 << 20).unwrap();
    let write = old.database.begin_write().unwrap();
    write.open_table(META).unwrap().insert("format", FORMAT_WITHOUT_JOURNAL).unwrap();
    write.open_table(EVENTS).unwrap().insert((1, 1), [7_u8; 9].as_slice()).unwrap();
    write.commit().unwrap();
    drop(old);
    let store = open(&disk).unwrap();
    assert_eq!(events(&store), Events::from([((1, 1), vec![7; 9])]));
    let meta = store.database.begin_read().unwrap().open_table(META).unwrap();
    // What knows of no journal must not open it any more.
    assert_eq!(meta.get("format").unwrap().unwrap().value(), FORMAT);
}

#[test]
fn what_was_removed_is_not_found_any_more() {
    let mut store = open(&Disk::new()).unwrap();
    let put = Batch { events: vec![((1, 1), vec![7; 9])], ..Batch::default() };
    store.commit(put).unwrap();
    assert!(
        matches!(store.find((1, 1)), Ok(Found::Damaged(9))),
        "it is no record, but it is there"
    );
    let remove = Batch { trims: vec![(1, 1..2)], ..Batch::default() };
    store.commit(remove).unwrap();
    assert!(matches!(store.find((1, 1)), Ok(Found::Nothing)));
}

/// A store with some events in its tables, and the events.
fn some_events(disk: &Disk) -> Events {
    let (mut bounds, mut acknowledged) = (Bounds::default(), Events::new());
    let mut store = open(disk).unwrap();
    let steps = vec![Step::Append { events: 1, bytes: 3000 }; 20];
    run(&mut store, &steps, &mut bounds, &mut acknowledged);
    store.settle().unwrap();
    acknowledged
}

#[test]
fn what_only_the_journal_has_survives_a_power_cut() {
    let disk = Disk::new();
    let mut store = open(&disk).unwrap();
    let batch = Batch { events: vec![((1, 1), vec![7; 5000])], ..Batch::default() };
    store.commit(batch.clone()).unwrap();
    assert!(!store.unwritten.is_empty());
    let after = disk.after_power_cut(|| false);
    drop(store);
    assert_eq!(events(&open(&after).unwrap()), batch.events.into_iter().collect());
}

#[test]
fn what_only_the_journal_has_is_in_the_tables_after_some_seconds() {
    let disk = Disk::new();
    let mut store = open(&disk).unwrap();
    let batch = Batch { events: vec![((1, 1), vec![7; 9])], ..Batch::default() };
    store.commit(batch.clone()).unwrap();
    store.catch_up().unwrap();
    let lose_journal =
        |disk: &Disk| Disk::of(disk.tables.after_power_cut(|| false), Image::default());
    let without = lose_journal(&disk);
    store.journaled_since = Instant::now().checked_sub(LONGEST_IN_JOURNAL);
    store.catch_up().unwrap();
    store.end_writing().unwrap();
    let with = lose_journal(&disk);
    drop(store);
    assert_eq!(events(&open(&without).unwrap()), Events::new());
    assert_eq!(events(&open(&with).unwrap()), batch.events.into_iter().collect());
}

#[test]
fn a_journal_that_is_gone_is_reported() {
    let disk = Disk::new();
    some_events(&disk);
    let gone = Disk::of(disk.tables.after_power_cut(|| true), Image::default());
    assert_eq!(open(&gone).unwrap().lost_batches(), 1);
    assert_eq!(open(&gone).unwrap().lost_batches(), 0, "there is a new one");
}

#[test]
fn a_full_disk_does_not_keep_a_store_closed_whose_journal_is_empty() {
    let disk = Disk::new();
    let mut acknowledged = some_events(&disk);
    // How much the tables alone write when they are opened is not ours.
    let before = disk.faults.lock().writes;
    let tables = Store::with_backend(disk.tables.clone(), 1 << 20).unwrap();
    let own = disk.faults.lock().writes - before;
    drop(tables);
    let mut went_without = 0;
    for writes in own..own + 12 {
        disk.faults.lock().full_in = Some(writes);
        let mut store = open(&disk).unwrap();
        disk.faults.lock().full_in = None;
        went_without += u32::from(store.journal.is_none());
        let position = acknowledged.len() as u64;
        let batch = Batch { events: vec![((1, position), vec![7; 9])], ..Batch::default() };
        write_to(&mut acknowledged, &batch);
        store.commit(batch).unwrap();
        drop(store);
        assert_eq!(events(&open(&disk.after_power_cut(|| false)).unwrap()), acknowledged);
    }
    assert!(went_without > 1, "{went_without}");
}

#[test]
fn a_journal_that_cannot_be_written_is_given_up() {
    let disk = Disk::new();
    let mut acknowledged = some_events(&disk);
    let mut store = open(&disk).unwrap();
    disk.faults.lock().full_in = Some(0);
    let batch = Batch { events: vec![((1, 100), vec![7; 9])], ..Batch::default() };
    write_to(&mut acknowledged, &batch);
    store.commit(batch).unwrap();
    assert!(store.journal.is_none());
    let after = disk.after_power_cut(|| false);
    drop(store);
    let store = open(&after).unwrap();
    assert_eq!((events(&store), store.lost_batches()), (acknowledged, 0));
}
