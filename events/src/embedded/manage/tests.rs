//! What an operator can do with the bus.

use std::time::Duration;

use tempfile::TempDir;
use tokio::time::timeout;

use super::super::tests::{events, lag, next, next_ids, open, publish, spec};
use super::*;
use crate::bus::{Consumer, EventBus as _, FirstWaiting, Settle, dead_letter};
use crate::cloudevent::Event;

const LETTERS: &str = "orders.dead-letter";

async fn status(bus: &EmbeddedBus, name: &str) -> SubscriptionStatus {
    let all = bus.subscriptions().await.unwrap();
    all.into_iter().find(|status| status.name == name).unwrap()
}

async fn topic(bus: &EmbeddedBus, name: &str) -> TopicStatus {
    let all = bus.topics().await.unwrap();
    all.into_iter().find(|status| status.name == name).unwrap()
}

async fn read_ids(bus: &EmbeddedBus, topic: &str) -> Vec<String> {
    let events = bus.read(topic, 1, 100).await.unwrap();
    events.into_iter().map(|stored| stored.event.id().to_owned()).collect()
}

async fn nothing_comes(consumer: &mut Consumer) {
    // Whatever is handed out is in the channel when the bus answers anything else.
    assert!(timeout(Duration::from_millis(30), consumer.next()).await.is_err());
}

fn unknown(kind: &'static str, name: &str) -> ManageError {
    ManageError::Unknown { kind, name: name.to_owned() }
}

#[tokio::test]
async fn the_status_says_how_a_subscription_is() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    assert!(bus.topics().await.unwrap().is_empty());
    publish(&bus, 1..=4).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let first = next(&mut consumer).await;
    let second = next(&mut consumer).await;
    let hour = Duration::from_secs(3600);
    consumer.settler().settle(first.id, Settle::Ack);
    consumer.settler().settle(second.id, Settle::Retry { delay: hour });
    let status = status(&bus, "a/s").await;
    let published_ms = bus.read("orders", 2, 1).await.unwrap()[0].published_ms;
    let expected = SubscriptionStatus {
        name: "a/s".into(),
        topic: "orders".into(),
        dead_letter_topic: LETTERS.into(),
        lag: 3,
        scheduled: Some(0),
        oldest_ms: Some(published_ms),
        first: Some(FirstWaiting { position: 2, published_ms }),
        in_flight: 2,
        retrying: 1,
        attempts: 1,
        consumers: 1,
        paused: false,
        declared: false,
        idle_expiry: None,
    };
    assert_eq!(status, expected);
    let topic = topic(&bus, "orders").await;
    assert_eq!((topic.first, topic.next, topic.events), (1, 5, 4));
    assert!(topic.bytes > 0);
}

#[tokio::test]
async fn a_topic_that_a_subscription_names_for_its_dead_letters_keeps_all_whoever_comes_first() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let poison = |name: &str| SubscriptionSpec { topic: "poison".into(), ..spec(name) };
    let picky = SubscriptionSpec { dead_letter_topic: "poison".into(), ..spec("a/picky") };
    bus.ensure_subscription(picky).await.unwrap();
    bus.ensure_subscription(poison("a/read")).await.unwrap();
    for _ in 0..2 {
        bus.publish("poison", events([1])).await.unwrap();
    }
    assert_eq!(topic(&bus, "poison").await.events, 2, "what keeps everything has no window either");
}

#[tokio::test]
async fn reading_is_bounded_and_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    publish(&bus, 1..=5).await;
    let read = bus.read("orders", 2, 3).await.unwrap();
    let found: Vec<_> = read.iter().map(|s| (s.position, s.event.id())).collect();
    assert_eq!(found, [(2, "2"), (3, "3"), (4, "4")]);
    assert!(bus.read("orders", 6, 3).await.unwrap().is_empty());
    assert_eq!(bus.read("nope", 1, 3).await, Err(unknown("topic", "nope")));
    assert_eq!(lag(&bus, "a/s").await, 5);
}

