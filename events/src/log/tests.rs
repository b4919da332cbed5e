//! The log on a store that can be held, broken and damaged.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use duet_api::proto;
use parking_lot::{Condvar, Mutex};
use redb::backends::FileBackend;
use redb::{Database, ReadableTable, StorageBackend, TableDefinition};
use tempfile::TempDir;
use tokio::time::timeout;

use super::engine::Engine;
use super::store::Store;
use super::*;
use crate::bus::Start;

mod clock;
mod declare;
mod full_disk;
mod model;
mod redriven;
mod retention;
mod rows;
mod scheduled;
mod turns;

/// What a test does to the disk.
#[derive(Debug, Default)]
struct Controls {
    full: AtomicBool,
    /// Only the reserve is left.
    low: AtomicBool,
    held: Mutex<bool>,
    released: Condvar,
}

impl Controls {
    fn hold(&self) {
        *self.held.lock() = true;
    }

    fn release(&self) {
        *self.held.lock() = false;
        self.released.notify_all();
    }
}

#[derive(Debug)]
struct TestDisk(FileBackend, Arc<Controls>);

impl StorageBackend for TestDisk {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        let mut held = self.1.held.lock();
        while *held {
            self.1.released.wait(&mut held);
        }
        self.0.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.1.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.write(offset, data)
    }
}

fn test_store(path: &PathBuf, controls: &Arc<Controls>) -> Result<Store, LogError> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file = FileBackend::new(file.unwrap()).unwrap();
    Store::with_backend(TestDisk(file, Arc::clone(controls)), 1 << 20)
}

async fn open_on(dir: &TempDir, controls: Arc<Controls>) -> Log {
    let path = dir.path().join(store::FILE_NAME);
    let (options, metrics) = (LogOptions::default(), LogMetrics::unregistered());
    let disk = Arc::clone(&controls);
    let look = move || {
        let free = if disk.low.load(Ordering::Relaxed) { 0 } else { 1 << 30 };
        Some(disk::Usage { free, total: 1 << 30, file: 0 })
    };
    let open = move || test_store(&path, &controls);
    let queue = worker::start_with(open, look, options, metrics).await.unwrap();
    Log {
        queue,
        room: Arc::new(Semaphore::new(1 << 20)),
        room_size: 1 << 20,
        next_consumer: AtomicU64::new(1),
    }
}

async fn open(dir: &TempDir) -> (Log, LogMetrics) {
    let metrics = LogMetrics::unregistered();
    let log = Log::open(dir.path(), LogOptions::default(), metrics.clone()).await.unwrap();
    (log, metrics)
}

fn entries(ids: impl IntoIterator<Item = u32>) -> Vec<Entry> {
    let event = |id: u32| Event::new(id.to_string(), "/test", "t").unwrap();
    ids.into_iter().map(|id| Entry { event: event(id), route: String::new() }).collect()
}

fn spec(start: Start) -> SubscriptionSpec {
    SubscriptionSpec { start, ..SubscriptionSpec::new("a/s", "default", "t").unwrap() }
}

async fn positions(log: &Log, count: usize) -> BTreeSet<u64> {
    let mut consumer = log.consume(spec(Start::Earliest)).await.unwrap();
    let mut positions = BTreeSet::new();
    for _ in 0..count {
        let next = timeout(Duration::from_secs(20), consumer.deliveries.recv()).await;
        positions.insert(next.unwrap().unwrap().position);
    }
    positions
}

#[tokio::test]
async fn nobody_is_answered_before_the_flush() {
    let dir = TempDir::new().unwrap();
    let controls = Arc::new(Controls::default());
    let log = open_on(&dir, Arc::clone(&controls)).await;
    controls.hold();
    let mut append = Box::pin(log.append("t", entries([1])));
    assert!(timeout(Duration::from_millis(100), &mut append).await.is_err());
    controls.release();
    assert_eq!(append.await.unwrap()[0].position, 1);
}

