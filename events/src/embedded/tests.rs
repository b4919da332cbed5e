//! The bus as its users see it, on a real store in a temporary folder.

use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::bus::{ManagedBus as _, Settle, Start, TopicConfig};

pub(super) async fn open(dir: &TempDir) -> EmbeddedBus {
    let registry = prometheus::Registry::new();
    EmbeddedBus::open("default", dir.path(), LogOptions::default(), &registry).await.unwrap()
}

pub(super) fn spec(name: &str) -> SubscriptionSpec {
    SubscriptionSpec {
        start: Start::Earliest,
        ..SubscriptionSpec::new(name, "default", "orders").unwrap()
    }
}

pub(super) fn events(ids: impl IntoIterator<Item = u32>) -> Vec<Event> {
    ids.into_iter().map(|id| Event::new(id.to_string(), "/test", "t").unwrap()).collect()
}

pub(super) async fn publish(
    bus: &EmbeddedBus,
    ids: impl IntoIterator<Item = u32>,
) -> Vec<Published> {
    bus.publish("orders", events(ids)).await.unwrap()
}

pub(super) async fn next(consumer: &mut Consumer) -> Delivery {
    timeout(Duration::from_secs(20), consumer.next()).await.unwrap().unwrap().unwrap()
}

pub(super) async fn next_ids(consumer: &mut Consumer, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(next(consumer).await.event.id().to_owned());
    }
    ids
}

/// Waits until the log has taken the settles in: it answers in the order it was asked.
pub(super) async fn lag(bus: &EmbeddedBus, name: &str) -> u64 {
    bus.subscription_lag(name).await.unwrap()
}

#[tokio::test]
async fn positions_count_from_one_and_survive_a_restart() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let positions: Vec<_> = publish(&bus, 1..=3).await.iter().map(|p| p.position).collect();
    assert_eq!(positions, [1, 2, 3]);
    bus.close().await;
    let bus = open(&dir).await;
    assert_eq!(publish(&bus, [4]).await, [Published { position: 4, duplicate: false }]);
}

#[tokio::test]
async fn the_same_source_and_id_is_stored_once_also_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, [1, 2]).await;
    let again = [
        Published { position: 2, duplicate: true },
        Published { position: 3, duplicate: false },
        Published { position: 3, duplicate: true },
    ];
    assert_eq!(publish(&bus, [2, 3, 3]).await, again);
    bus.close().await;
    let bus = open(&dir).await;
    assert_eq!(publish(&bus, [1]).await, [Published { position: 1, duplicate: true }]);
    let other_topic = bus.publish("other", events([1])).await.unwrap();
    assert_eq!(other_topic, [Published { position: 1, duplicate: false }]);
}

#[tokio::test]
async fn the_deduplication_window_ends() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let config = TopicConfig { dedup_window: Duration::from_millis(1), ..TopicConfig::default() };
    bus.ensure_topic("orders", config).await.unwrap();
    publish(&bus, [1]).await;
    let stored_again = async {
        while publish(&bus, [1]).await[0].duplicate {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(5), stored_again).await.unwrap();
}

#[tokio::test]
async fn a_new_subscription_starts_at_latest_unless_it_says_earliest() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, [1]).await;
    let latest = SubscriptionSpec { start: Start::Latest, ..spec("a/latest") };
    bus.ensure_subscription(latest.clone()).await.unwrap();
    publish(&bus, [2]).await;
    bus.close().await;
    let bus = open(&dir).await;
    let mut consumer = bus.consume(latest).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 1).await, ["2"]);
    let mut consumer = bus.consume(spec("a/earliest")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 2).await, ["1", "2"]);
}

#[tokio::test]
async fn acknowledged_events_stay_handled_across_a_restart_and_others_come_back_unspent() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, 1..=5).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let settler = consumer.settler();
    for _ in 0..4 {
        let delivery = next(&mut consumer).await;
        if delivery.position % 2 == 0 {
            settler.settle(delivery.id, Settle::Ack);
        }
    }
    assert_eq!(lag(&bus, "a/s").await, 3);
    bus.close().await;
    let bus = open(&dir).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    for position in [1, 3, 5] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.position, delivery.attempt), (position, 1));
    }
}

