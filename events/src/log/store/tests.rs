//! The store and its journal when the power goes: of what was not flushed, any part may be on the disk.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A disk that knows what was flushed.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<Image>>);

#[derive(Debug, Default)]
struct Image {
    flushed: Vec<u8>,
    since: Vec<Write>,
    /// With `since`.
    now: Vec<u8>,
    /// Writes until the power goes.
    left: Option<usize>,
}

#[derive(Clone, Debug)]
enum Write {
    Length(usize),
    Bytes(usize, Vec<u8>),
}

impl Write {
    fn apply(&self, image: &mut Vec<u8>) {
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
    fn write(&self, write: Write) -> io::Result<()> {
        let image = &mut *self.0.lock();
        match &mut image.left {
            Some(0) => return Err(io::Error::other("the power is gone")),
            Some(left) => *left -= 1,
            None => {}
        }
        write.apply(&mut image.now);
        image.since.push(write);
        Ok(())
    }

    /// The same disk when the power is back.
    fn after_power_cut(&self, mut survives: impl FnMut() -> bool) -> Self {
        let image = self.0.lock();
        let mut left = image.flushed.clone();
        for write in image.since.iter().filter(|_write| survives()) {
            write.apply(&mut left);
        }
        Self(Arc::new(Mutex::new(Image { flushed: left.clone(), now: left, ..Image::default() })))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().now.len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let image = self.0.lock();
        let bytes = image.now.get(at..at + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.write(Write::Length(usize::try_from(len).unwrap()))
    }
    fn sync_data(&self) -> io::Result<()> {
        let image = &mut *self.0.lock();
        if image.left == Some(0) {
            return Err(io::Error::other("the power is gone"));
        }
        image.flushed.clone_from(&image.now);
        image.since.clear();
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(Write::Bytes(usize::try_from(offset).unwrap(), data.to_vec()))
    }
}

fn open(disk: &Disk, dir: &TempDir) -> Result<Store, LogError> {
    let mut store = Store::with_backend(disk.clone(), 1 << 20)?;
    store.use_journal(dir.path())?;
    Ok(store)
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
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1_u64..5, 0_usize..3000).prop_map(|(events, bytes)| Step::Append { events, bytes }),
        1 => (70_000_usize..90_000).prop_map(|bytes| Step::Append { events: 1, bytes }),
        2 => (1_u64..5).prop_map(Step::Trim),
        1 => Just(Step::Settle),
        1 => Just(Step::CatchUp),
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
        Step::Settle | Step::CatchUp => return None,
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
            let settle = matches!(step, Step::Settle);
            let done = if settle { store.settle() } else { store.catch_up(true) };
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
        let dir = TempDir::new().unwrap();
        let (mut disk, mut bounds, mut acknowledged) = (Disk::default(), Bounds::default(), Events::new());
        let mut survivors = survivors.iter().cycle();
        for (steps, writes) in &lives {
            let mut store = open(&disk, &dir).unwrap();
            let found = events(&store);
            prop_assert_eq!(&found, &acknowledged);
            disk.0.lock().left = *writes;
            let wanted = run(&mut store, steps, &mut bounds, &mut acknowledged);
            // Closing would write more.
            disk.0.lock().left = Some(0);
            let after = disk.after_power_cut(|| *survivors.next().unwrap());
            drop(store);
            disk = after;
            let store = open(&disk, &dir).unwrap();
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
    let dir = TempDir::new().unwrap();
    let disk = Disk::default();
    let mut store = open(&disk, &dir).unwrap();
    let mut bounds = Bounds::default();
    let mut acknowledged = Events::new();
    let steps = vec![Step::Append { events: 1, bytes: 10 }; 2500];
    run(&mut store, &steps, &mut bounds, &mut acknowledged);
    let after = disk.after_power_cut(|| false);
    drop(store);
    assert_eq!(events(&open(&after, &dir).unwrap()), acknowledged);
}

#[test]
fn the_journal_of_another_life_is_left_alone() {
    let dir = TempDir::new().unwrap();
    let disk = Disk::default();
    let mut bounds = Bounds::default();
    let mut acknowledged = Events::new();
    let mut store = open(&disk, &dir).unwrap();
    run(
        &mut store,
        &vec![Step::Append { events: 1, bytes: 10 }; 20],
        &mut bounds,
        &mut acknowledged,
    );
    let journal = fs::read(dir.path().join(journal::FILE_NAME)).unwrap();
    drop(store);
    drop(open(&disk, &dir).unwrap());
    // An older journal comes back.
    fs::write(dir.path().join(journal::FILE_NAME), journal).unwrap();
    let store = open(&disk, &dir).unwrap();
    assert_eq!(events(&store), acknowledged);
    assert_eq!(store.lost_batches(), 0);
}

#[test]
fn a_store_from_before_the_journal_is_taken_over() {
    let dir = TempDir::new().unwrap();
    let disk = Disk::default();
    let old = Store::with_backend(disk.clone(), 1 << 20).unwrap();
    let write = old.database.begin_write().unwrap();
    write.open_table(META).unwrap().insert("format", FORMAT_WITHOUT_JOURNAL).unwrap();
    write.open_table(EVENTS).unwrap().insert((1, 1), [7_u8; 9].as_slice()).unwrap();
    write.commit().unwrap();
    drop(old);
    let store = open(&disk, &dir).unwrap();
    assert_eq!(events(&store), Events::from([((1, 1), vec![7; 9])]));
    let meta = store.database.begin_read().unwrap().open_table(META).unwrap();
    // What knows of no journal must not open it any more.
    assert_eq!(meta.get("format").unwrap().unwrap().value(), FORMAT);
}

#[test]
fn what_was_removed_is_not_found_any_more() {
    let dir = TempDir::new().unwrap();
    let mut store = open(&Disk::default(), &dir).unwrap();
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
