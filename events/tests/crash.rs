//! What was acknowledged survives `kill -9`: a child process publishes and prints each acknowledged id, the parent kills
//! it at a moment of its own choosing, opens what is left and looks for every id that it read.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "helpers of a test, which stop where something fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use duet_events::Event;
use duet_events::bus::ManagedBus as _;
use duet_events::bus::{
    ConsumeError, Consumer, EventBus, PublishError, PublishErrorKind, Published, Settle, Start,
    SubscriptionSpec,
};
use duet_events::embedded::EmbeddedBus;
use duet_events::log::LogOptions;
use duet_events::outbox::{Outbox, OutboxOptions, RelayPublisher};
use futures::future::BoxFuture;
use tempfile::TempDir;
use tokio::time::timeout;

const FOLDER: &str = "DUET_CRASH_TEST_FOLDER";
const FIRST: &str = "DUET_CRASH_TEST_FIRST";
const ROUNDS: u64 = 8;

/// Runs a child of this test binary until it printed `lines`, kills it, and returns all ids that it printed.
fn run_and_kill(child: &str, dir: &Path, first: u64, lines: usize) -> Vec<u64> {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", child, "--ignored", "--nocapture"])
        .env(FOLDER, dir)
        .env(FIRST, first.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(process.stdout.take().unwrap()).lines();
    let mut ids = output.by_ref().map_while(Result::ok).filter_map(|line| {
        let id = line.strip_prefix("acked ")?;
        Some(id.parse().unwrap())
    });
    let mut acked: Vec<u64> = ids.by_ref().take(lines).collect();
    process.kill().unwrap();
    // What it printed before it died was acknowledged too; lines are written whole.
    acked.extend(ids);
    process.wait().unwrap();
    assert!(acked.len() >= lines, "the child ended by itself");
    acked
}

fn say_acked(id: u64) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "acked {id}").unwrap();
    out.flush().unwrap();
}

fn from_parent(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

async fn open_bus(dir: &Path) -> EmbeddedBus {
    let registry = prometheus::Registry::new();
    EmbeddedBus::open("default", &dir.join("bus"), LogOptions::default(), &registry).await.unwrap()
}

fn event(id: u64) -> Event {
    Event::new(id.to_string(), "/crash", "t").unwrap().with_data(vec![b'x'; 200])
}

/// Ids in the topic, in order, with their attempts.
async fn stored(bus: &EmbeddedBus, count: u64) -> Vec<u64> {
    let name = format!("look/{}", uuid::Uuid::new_v4());
    let mut spec = SubscriptionSpec::new(&name, "default", "orders").unwrap();
    spec.start = Start::Earliest;
    let mut consumer = bus.consume(spec).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..count {
        let delivery = timeout(Duration::from_secs(60), consumer.next()).await.unwrap();
        let delivery = delivery.unwrap().unwrap();
        assert_eq!(delivery.attempt, 1);
        ids.push(delivery.event.id().parse().unwrap());
        consumer.settler().settle(delivery.id, Settle::Ack);
    }
    drop(consumer);
    bus.remove_subscription(&name).await.unwrap();
    ids
}

/// The position that a new event gets, less one.
async fn end_of_topic(bus: &EmbeddedBus, marker: u64) -> u64 {
    bus.publish("orders", vec![event(marker)]).await.unwrap()[0].position
}

#[tokio::test]
#[ignore = "the child of the test below"]
async fn child_that_publishes_to_the_bus() {
    let Some(dir) = from_parent(FOLDER) else {
        return;
    };
    let first: u64 = from_parent(FIRST).unwrap().parse().unwrap();
    let bus = open_bus(Path::new(&dir)).await;
    let next = AtomicU64::new(first);
    let publisher = || async {
        loop {
            let id = next.fetch_add(1, Ordering::Relaxed);
            bus.publish("orders", vec![event(id)]).await.unwrap();
            say_acked(id);
        }
    };
    futures::future::join_all((0..32).map(|_| publisher())).await;
}

#[tokio::test]
async fn the_bus_keeps_every_acknowledged_event_whenever_it_is_killed() {
    let dir = TempDir::new().unwrap();
    let mut acked = BTreeSet::new();
    for round in 0..ROUNDS {
        let first = round * 1_000_000;
        let lines = 50 + usize::try_from(round).unwrap() * 137;
        let child = "child_that_publishes_to_the_bus";
        acked.extend(run_and_kill(child, dir.path(), first, lines));
        let bus = open_bus(dir.path()).await;
        let end = end_of_topic(&bus, first + 999_999).await;
        acked.insert(first + 999_999);
        let ids = stored(&bus, end).await;
        let unique: BTreeSet<u64> = ids.iter().copied().collect();
        assert_eq!(unique.len(), ids.len(), "an event was stored twice");
        let lost: Vec<_> = acked.difference(&unique).collect();
        assert!(lost.is_empty(), "round {round}: acknowledged and lost: {lost:?}");
        bus.close().await;
    }
}

/// A bus that goes away now and then, at times after it stored the events.
#[derive(Debug)]
struct Flaky {
    bus: EmbeddedBus,
    calls: AtomicU64,
}

impl EventBus for Flaky {
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        Box::pin(async move {
            let away = || Err(PublishError::new(PublishErrorKind::Unavailable, "away"));
            match self.calls.fetch_add(1, Ordering::Relaxed) % 40 {
                0..5 => away(),
                5 => {
                    self.bus.publish(topic, events).await?;
                    away()
                }
                _ => self.bus.publish(topic, events).await,
            }
        })
    }

    fn consume(&self, spec: SubscriptionSpec) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        self.bus.consume(spec)
    }
}