#[tokio::test]
async fn consumers_end_when_the_store_fails_and_nothing_is_spent() {
    let dir = TempDir::new().unwrap();
    let controls = Arc::new(Controls::default());
    let log = open_on(&dir, Arc::clone(&controls)).await;
    log.append("t", entries([1])).await.unwrap();
    let mut consumer = log.consume(spec(Start::Earliest)).await.unwrap();
    assert_eq!(consumer.deliveries.recv().await.unwrap().attempt, 1);
    controls.full.store(true, Ordering::Relaxed);
    log.append("t", entries([2])).await.unwrap_err();
    assert!(consumer.deliveries.recv().await.is_none());
    controls.full.store(false, Ordering::Relaxed);
    let again = async {
        loop {
            if let Ok(mut consumer) = log.consume(spec(Start::Earliest)).await {
                return consumer.deliveries.recv().await.unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    let again = timeout(Duration::from_secs(20), again).await.unwrap();
    assert_eq!((again.position, again.attempt), (1, 1));
}

#[tokio::test]
async fn a_damaged_record_is_counted_and_skipped_and_the_rest_stays_readable() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    log.append("t", entries(1..=3)).await.unwrap();
    log.close().await;
    let events: TableDefinition<'_, (u32, u64), &[u8]> = TableDefinition::new("events");
    let database = Database::open(dir.path().join(store::FILE_NAME)).unwrap();
    let write = database.begin_write().unwrap();
    {
        let mut table = write.open_table(events).unwrap();
        let mut frame = table.get((1, 2)).unwrap().unwrap().value().to_vec();
        *frame.last_mut().unwrap() ^= 1;
        table.insert((1, 2), frame.as_slice()).unwrap();
    }
    write.commit().unwrap();
    drop(database);
    let (log, metrics) = open(&dir).await;
    assert_eq!(positions(&log, 2).await, BTreeSet::from([1, 3]));
    assert_eq!(metrics.damaged_records.get(), 1);
    assert_eq!(log.append("t", entries([4])).await.unwrap()[0].position, 4);
    assert_eq!(log.backlog("a/s").await.unwrap().events, 3, "the damaged one is done with");
}

/// An engine without its thread, so that time and turns are the test's.
fn engine(dir: &TempDir) -> Engine {
    let store = Store::open(dir.path(), 1 << 20).unwrap();
    Engine::load(store, LogMetrics::unregistered(), 0).unwrap()
}

fn prepared(ids: impl IntoIterator<Item = u32>, now_ms: u64) -> Vec<Prepared> {
    entries(ids).into_iter().map(|entry| Prepared::new(entry, now_ms)).collect()
}

fn short_lived() -> TopicConfig {
    TopicConfig {
        dedup_window: Duration::ZERO,
        retention_age: Some(Duration::from_millis(100)),
        ..TopicConfig::keep_all()
    }
}

#[test]
fn a_longer_window_remembers_what_the_topic_holds() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.ensure_topic("t", &TopicConfig::keep_all(), 0).unwrap();
    engine.append("t", prepared([1], 0), 0).unwrap();
    engine.commit().unwrap();
    // Also of the turn in which it is told of the window.
    engine.append("t", prepared([2], 10), 10).unwrap();
    engine.ensure_topic("t", &TopicConfig::default(), 10).unwrap();
    let published = engine.append("t", prepared([1, 2], 10), 10).unwrap();
    assert!(published.iter().all(|published| published.duplicate), "{published:?}");
}

/// Turns a bit of a block of the journal.
fn damage_journal(dir: &TempDir, block: usize) {
    let path = dir.path().join("log.journal");
    let mut bytes = std::fs::read(&path).unwrap();
    // In its header, in the half that is in use.
    for half in [0, bytes.len() / 2] {
        bytes[half + block * 4096 + 21] ^= 1;
    }
    std::fs::write(&path, bytes).unwrap();
}

/// Takes everything that a new consumer gets, and answers each.
fn consume_all(engine: &mut Engine, outcome: &Settle) {
    let (sender, mut deliveries) = mpsc::channel(64);
    engine.consume(1, &spec(Start::Earliest), false, sender).unwrap();
    engine.hand_out(0).unwrap();
    while let Ok(delivery) = deliveries.try_recv() {
        engine.settle(1, delivery.id, outcome, 0).unwrap();
    }
    engine.commit().unwrap();
}

#[test]
fn what_is_published_after_a_lost_batch_is_not_taken_for_what_was_lost() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.declare(&spec(Start::Earliest)).unwrap();
    before.append("t", prepared(1..=9, 0), 0).unwrap();
    before.commit().unwrap();
    before.append("t", prepared([10], 0), 0).unwrap();
    before.commit().unwrap();
    consume_all(&mut before, &Settle::Ack);
    drop(before);
    damage_journal(&dir, 1);
    let mut engine = engine(&dir);
    assert_eq!(engine.metrics.damaged_records.get(), 1);
    let published = engine.append("t", prepared([11], 0), 0).unwrap();
    assert_eq!(published[0].position, 11);
    assert_eq!(engine.backlogs()["a/s"].events, 1);
}