#[tokio::test]
async fn removed_events_are_gone_for_everyone_also_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, 1..=5).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, Settle::Retry { delay: Duration::from_secs(3600) });
    drop(consumer);
    let bytes = topic(&bus, "orders").await.bytes;
    assert_eq!(bus.remove_events("orders", vec![1, 3, 3, 9]).await, Ok(2));
    assert_eq!(bus.remove_events("orders", vec![3]).await, Ok(0));
    assert_eq!(bus.remove_events("nope", vec![3]).await, Err(unknown("topic", "nope")));
    let left = topic(&bus, "orders").await;
    assert_eq!((left.events, left.next), (3, 6));
    assert!(left.bytes < bytes);
    assert_eq!(read_ids(&bus, "orders").await, ["2", "4", "5"]);
    bus.close().await;
    let bus = open(&dir).await;
    assert_eq!(topic(&bus, "orders").await.events, 3);
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 3).await, ["2", "4", "5"]);
    assert_eq!(bus.metrics.damaged(), 0, "a hole is no damage");
    assert_eq!(lag(&bus, "a/s").await, 3);
}

/// Publishes, and gives every event up.
async fn dead_letters(bus: &EmbeddedBus, ids: std::ops::RangeInclusive<u32>) -> Consumer {
    publish(bus, ids.clone()).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    for _ in ids {
        let delivery = next(&mut consumer).await;
        let dead = Settle::DeadLetter { reason: "no".into(), status: 500 };
        consumer.settler().settle(delivery.id, dead);
    }
    assert_eq!(lag(bus, "a/s").await, 0);
    consumer
}

#[tokio::test]
async fn a_redriven_event_goes_to_its_own_subscription_only_and_starts_anew() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    bus.ensure_subscription(spec("a/other")).await.unwrap();
    let mut consumer = dead_letters(&bus, 1..=2).await;
    assert_eq!(bus.redrive(LETTERS, vec![2, 2, 7]).await, Ok(1));
    assert_eq!(read_ids(&bus, LETTERS).await, ["1"]);
    let again = next(&mut consumer).await;
    assert_eq!((again.event.id(), again.position, again.attempt), ("2", 3, 1));
    assert!(again.event.attributes().is_empty(), "{:?}", again.event);
    let mut other = bus.consume(spec("a/other")).await.unwrap();
    assert_eq!(next_ids(&mut other, 2).await, ["1", "2"]);
    nothing_comes(&mut other).await;
    assert_eq!(lag(&bus, "a/other").await, 2);
    // Given up once more, it carries the verdict of this time and no mark of the redrive.
    let dead = Settle::DeadLetter { reason: "again".into(), status: 501 };
    consumer.settler().settle(again.id, dead);
    assert_eq!(lag(&bus, "a/s").await, 0);
    let letter = &bus.read(LETTERS, 3, 1).await.unwrap()[0].event;
    assert_eq!(letter.attribute(dead_letter::REASON), Some("again"));
    assert_eq!(letter.attribute(dead_letter::REDRIVE_TO), None);
}

#[tokio::test]
async fn a_dead_letter_stays_where_nobody_would_take_it() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    drop(dead_letters(&bus, 1..=1).await);
    let stray = Event::new("9", "/test", "t").unwrap();
    bus.publish(LETTERS, vec![stray]).await.unwrap();
    bus.remove_subscription("a/s").await.unwrap();
    assert_eq!(bus.redrive(LETTERS, vec![1, 2]).await, Ok(0));
    assert_eq!(read_ids(&bus, LETTERS).await, ["1", "9"]);
    assert_eq!(bus.redrive("nope", vec![1]).await, Err(unknown("topic", "nope")));
}

#[tokio::test]
async fn a_dead_letter_that_has_expired_stays() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let mut consumer = dead_letters(&bus, 1..=1).await;
    let letter = bus.read(LETTERS, 1, 1).await.unwrap().remove(0).event;
    let expired = letter.with_attribute("expirytime", "2020-01-01T00:00:00Z").unwrap();
    bus.publish(LETTERS, vec![expired]).await.unwrap();
    assert_eq!(bus.redrive(LETTERS, vec![1, 2]).await, Ok(1));
    assert_eq!(topic(&bus, LETTERS).await.events, 1);
    assert_eq!(next(&mut consumer).await.position, 2);
    nothing_comes(&mut consumer).await;
}

