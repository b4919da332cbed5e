//! The outbox in front of a bus that comes and goes.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::BoxFuture;
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::bus::dead_letter::REDRIVE_TO;
use crate::bus::{ConsumeError, Consumer, Published};
use crate::cloudevent::{DELIVER_AT, EXPIRY_TIME};

/// A bus in memory that can be away, whole or a topic of it, and that hates some events.
#[derive(Debug, Default)]
struct FakeBus {
    away: Mutex<bool>,
    away_topic: Mutex<Option<String>>,
    seen: Mutex<Vec<(String, String)>>,
    events: Mutex<Vec<Event>>,
    publishes: Mutex<u32>,
    changed: Notify,
}

impl FakeBus {
    fn away() -> Arc<Self> {
        Arc::new(Self { away: Mutex::new(true), ..Self::default() })
    }

    fn set_away(&self, away: bool) {
        *self.away.lock() = away;
    }

    async fn wait_for(&self, count: usize) -> Vec<String> {
        let reached = async {
            loop {
                let changed = self.changed.notified();
                let ids: Vec<_> = self.seen.lock().iter().map(|(_, id)| id.clone()).collect();
                if ids.len() >= count {
                    return ids;
                }
                changed.await;
            }
        };
        timeout(Duration::from_secs(20), reached).await.unwrap()
    }
}

impl EventBus for FakeBus {
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        Box::pin(async move {
            if *self.away.lock() || self.away_topic.lock().as_deref() == Some(topic) {
                return Err(PublishError::new(PublishErrorKind::Unavailable, "away"));
            }
            if topic == "nowhere" {
                return Err(PublishError::new(PublishErrorKind::UnknownTopic, "no such topic"));
            }
            if events.iter().any(|event| event.event_type() == "poison") {
                return Err(PublishError::new(PublishErrorKind::Invalid, "poison"));
            }
            let mut seen = self.seen.lock();
            seen.extend(events.iter().map(|e| (topic.to_owned(), e.id().to_owned())));
            drop(seen);
            self.events.lock().extend(events.iter().cloned());
            *self.publishes.lock() += 1;
            self.changed.notify_waiters();
            Ok(vec![Published { position: 1, duplicate: false }; events.len()])
        })
    }

    fn consume(&self, _: SubscriptionSpec) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        unreachable!("the outbox only publishes")
    }
}

fn options(dir: &TempDir) -> OutboxOptions {
    OutboxOptions { dir: dir.path().join("outbox"), capacity_bytes: 1 << 20 }
}

async fn open(dir: &TempDir) -> Arc<Outbox> {
    Outbox::open(options(dir), &prometheus::Registry::new()).await.unwrap()
}

fn event(id: u32) -> Event {
    Event::new(id.to_string(), "/test", "t").unwrap()
}

async fn publish(relay: &RelayPublisher, id: u32) -> Accepted {
    relay.publish("orders", vec![event(id)]).await.unwrap()
}

async fn emptied(relay: &RelayPublisher) {
    let empty = async {
        while relay.waiting() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), empty).await.unwrap();
}

fn ids(range: impl IntoIterator<Item = u32>) -> Vec<String> {
    range.into_iter().map(|id| id.to_string()).collect()
}

#[tokio::test]
async fn a_bus_that_never_fails_never_makes_a_store() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let relay = outbox.relay("default", Arc::<FakeBus>::default());
    assert!(matches!(publish(&relay, 1).await, Accepted::Stored(_)));
    assert!(!options(&dir).dir.exists());
}

#[tokio::test]
async fn an_outbox_that_cannot_be_opened_is_none_until_it_can() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let relay = outbox.relay("default", FakeBus::away());
    publish(&relay, 1).await;
    drop(relay);
    outbox.close().await;
    drop(outbox);
    let file = options(&dir).dir.join(store::FILE_NAME);
    let kept = std::fs::read(&file).unwrap();
    std::fs::write(&file, "damaged").unwrap();
    let outbox = open(&dir).await;
    let bus = Arc::<FakeBus>::default();
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    assert!(matches!(publish(&relay, 2).await, Accepted::Stored(_)));
    bus.set_away(true);
    relay.publish("orders", vec![event(3)]).await.unwrap_err();
    std::fs::write(&file, kept).unwrap();
    tokio::time::pause();
    tokio::time::advance(OPEN_AGAIN).await;
    tokio::time::resume();
    let open_again = async {
        while outbox.depth() == 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), open_again).await.unwrap();
    bus.set_away(false);
    assert_eq!(bus.wait_for(2).await, ids([2, 1]));
    emptied(&relay).await;
    let taken = Outbox::open(options(&dir), &prometheus::Registry::new()).await;
    assert_eq!(taken.unwrap_err(), LogError::InUse);
}

