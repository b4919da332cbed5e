//! Three servers that fail one after the other under load.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use duet_events::Event;
use duet_events::bus::{EventBus as _, ManagedBus as _, Settle, SubscriptionSpec};
use duet_events::nats::{NatsBus, NatsOptions};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::behaviour::{eventually, spec};
use super::{Server, connect, options};

/// Each publishes one event after the other.
const KEYS: u32 = 10;
/// Between two events of a key: 500 events a second in all.
const EVERY: Duration = Duration::from_millis(20);
/// How long each failure lasts, and between two.
const LASTS: Duration = Duration::from_secs(5);

/// Publishes events of one key, each until it is acknowledged; returns how many.
async fn publish(bus: Arc<NatsBus>, key: u32, stop: Arc<AtomicBool>) -> usize {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let event = Event::new(format!("{key}.{number}"), "/test", "t").unwrap();
        let event = event.with_attribute("partitionkey", &key.to_string()).unwrap();
        while bus.publish("orders", vec![event.clone()]).await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
        number += 1;
        sleep(EVERY).await;
    }
    number
}

/// What came of each key, in the order in which it came first, until all of it is there.
async fn consume(bus: Arc<NatsBus>, spec: SubscriptionSpec, expected: Arc<ExpectedAll>) -> Came {
    let mut came = Came::default();
    loop {
        let Ok(mut consumer) = bus.consume(spec.clone()).await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        while expected.get().is_none_or(|expected| came.seen.len() < *expected) {
            let Ok(next) = timeout(Duration::from_millis(500), consumer.next()).await else {
                continue;
            };
            let Some(Ok(delivery)) = next else { break };
            assert_eq!(delivery.attempt, 1, "nobody's fault: {}", delivery.event.id());
            came.take(delivery.event.id());
            consumer.settler().settle(delivery.id, Settle::Ack);
        }
        if expected.get().is_some_and(|expected| came.seen.len() >= *expected) {
            return came;
        }
    }
}

type ExpectedAll = std::sync::OnceLock<usize>;

#[derive(Default)]
struct Came {
    seen: BTreeSet<String>,
    order: BTreeMap<String, Vec<u32>>,
}

impl Came {
    fn take(&mut self, id: &str) {
        if self.seen.insert(id.to_owned()) {
            let (key, number) = id.split_once('.').unwrap();
            self.order.entry(key.to_owned()).or_default().push(number.parse().unwrap());
        }
    }
}

async fn leader(js: &jetstream::Context) -> Option<usize> {
    let stream = js.get_stream("duet_orders").await.ok()?;
    let leader = stream.cached_info().cluster.as_ref()?.leader.clone()?;
    leader.trim_start_matches('n').parse().ok()
}

/// Until somebody leads.
async fn led(js: &jetstream::Context) -> usize {
    loop {
        if let Some(leader) = leader(js).await {
            return leader;
        }
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn nothing_is_lost_or_turned_around_while_servers_die_freeze_and_hand_over() {
    let Some(mut servers) = Server::cluster().await else { return };
    let urls: Vec<String> = servers.iter().map(Server::url).collect();
    let bus = NatsOptions { servers: urls.clone(), replicas: 3, ..options(&servers[0]) };
    let bus = connect(bus).await;
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/ordered") };
    for spec in [&spec("a/any"), &ordered] {
        eventually("it is there", async || bus.ensure_subscription(spec.clone()).await.is_ok())
            .await;
    }
    let expected = Arc::new(ExpectedAll::new());
    let consume = |spec| tokio::spawn(consume(Arc::clone(&bus), spec, Arc::clone(&expected)));
    let (any, in_order) = (consume(spec("a/any")), consume(ordered));
    let stop = Arc::new(AtomicBool::new(false));
    let mut publishers = JoinSet::new();
    for key in 0..KEYS {
        publishers.spawn(publish(Arc::clone(&bus), key, Arc::clone(&stop)));
    }
    let js = jetstream::new(async_nats::connect(urls).await.unwrap());
    for round in 0..3 {
        sleep(LASTS).await;
        let victim = led(&js).await;
        match round {
            0 => servers[victim].kill(),
            1 => servers[victim].freeze(),
            _ => {
                let client = async_nats::connect(servers[victim].url()).await.unwrap();
                let subject = "$JS.API.STREAM.LEADER.STEPDOWN.duet_orders";
                client.request(subject, "".into()).await.unwrap();
            }
        }
        sleep(LASTS).await;
        match round {
            0 => servers[victim].restart().await,
            1 => servers[victim].thaw(),
            _ => {}
        }
    }
    stop.store(true, Ordering::Relaxed);
    let counts = publishers.join_all().await;
    let all: usize = counts.iter().sum();
    expected.set(all).unwrap();
    for (name, consumer) in [("any", any), ("in order", in_order)] {
        let came = timeout(Duration::from_secs(60), consumer).await;
        let came = came.unwrap_or_else(|_| panic!("{name}: something never came")).unwrap();
        if name == "in order" {
            for (key, numbers) in came.order {
                assert!(numbers.is_sorted(), "{key}: {numbers:?}");
            }
        }
    }
}