#[tokio::test]
async fn many_dead_letters_are_moved_in_batches() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    for id in 1..=6 {
        let event = Event::new(id.to_string(), "/test", "t").unwrap();
        bus.publish("orders", vec![event.with_data(vec![b'x'; 3 << 20])]).await.unwrap();
    }
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    for _ in 0..6 {
        let delivery = next(&mut consumer).await;
        let dead = Settle::DeadLetter { reason: "no".into(), status: 500 };
        consumer.settler().settle(delivery.id, dead);
    }
    drop(consumer);
    assert_eq!(lag(&bus, "a/s").await, 0);
    assert_eq!(bus.redrive(LETTERS, (1..=6).collect()).await, Ok(6));
    assert_eq!((topic(&bus, LETTERS).await.events, lag(&bus, "a/s").await), (0, 6));
    bus.close().await;
    let bus = open(&dir).await;
    assert_eq!((topic(&bus, LETTERS).await.events, lag(&bus, "a/s").await), (0, 6));
}

#[tokio::test]
async fn nobody_waits_for_events_that_were_removed() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    publish(&bus, 1..=3).await;
    assert_eq!(lag(&bus, "a/s").await, 3);
    assert_eq!(bus.remove_events("orders", vec![1, 2, 3]).await, Ok(3));
    assert_eq!((lag(&bus, "a/s").await, status(&bus, "a/s").await.lag), (0, 0));
    publish(&bus, 4..=4).await;
    assert_eq!(lag(&bus, "a/s").await, 1);
}

#[tokio::test]
async fn a_subscription_moves_back_and_forth_and_old_answers_do_no_harm() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, 1..=4).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let settler = consumer.settler();
    let mut old = Vec::new();
    for _ in 0..4 {
        old.push(next(&mut consumer).await.id);
    }
    settler.settle(old[0], Settle::Retry { delay: Duration::from_secs(3600) });
    bus.seek("a/s", Start::Position(2)).await.unwrap();
    // All of these were before the move.
    settler.settle(old[1], Settle::Ack);
    settler.settle(old[2], Settle::DeadLetter { reason: "no".into(), status: 500 });
    settler.settle(old[3], Settle::Retry { delay: Duration::from_secs(3600) });
    for position in 2..=4 {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.position, delivery.attempt), (position, 1));
    }
    assert_eq!(lag(&bus, "a/s").await, 3);
    bus.seek("a/s", Start::Latest).await.unwrap();
    assert_eq!(lag(&bus, "a/s").await, 0);
    bus.seek("a/s", Start::Earliest).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 4).await, ["1", "2", "3", "4"]);
    assert_eq!(bus.seek("a/x", Start::Latest).await, Err(unknown("subscription", "a/x")));
    bus.close().await;
    let bus = open(&dir).await;
    assert_eq!(lag(&bus, "a/s").await, 4, "the move was written, the row of the retry is gone");
}

#[tokio::test]
async fn a_time_finds_its_place_also_among_holes() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, 1..=20).await;
    tokio::time::sleep(Duration::from_millis(2)).await;
    let middle = publish(&bus, 21..=21).await[0].position;
    publish(&bus, 22..=40).await;
    let at = bus.read("orders", middle, 1).await.unwrap()[0].published_ms;
    let holes = (2..20).chain(23..39).collect();
    bus.remove_events("orders", holes).await.unwrap();
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    bus.seek("a/s", Start::Time(at)).await.unwrap();
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 4).await, ["21", "22", "39", "40"]);
}

#[tokio::test]
async fn nothing_is_handed_out_while_paused_also_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    bus.pause("a/s", true).await.unwrap();
    publish(&bus, 1..=1).await;
    nothing_comes(&mut consumer).await;
    bus.close().await;
    let bus = open(&dir).await;
    assert!(status(&bus, "a/s").await.paused);
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    nothing_comes(&mut consumer).await;
    bus.pause("a/s", false).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 1).await, ["1"]);
    assert_eq!(bus.pause("a/x", true).await, Err(unknown("subscription", "a/x")));
}