#[tokio::test]
async fn what_waits_follows_in_order_and_new_events_queue_behind_it() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let bus = FakeBus::away();
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    for id in 0..600 {
        assert_eq!(publish(&relay, id).await, Accepted::Spooled);
    }
    bus.set_away(false);
    let mut id = 600;
    while publish(&relay, id).await == Accepted::Spooled {
        id += 1;
        tokio::task::yield_now().await;
    }
    assert_eq!(bus.wait_for(id as usize + 1).await, ids(0..=id));
    assert_eq!(outbox.depth(), 0);
}

#[tokio::test]
async fn a_restart_keeps_what_waits_and_its_order() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let relay = outbox.relay("default", FakeBus::away());
    for id in 0..10 {
        publish(&relay, id).await;
    }
    drop(relay);
    outbox.close().await;
    drop(outbox);
    let outbox = open(&dir).await;
    assert_eq!(outbox.depth(), 10);
    let bus = FakeBus::away();
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    assert_eq!(publish(&relay, 10).await, Accepted::Spooled);
    bus.set_away(false);
    assert_eq!(bus.wait_for(11).await, ids(0..=10));
    emptied(&relay).await;
    outbox.close().await;
}

#[tokio::test]
async fn buses_do_not_wait_for_each_other() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let (one, two) = (FakeBus::away(), FakeBus::away());
    let relay_one = outbox.relay("one", Arc::<FakeBus>::clone(&one));
    let relay_two = outbox.relay("two", Arc::<FakeBus>::clone(&two));
    publish(&relay_one, 1).await;
    publish(&relay_two, 2).await;
    two.set_away(false);
    assert_eq!(two.wait_for(1).await, ["2"]);
    emptied(&relay_two).await;
    assert_eq!((relay_one.waiting(), outbox.depth()), (1, 1));
}

#[tokio::test]
async fn poison_is_moved_aside_and_the_rest_keeps_its_order() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let bus = FakeBus::away();
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    publish(&relay, 1).await;
    let poison = Event::new("2", "/test", "poison").unwrap();
    relay.publish("orders", vec![poison]).await.unwrap();
    relay.publish("nowhere", vec![event(3)]).await.unwrap();
    publish(&relay, 4).await;
    bus.set_away(false);
    assert_eq!(bus.wait_for(2).await, ["1", "4"]);
    emptied(&relay).await;
    assert_eq!(outbox.metrics.rejected.with_label_values(&["default"]).get(), 2);
    let log = outbox.log().await.unwrap();
    let mut spec = SubscriptionSpec::new("look", "", "default.rejected").unwrap();
    spec.start = Start::Earliest;
    let mut rejected = log.consume(spec).await.unwrap();
    let mut routes = BTreeSet::new();
    for _ in 0..2 {
        routes.insert(rejected.deliveries.recv().await.unwrap().record.route);
    }
    assert_eq!(routes, BTreeSet::from(["nowhere".into(), "orders".into()]));
}

#[tokio::test]
async fn topics_in_turn_are_not_a_publish_for_each_event() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let bus = FakeBus::away();
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    for id in 0..200 {
        relay.publish(&format!("t{}", id % 4), vec![event(id)]).await.unwrap();
    }
    bus.set_away(false);
    emptied(&relay).await;
    let mut expected = Vec::new();
    for topic in 0..4 {
        let of_topic = (topic..200).step_by(4).map(|id| (format!("t{topic}"), id.to_string()));
        expected.extend(of_topic);
    }
    let mut seen = bus.seen.lock().clone();
    seen.sort_by(|(one, _), (other, _)| one.cmp(other));
    assert_eq!(seen, expected, "each topic in its order");
    assert!(*bus.publishes.lock() < 50, "{} publishes", bus.publishes.lock());
}