#[tokio::test]
async fn competing_consumers_share_and_credit_bounds_each() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let spec = SubscriptionSpec { max_in_flight: 2, ..spec("a/s") };
    let mut one = bus.consume(spec.clone()).await.unwrap();
    let mut two = bus.consume(spec).await.unwrap();
    publish(&bus, 1..=6).await;
    let mut all = next_ids(&mut one, 2).await;
    all.extend(next_ids(&mut two, 2).await);
    all.sort();
    assert_eq!(all, ["1", "2", "3", "4"]);
    assert!(timeout(Duration::from_millis(50), one.next()).await.is_err(), "no credit");
    // The other one's events come here when it leaves, first and in order, as credit allows.
    drop(two);
    assert!(timeout(Duration::from_millis(50), one.next()).await.is_err(), "no credit still");
}

#[tokio::test]
async fn a_consumer_that_retires_settles_what_it_has_and_others_get_the_rest() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let spec = SubscriptionSpec { max_in_flight: 2, ..spec("a/s") };
    let mut retired = bus.consume(spec.clone()).await.unwrap();
    publish(&bus, 1..=2).await;
    let first = next(&mut retired).await;
    retired.retire();
    let mut other = bus.consume(spec).await.unwrap();
    let settler = retired.settler();
    let on_its_way = next(&mut retired).await;
    assert!(settler.settle(on_its_way.id, Settle::Release { delay: Duration::ZERO }));
    publish(&bus, 3..=3).await;
    assert_eq!(next_ids(&mut other, 2).await, ["2", "3"]);
    assert!(timeout(Duration::from_millis(50), retired.next()).await.is_err());
    assert!(settler.settle(first.id, Settle::Ack));
    retired.finish().await;
    assert_eq!(lag(&bus, "a/s").await, 2);
}

#[tokio::test]
async fn what_a_leaving_consumer_had_goes_to_the_others_in_order_and_unspent() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, 1..=4).await;
    let leaving = bus.consume(spec("a/s")).await.unwrap();
    let mut staying = bus.consume(spec("a/s")).await.unwrap();
    publish(&bus, 5..=6).await;
    drop(leaving);
    let mut seen = Vec::new();
    for _ in 0..6 {
        let delivery = next(&mut staying).await;
        assert_eq!(delivery.attempt, 1);
        seen.push(delivery.position);
    }
    seen.sort_unstable();
    assert_eq!(seen, [1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn a_retry_spends_an_attempt_that_a_restart_remembers_and_a_release_does_not() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, [1]).await;
    bus.close().await;
    let delay = Duration::from_millis(1);
    let outcomes = [
        (Settle::Retry { delay }, 2),
        (Settle::Release { delay }, 2),
        (Settle::Release { delay: Duration::ZERO }, 2),
        (Settle::Retry { delay }, 3),
    ];
    let mut attempt = 1;
    for (outcome, attempt_after) in outcomes {
        let bus = open(&dir).await;
        let mut consumer = bus.consume(spec("a/s")).await.unwrap();
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt, attempt);
        consumer.settler().settle(delivery.id, outcome);
        assert_eq!(next(&mut consumer).await.attempt, attempt_after);
        bus.close().await;
        attempt = attempt_after;
    }
}

#[tokio::test]
async fn a_retried_event_waits_while_others_pass() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, 1..=2).await;
    let spec = SubscriptionSpec { max_in_flight: 1, ..spec("a/s") };
    let mut consumer = bus.consume(spec).await.unwrap();
    let first = next(&mut consumer).await;
    let delay = Duration::from_millis(100);
    consumer.settler().settle(first.id, Settle::Retry { delay });
    let second = next(&mut consumer).await;
    assert_eq!(second.position, 2);
    consumer.settler().settle(second.id, Settle::Ack);
    let again = next(&mut consumer).await;
    assert_eq!((again.position, again.attempt), (1, 2));
}