#[test]
fn a_topic_that_is_lost_goes_on_after_what_its_subscriptions_had() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("t", prepared(1..=9, 0), 0).unwrap();
    before.commit().unwrap();
    before.declare(&spec(Start::Latest)).unwrap();
    before.commit().unwrap();
    drop(before);
    damage_journal(&dir, 0);
    let mut engine = engine(&dir);
    assert_eq!(engine.append("t", prepared([10], 0), 0).unwrap()[0].position, 10);
    assert_eq!(engine.backlogs()["a/s"].events, 1);
}

#[test]
fn rows_of_a_lost_subscription_are_not_those_of_the_next() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("t", prepared([1], 0), 0).unwrap();
    before.commit().unwrap();
    before.declare(&spec(Start::Earliest)).unwrap();
    before.commit().unwrap();
    consume_all(&mut before, &Settle::Retry { delay: Duration::from_secs(1) });
    let lost = before.subscriptions["a/s"].row.id;
    drop(before);
    damage_journal(&dir, 1);
    let mut engine = engine(&dir);
    engine.declare(&spec(Start::Earliest)).unwrap();
    assert!(engine.subscriptions["a/s"].row.id > lost);
}

#[test]
fn a_store_of_a_newer_version_is_refused() {
    let dir = TempDir::new().unwrap();
    drop(engine(&dir));
    let meta: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
    let database = Database::open(dir.path().join(store::FILE_NAME)).unwrap();
    let write = database.begin_write().unwrap();
    write.open_table(meta).unwrap().insert("format", 3).unwrap();
    write.commit().unwrap();
    drop(database);
    let error = Store::open(dir.path(), 1 << 20).unwrap_err();
    assert_eq!(error, LogError::Format { found: 3, known: 2 });
}

#[test]
fn a_file_that_is_no_store_is_an_error_and_stays_as_it_is() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(store::FILE_NAME);
    std::fs::write(&path, b"something else").unwrap();
    assert!(matches!(Store::open(dir.path(), 1 << 20), Err(LogError::Store(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"something else");
}

#[test]
fn records_keep_every_part_of_an_event() {
    let event = proto::Event {
        attributes: [("subject".to_owned(), "ü".to_owned())].into(),
        data: Some(vec![0, 255].into()),
        ..entries([1]).remove(0).event.into()
    };
    let record = Record { published_ms: 1, event: Some(event), route: "r".into() };
    let frame = Unsealed::new(&record).seal((1, 1));
    assert_eq!(record::unseal((1, 1), &frame), Some(record));
}

#[tokio::test]
async fn what_a_leaving_consumer_settled_counts_also_when_its_end_is_seen_first() {
    let dir = TempDir::new().unwrap();
    let (log, _metrics) = open(&dir).await;
    log.append("t", entries([1])).await.unwrap();
    let mut leaving = log.consume(spec(Start::Earliest)).await.unwrap();
    let delivery = timeout(Duration::from_secs(20), leaving.deliveries.recv()).await;
    let delivery = delivery.unwrap().unwrap();
    drop(leaving.deliveries);
    // Handing this out finds nobody there.
    log.append("t", entries([2])).await.unwrap();
    log.append("t", entries([3])).await.unwrap();
    leaving.backend.settle(delivery.id, Settle::Ack);
    drop(leaving.backend);
    assert_eq!(positions(&log, 2).await, BTreeSet::from([2, 3]));
}