async fn open_outbox(dir: &Path) -> Arc<Outbox> {
    let options = OutboxOptions { dir: dir.join("outbox"), capacity_bytes: 64 << 20 };
    Outbox::open(options, &prometheus::Registry::new()).await.unwrap()
}

async fn emptied(relay: &RelayPublisher) {
    let empty = async {
        while relay.waiting() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(60), empty).await.unwrap();
}

#[tokio::test]
#[ignore = "the child of the test below"]
async fn child_that_publishes_through_the_outbox() {
    let Some(dir) = from_parent(FOLDER) else {
        return;
    };
    let dir = PathBuf::from(dir);
    let first: u64 = from_parent(FIRST).unwrap().parse().unwrap();
    let bus = Arc::new(Flaky { bus: open_bus(&dir).await, calls: AtomicU64::new(0) });
    let relay = open_outbox(&dir).await.relay("default", bus);
    for id in first.. {
        relay.publish("orders", vec![event(id)]).await.unwrap();
        say_acked(id);
    }
}

#[tokio::test]
async fn the_outbox_keeps_every_acknowledged_event_in_order_whenever_it_is_killed() {
    let dir = TempDir::new().unwrap();
    let mut acked = BTreeSet::new();
    for round in 0..ROUNDS {
        let first = round * 1_000_000;
        let lines = 20 + usize::try_from(round).unwrap() * 61;
        let child = "child_that_publishes_through_the_outbox";
        acked.extend(run_and_kill(child, dir.path(), first, lines));
        let outbox = open_outbox(dir.path()).await;
        let bus = Arc::new(Flaky { bus: open_bus(dir.path()).await, calls: AtomicU64::new(6) });
        let relay = outbox.relay("default", Arc::<Flaky>::clone(&bus));
        emptied(&relay).await;
        let end = end_of_topic(&bus.bus, first + 999_999).await;
        let ids = stored(&bus.bus, end).await;
        let places: BTreeMap<u64, usize> = ids.iter().copied().zip(0..).collect();
        assert_eq!(places.len(), ids.len(), "an event was stored twice");
        let lost: Vec<_> = acked.iter().filter(|id| !places.contains_key(id)).collect();
        assert!(lost.is_empty(), "round {round}: acknowledged and lost: {lost:?}");
        assert!(ids.is_sorted(), "round {round}: the publisher's order turned around");
        drop(relay);
        outbox.close().await;
        bus.bus.close().await;
    }
}