#[tokio::test]
async fn a_backup_is_a_bus_of_its_own() {
    let (dir, copy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let bus = open(&dir).await;
    publish(&bus, 1..=3).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, Settle::Ack);
    // The answer of a publish says that the settle before it is written too.
    publish(&bus, 4..=4).await;
    let made = bus.backup(copy.path()).await.unwrap();
    assert_eq!((made.file.parent(), made.missing_events), (Some(copy.path()), 0));
    publish(&bus, 5..=5).await;
    let again = bus.backup(copy.path()).await;
    assert!(matches!(again, Err(ManageError::Refused(_))), "{again:?}");
    let restored = open(&copy).await;
    assert_eq!(read_ids(&restored, "orders").await, ["1", "2", "3", "4"]);
    let mut consumer = restored.consume(spec("a/s")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 3).await, ["2", "3", "4"]);
    assert!(restored.publish("orders", events([4])).await.unwrap()[0].duplicate);
    assert_eq!(lag(&bus, "a/s").await, 4);
}

#[tokio::test]
async fn what_is_open_says_who_waits() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let ordered = SubscriptionSpec { ordered: true, max_in_flight: 1, ..spec("a/ordered") };
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    bus.ensure_subscription(ordered.clone()).await.unwrap();
    let later = Event::new("3", "/test", "t").unwrap();
    let later = later.with_attribute("deliverat", "2100-01-01T00:00:00Z").unwrap();
    publish(&bus, [1, 2]).await;
    bus.publish("orders", vec![later]).await.unwrap();
    publish(&bus, 4..=6).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    for _ in [1, 2, 4, 5] {
        let delivery = next(&mut consumer).await;
        let hour = Duration::from_secs(3600);
        let outcome =
            if delivery.position == 2 { Settle::Retry { delay: hour } } else { Settle::Ack };
        consumer.settler().settle(delivery.id, outcome);
    }
    drop(consumer);
    let mut consumer = bus.consume(ordered).await.unwrap();
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, Settle::Ack);
    next(&mut consumer).await;
    drop(consumer);
    bus.close().await;
    let bus = open(&dir).await;
    let found = async |from, limit| {
        let found = bus.open_events("orders", from, limit).await.unwrap();
        let of =
            |open: super::super::OpenEvent| (open.position, open.waiting.join(" "), open.recent);
        found.into_iter().map(of).collect::<Vec<_>>()
    };
    let both = "a/ordered a/s".to_owned();
    let expected = [
        (2, both.clone(), true),
        (3, both.clone(), true),
        (4, "a/ordered".to_owned(), true),
        (5, "a/ordered".to_owned(), true),
        (6, both, true),
    ];
    assert_eq!(found(0, 100).await, expected);
    assert_eq!(found(3, 2).await, expected[1..3]);
    assert_eq!(found(7, 2).await, []);
    bus.remove_events("orders", vec![2, 3]).await.unwrap();
    assert_eq!(found(0, 100).await, expected[2..], "what was moved is gone");
}

#[tokio::test]
async fn a_key_that_is_put_off_is_open() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let ordered = SubscriptionSpec { ordered: true, max_in_flight: 2, ..spec("a/ordered") };
    bus.ensure_subscription(ordered.clone()).await.unwrap();
    let keyed = |id: u32, key: &str| {
        let event = Event::new(id.to_string(), "/test", "t").unwrap();
        event.with_attribute("partitionkey", key).unwrap()
    };
    // More of one key than are kept in memory, then another one.
    let stuck: Vec<Event> = (1..=20_000).map(|id| keyed(id, "stuck")).collect();
    bus.publish("orders", stuck).await.unwrap();
    bus.publish("orders", vec![keyed(20_001, "free")]).await.unwrap();
    let mut consumer = bus.consume(ordered).await.unwrap();
    let held = next(&mut consumer).await;
    assert_eq!(held.position, 1);
    let free = next(&mut consumer).await;
    assert_eq!(free.position, 20_001);
    consumer.settler().settle(free.id, Settle::Ack);
    timeout(Duration::from_secs(20), async {
        while lag(&bus, "a/ordered").await != 20_000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    drop(consumer);
    let found = bus.open_events("orders", 19_999, 100).await.unwrap();
    let waits: Vec<_> = found.iter().map(|open| (open.position, open.waiting.len())).collect();
    assert_eq!(waits, [(19_999, 1), (20_000, 1), (20_001, 0)]);
}