#[tokio::test]
async fn a_topic_that_is_away_holds_up_no_other() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let bus = FakeBus::away();
    *bus.away_topic.lock() = Some("away".to_owned());
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    // More than one publish takes.
    for id in 0..400 {
        relay.publish("away", vec![event(id)]).await.unwrap();
    }
    publish(&relay, 1_000).await;
    bus.set_away(false);
    assert_eq!(bus.wait_for(1).await, ["1000"]);
    for id in 1_001..1_010 {
        assert_eq!(publish(&relay, id).await, Accepted::Spooled);
        assert_eq!(bus.wait_for(id as usize - 999).await, ids(1_000..=id));
    }
    assert_eq!(relay.publish("away", vec![event(400)]).await.unwrap(), Accepted::Spooled);
    *bus.away_topic.lock() = None;
    assert_eq!(bus.wait_for(411).await, ids((1_000..1_010).chain(0..=400)), "in their order");
    emptied(&relay).await;
}

#[tokio::test]
async fn what_passed_a_topic_that_is_away_leaves_the_disk() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let bus = FakeBus::away();
    *bus.away_topic.lock() = Some("away".to_owned());
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    relay.publish("away", vec![event(0)]).await.unwrap();
    bus.set_away(false);
    // A dozen times what the outbox takes.
    for id in 1..=192 {
        let large = event(id).with_data(vec![b'x'; 64 << 10]);
        assert_eq!(relay.publish("orders", vec![large]).await.unwrap(), Accepted::Spooled);
        bus.wait_for(id as usize).await;
    }
    let topics = outbox.log().await.unwrap().topics().await.unwrap();
    let kept = topics.iter().find(|topic| topic.name == "default").unwrap();
    assert!(kept.bytes < 6 << 20 && kept.events < 96, "{kept:?}");
    drop(relay);
    outbox.close().await;
    drop(outbox);
    let outbox = open(&dir).await;
    outbox.log().await.unwrap();
    assert!(*outbox.bytes.lock() < 1 << 20, "it is not full: {}", outbox.bytes.lock());
    *bus.away_topic.lock() = None;
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    let seen = bus.wait_for(193).await;
    assert_eq!(seen.iter().filter(|id| *id == "0").count(), 1);
    emptied(&relay).await;
    let gone = async {
        while outbox.log().await.unwrap().topics().await.unwrap()[0].events > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), gone).await.unwrap();
}

#[tokio::test]
async fn a_full_outbox_refuses_and_takes_again_when_there_is_room() {
    let dir = TempDir::new().unwrap();
    let small = OutboxOptions { capacity_bytes: 3000, ..options(&dir) };
    let outbox = Outbox::open(small, &prometheus::Registry::new()).await.unwrap();
    let bus = FakeBus::away();
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    let large = |id: u32| vec![event(id).with_data(vec![b'x'; 1000])];
    relay.publish("orders", large(1)).await.unwrap();
    relay.publish("orders", large(2)).await.unwrap();
    let error = relay.publish("orders", large(3)).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Full);
    bus.set_away(false);
    emptied(&relay).await;
    relay.publish("orders", large(3)).await.unwrap();
    assert_eq!(bus.wait_for(3).await, ids(1..=3));
}

#[tokio::test]
async fn what_an_event_is_published_for_is_left_to_the_bus() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let bus = FakeBus::away();
    let relay = outbox.relay("default", Arc::<FakeBus>::clone(&bus));
    let in_an_hour = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
    let published_for = [
        (DELIVER_AT, in_an_hour.to_string()),
        (EXPIRY_TIME, "2020-01-01T00:00:00Z".to_owned()),
        (REDRIVE_TO, "somebody/else".to_owned()),
    ];
    for (id, (name, value)) in (1..).zip(&published_for) {
        let event = event(id).with_attribute(name, value).unwrap();
        relay.publish("orders", vec![event]).await.unwrap();
    }
    publish(&relay, 4).await;
    bus.set_away(false);
    assert_eq!(bus.wait_for(4).await, ids(1..=4));
    emptied(&relay).await;
    assert_eq!((outbox.depth(), *outbox.bytes.lock()), (0, 0));
    for (event, (name, value)) in bus.events.lock().iter().zip(&published_for) {
        assert_eq!(event.attribute(name), Some(value.as_str()));
    }
}

#[tokio::test]
async fn what_a_present_bus_refuses_is_not_spooled() {
    let dir = TempDir::new().unwrap();
    let outbox = open(&dir).await;
    let relay = outbox.relay("default", Arc::<FakeBus>::default());
    let error = relay.publish("nowhere", vec![event(1)]).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::UnknownTopic);
    assert_eq!(outbox.depth(), 0);
}