#[tokio::test]
async fn dead_letters_carry_the_reason_and_the_original_is_handled() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let event = Event::new("1", "/test", "t").unwrap().with_data("x");
    bus.publish("orders", vec![event]).await.unwrap();
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let delivery = next(&mut consumer).await;
    let dead = Settle::DeadLetter { reason: "no\nstock".into(), status: 500 };
    consumer.settler().settle(delivery.id, dead);
    assert_eq!(lag(&bus, "a/s").await, 0);
    bus.close().await;
    let bus = open(&dir).await;
    assert_eq!(lag(&bus, "a/s").await, 0);
    let mut letters = SubscriptionSpec::new("a/dead", "default", "orders.dead-letter").unwrap();
    letters.start = Start::Earliest;
    let mut consumer = bus.consume(letters).await.unwrap();
    let event = next(&mut consumer).await.event;
    assert_eq!((event.id(), event.data().unwrap().as_ref()), ("1", &b"x"[..]));
    assert_eq!(event.attribute("deadletterreason"), Some("no\u{fffd}stock"));
    assert_eq!(event.attribute("deadletterstatus"), Some("500"));
    assert_eq!(event.attribute("deadlettertopic"), Some("orders"));
    assert_eq!(event.attribute("deadlettersub"), Some("a/s"));
    assert_eq!(event.attribute("deadletterattempts"), Some("1"));
}

#[tokio::test]
async fn a_removed_subscription_ends_its_consumers_and_starts_anew() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, [1]).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    next(&mut consumer).await;
    bus.remove_subscription("a/s").await.unwrap();
    let end = timeout(Duration::from_secs(5), consumer.next()).await.unwrap();
    assert!(matches!(end, Some(Err(ConsumeError::Unavailable { .. }))));
    assert_eq!(lag(&bus, "a/s").await, 0);
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next(&mut consumer).await.position, 1);
}

#[tokio::test]
async fn bad_topic_names_are_invalid() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    for name in ["", "a b", "a\u{0}", &"x".repeat(256)] {
        let error = bus.publish(name, events([1])).await.unwrap_err();
        assert_eq!(error.kind, PublishErrorKind::Invalid, "{name:?}");
    }
    publish(&bus, [1]).await;
}

#[tokio::test]
async fn a_second_log_in_the_same_folder_is_refused() {
    let dir = TempDir::new().unwrap();
    let _bus = open(&dir).await;
    let registry = prometheus::Registry::new();
    let second = EmbeddedBus::open("b", dir.path(), LogOptions::default(), &registry).await;
    assert_eq!(second.unwrap_err(), LogError::InUse);
}

#[tokio::test]
async fn a_closed_bus_says_so() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    bus.close().await;
    bus.close().await;
    let error = bus.publish("orders", events([1])).await.unwrap_err();
    assert!(error.is_unavailable(), "an outbox keeps it for the next one: {error:?}");
    let error = bus.consume(spec("a/s")).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
}

#[tokio::test]
async fn a_bus_that_could_not_be_opened_or_was_closed_can_be_opened_on_the_same_registry() {
    let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let first = open(&dir).await;
    let registry = prometheus::Registry::new();
    let open = async |dir: &TempDir| {
        EmbeddedBus::open("b", dir.path(), LogOptions::default(), &registry).await
    };
    assert_eq!(open(&dir).await.unwrap_err(), LogError::InUse);
    first.close().await;
    let second = open(&dir).await.unwrap();
    assert!(matches!(open(&other).await, Err(LogError::Refused(_))), "of this name there is one");
    second.close().await;
    publish(&open(&other).await.unwrap(), [1]).await;
    let published =
        registry.gather().into_iter().find(|it| it.name() == "duet_bus_published_events_total");
    assert_eq!(published.unwrap().get_metric().len(), 1);
}

#[tokio::test]
async fn many_publishers_share_flushes() {
    let dir = TempDir::new().unwrap();
    let registry = prometheus::Registry::new();
    let bus = EmbeddedBus::open("default", dir.path(), LogOptions::default(), &registry).await;
    let bus = Arc::new(bus.unwrap());
    let publishers = (0..500).map(|id| {
        let bus = Arc::clone(&bus);
        tokio::spawn(async move { publish(&bus, [id]).await[0].position })
    });
    let mut positions = Vec::new();
    for publisher in publishers.collect::<Vec<_>>() {
        positions.push(publisher.await.unwrap());
    }
    positions.sort_unstable();
    assert_eq!(positions, (1..=500).collect::<Vec<_>>());
    let flushes = bus.metrics.flushes();
    assert!(flushes < 250, "{flushes} flushes for 500 publishes");
}
