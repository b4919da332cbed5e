//! When events come, and in which order: delay, expiry, ordered and idle subscriptions, retention that drops.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use tempfile::TempDir;
use tokio::time::timeout;

use super::tests::{events, lag, next, next_ids, open, publish, spec};
use super::*;
use crate::bus::{ManagedBus as _, Settle, Start, TopicConfig};
use crate::cloudevent::{DELIVER_AT, EXPIRY_TIME, PARTITION_KEY};

fn in_ms(ms: i64) -> String {
    Timestamp::from_millisecond(Timestamp::now().as_millisecond() + ms).unwrap().to_string()
}

fn with(id: u32, attributes: &[(&str, &str)]) -> Event {
    let mut event = events([id]).remove(0);
    for (name, value) in attributes {
        event = event.with_attribute(name, value).unwrap();
    }
    event
}

fn keyed(id: u32, key: &str) -> Event {
    with(id, &[(PARTITION_KEY, key)])
}

fn ordered(name: &str) -> SubscriptionSpec {
    SubscriptionSpec { ordered: true, ..spec(name) }
}

fn retry(ms: u64) -> Settle {
    Settle::Retry { delay: Duration::from_millis(ms) }
}

async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !condition().await {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), holds).await.unwrap();
}

#[tokio::test]
async fn an_event_for_later_comes_when_it_is_due_also_after_a_restart_and_lets_others_pass() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let due = in_ms(400);
    let later = with(1, &[(DELIVER_AT, &due), (PARTITION_KEY, "k")]);
    bus.publish("orders", vec![later, keyed(2, "k")]).await.unwrap();
    let mut consumer = bus.consume(ordered("a/s")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 1).await, ["2"]);
    bus.close().await;
    let bus = open(&dir).await;
    let mut consumer = bus.consume(ordered("a/s")).await.unwrap();
    let second = next(&mut consumer).await;
    assert_eq!(second.event.id(), "2");
    consumer.settler().settle(second.id, Settle::Ack);
    let first = next(&mut consumer).await;
    assert!(Timestamp::now() >= due.parse().unwrap(), "too early");
    assert_eq!((first.event.id(), first.attempt), ("1", 1));
    consumer.settler().settle(first.id, Settle::Ack);
    assert_eq!(lag(&bus, "a/s").await, 0);
}

#[tokio::test]
async fn an_expired_event_is_done_without_a_delivery_and_counted() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let events = vec![
        with(1, &[(EXPIRY_TIME, &in_ms(-1000))]),
        with(2, &[(EXPIRY_TIME, &in_ms(60_000))]),
        // A retry does not outlive it either.
        with(3, &[(EXPIRY_TIME, &in_ms(300))]),
        with(4, &[(DELIVER_AT, &in_ms(200)), (EXPIRY_TIME, &in_ms(100))]),
    ];
    bus.publish("orders", events).await.unwrap();
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let second = next(&mut consumer).await;
    let third = next(&mut consumer).await;
    assert_eq!((second.event.id(), third.event.id()), ("2", "3"));
    consumer.settler().settle(second.id, Settle::Ack);
    consumer.settler().settle(third.id, retry(301));
    until(async || lag(&bus, "a/s").await == 0).await;
    assert_eq!(bus.metrics.expired_of("a/s"), 3);
}

#[tokio::test]
async fn a_failing_event_holds_back_its_own_key_only() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let all = vec![keyed(1, "a"), keyed(2, "a"), keyed(3, "b"), with(4, &[]), keyed(5, "a")];
    bus.publish("orders", all).await.unwrap();
    let mut one = bus.consume(ordered("a/s")).await.unwrap();
    let first = next(&mut one).await;
    assert_eq!(first.event.id(), "1");
    one.settler().settle(first.id, retry(50));
    assert_eq!(next_ids(&mut one, 2).await, ["3", "4"]);
    // Another consumer and a release change nothing.
    let mut two = bus.consume(ordered("a/s")).await.unwrap();
    let again = next(&mut two).await;
    assert_eq!((again.event.id(), again.attempt), ("1", 2));
    two.settler().settle(again.id, Settle::Release { delay: Duration::ZERO });
    drop(one);
    let mut ids = BTreeMap::new();
    for _ in 0..3 {
        let delivery = next(&mut two).await;
        ids.insert(delivery.event.id().to_owned(), delivery.id);
    }
    assert_eq!(ids.keys().collect::<Vec<_>>(), ["1", "3", "4"]);
    two.settler().settle(ids["1"], Settle::DeadLetter { reason: "no".into(), status: 500 });
    let second = next(&mut two).await;
    assert_eq!(second.event.id(), "2");
    bus.close().await;
    let bus = open(&dir).await;
    let mut consumer = bus.consume(ordered("a/s")).await.unwrap();
    let mut seen = next_ids(&mut consumer, 3).await;
    seen.sort();
    assert_eq!(seen, ["2", "3", "4"], "5 waits for 2, also after a restart");
}

#[tokio::test]
async fn a_retry_keeps_its_place_in_the_order_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    bus.publish("orders", vec![keyed(1, "a"), keyed(2, "a")]).await.unwrap();
    let mut consumer = bus.consume(ordered("a/s")).await.unwrap();
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, retry(300));
    bus.close().await;
    let bus = open(&dir).await;
    let mut consumer = bus.consume(ordered("a/s")).await.unwrap();
    let again = next(&mut consumer).await;
    assert_eq!((again.event.id(), again.attempt), ("1", 2));
}

#[tokio::test]
async fn the_topic_says_by_what_to_order() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let config = TopicConfig { order_by: "subject".into(), ..TopicConfig::default() };
    bus.ensure_topic("orders", config).await.unwrap();
    let by = |id, subject| with(id, &[("subject", subject), (PARTITION_KEY, "same")]);
    bus.publish("orders", vec![by(1, "x"), by(2, "x"), by(3, "y")]).await.unwrap();
    let mut consumer = bus.consume(ordered("a/s")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 2).await, ["1", "3"]);
    bus.ensure_topic("orders", TopicConfig::default()).await.unwrap();
    bus.publish("orders", vec![by(4, "z")]).await.unwrap();
    assert_eq!(lag(&bus, "a/s").await, 4, "nothing is lost by a change");
}

/// Many keys, several consumers that fail, release and leave at random, and restarts.
#[tokio::test]
async fn every_key_is_handled_in_order_whatever_its_consumers_do() {
    const EVENTS: u32 = 600;
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let all = (0..EVENTS).map(|id| keyed(id, &(id % 7).to_string())).collect();
    bus.publish("orders", all).await.unwrap();
    bus.close().await;
    let mut random = 88_172_645_463_325_252_u64;
    let mut roll = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut handled: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    let mut count = 0;
    while count < EVENTS {
        let bus = open(&dir).await;
        let mut consumers = Vec::new();
        for _ in 0..3 {
            consumers.push(bus.consume(ordered("a/s")).await.unwrap());
        }
        for _ in 0..100 {
            let at = usize::try_from(roll(3)).unwrap();
            let Ok(Some(Ok(delivery))) =
                timeout(Duration::from_millis(2), consumers[at].next()).await
            else {
                if lag(&bus, "a/s").await == 0 {
                    break;
                }
                continue;
            };
            let id: u32 = delivery.event.id().parse().unwrap();
            let done = handled.entry(id % 7).or_default();
            let expected = done.last().map_or(id % 7, |last| last + 7);
            // What was handled and not written comes again after a restart, from the start of the unwritten.
            assert!(id <= expected, "{id} before {expected}");
            let outcome = match roll(10) {
                0 => retry(1),
                1 => Settle::Release { delay: Duration::ZERO },
                2 => Settle::Release { delay: Duration::from_millis(1) },
                3 => {
                    consumers[at] = bus.consume(ordered("a/s")).await.unwrap();
                    continue;
                }
                _ => Settle::Ack,
            };
            let acked = outcome == Settle::Ack;
            assert!(consumers[at].settler().settle(delivery.id, outcome));
            count += u32::from(acked && done.insert(id));
        }
        bus.close().await;
    }
    assert_eq!(lag(&open(&dir).await, "a/s").await, 0);
}

#[tokio::test]
async fn a_subscription_that_nobody_consumes_is_forgotten_when_it_says_so() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    let idle_expiry = Some(Duration::from_millis(1));
    let expiring = |name| SubscriptionSpec { idle_expiry, ..spec(name) };
    let _consumer = bus.consume(expiring("a/served")).await.unwrap();
    bus.ensure_subscription(spec("a/kept")).await.unwrap();
    bus.ensure_subscription(expiring("a/idle")).await.unwrap();
    let names = async || {
        let all = bus.subscriptions().await.unwrap();
        all.into_iter().map(|status| status.name).collect::<Vec<_>>()
    };
    until(async || names().await == ["a/kept", "a/served"]).await;
    bus.close().await;
    let bus = open(&dir).await;
    until(async || bus.subscriptions().await.unwrap().len() == 1).await;
}

#[tokio::test]
async fn retention_may_drop_what_nobody_handled_and_counts_it() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    publish(&bus, 1..=100).await;
    assert_eq!(lag(&bus, "a/s").await, 100);
    let config =
        TopicConfig { retention_bytes: Some(200), drop_unhandled: true, ..TopicConfig::keep_all() };
    bus.ensure_topic("orders", config).await.unwrap();
    until(async || lag(&bus, "a/s").await < 100).await;
    let left = lag(&bus, "a/s").await;
    assert_eq!(bus.metrics.dropped_of("orders"), 100 - left);
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let last = next_ids(&mut consumer, usize::try_from(left).unwrap()).await;
    assert_eq!(last.last().map(String::as_str), Some("100"));
    assert_eq!(bus.metrics.damaged(), 0);
}

#[tokio::test]
async fn a_subscription_starts_at_a_time_or_a_position() {
    let dir = TempDir::new().unwrap();
    let bus = open(&dir).await;
    publish(&bus, 1..=2).await;
    tokio::time::sleep(Duration::from_millis(2)).await;
    publish(&bus, 3..=4).await;
    let at = bus.read("orders", 3, 1).await.unwrap()[0].published_ms;
    let cases = [
        (Start::Time(at), "3"),
        (Start::Time(0), "1"),
        (Start::Position(2), "2"),
        (Start::Position(0), "1"),
    ];
    for (at, (start, first)) in cases.into_iter().enumerate() {
        let spec = SubscriptionSpec { start, ..spec(&format!("a/{at}")) };
        let mut consumer = bus.consume(spec).await.unwrap();
        assert_eq!(next_ids(&mut consumer, 1).await, [first], "{start:?}");
    }
    for start in [Start::Time(u64::MAX), Start::Position(u64::MAX)] {
        let spec = SubscriptionSpec { start, ..spec("a/late") };
        bus.ensure_subscription(spec).await.unwrap();
        assert_eq!(lag(&bus, "a/late").await, 0, "{start:?}");
        bus.remove_subscription("a/late").await.unwrap();
    }
}
