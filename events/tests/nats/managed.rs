//! The behaviours of order, of time, and of what operators do.

use std::time::Duration;

use duet_events::Event;
use duet_events::bus::{Settle, Start, SubscriptionSpec, TopicConfig};

use super::behaviour::{
    Bus, events, eventually, lag_becomes, next, next_ids, nothing, publish, settle_all, spec,
};

fn keyed(id: u32, key: &str) -> Event {
    let event = Event::new(id.to_string(), "/test", "t").unwrap();
    event.with_attribute("partitionkey", key).unwrap()
}

pub(crate) async fn a_key_keeps_its_order_through_retries_and_restarts(bus: &Bus) {
    let open = bus.open().await;
    let published = vec![keyed(1, "a"), keyed(2, "a"), keyed(3, "b"), keyed(4, "a")];
    open.publish("orders", published).await.unwrap();
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/s") };
    let mut consumer = open.consume(ordered.clone()).await.unwrap();
    let one = next(&mut consumer).await;
    let three = next(&mut consumer).await;
    assert_eq!((one.event.id(), three.event.id()), ("1", "3"));
    nothing(&mut consumer).await;
    let delay = Duration::from_millis(50);
    consumer.settler().settle(one.id, Settle::Retry { delay });
    let one = next(&mut consumer).await;
    assert_eq!((one.event.id(), one.attempt), ("1", 2));
    consumer.settler().settle(one.id, Settle::Ack);
    assert_eq!(next(&mut consumer).await.event.id(), "2");
    // Event 2 is open when the bus goes, and comes before 4 when it is back.
    open.close().await;
    let open = bus.open().await;
    let mut consumer = open.consume(ordered).await.unwrap();
    let mut seen = next_ids(&mut consumer, 2).await;
    seen.sort();
    assert_eq!(seen, ["2", "3"]);
    nothing(&mut consumer).await;
}

pub(crate) async fn a_key_that_waits_leaves_room_for_others(bus: &Bus) {
    let bus = bus.open().await;
    let mut published: Vec<_> = (1..=400).map(|id| keyed(id, "a")).collect();
    published.push(keyed(401, "b"));
    bus.publish("orders", published).await.unwrap();
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/s") };
    let mut consumer = bus.consume(ordered).await.unwrap();
    let one = next(&mut consumer).await;
    assert_eq!(one.event.id(), "1");
    let delay = Duration::from_secs(3600);
    consumer.settler().settle(one.id, Settle::Retry { delay });
    assert_eq!(next(&mut consumer).await.event.id(), "401");
}

pub(crate) async fn events_of_a_source_keep_their_order(bus: &Bus) {
    let bus = bus.open().await;
    let config = TopicConfig { order_by: "source".to_owned(), ..TopicConfig::default() };
    bus.ensure_topic("orders", config).await.unwrap();
    let of = |id: &str, source: &str| Event::new(id, source, "t").unwrap();
    bus.publish("orders", vec![of("1", "/a"), of("2", "/a"), of("3", "/b")]).await.unwrap();
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/s") };
    let mut consumer = bus.consume(ordered).await.unwrap();
    let one = next(&mut consumer).await;
    let three = next(&mut consumer).await;
    assert_eq!((one.event.id(), three.event.id()), ("1", "3"));
    nothing(&mut consumer).await;
    consumer.settler().settle(one.id, Settle::Ack);
    assert_eq!(next(&mut consumer).await.event.id(), "2");
}

/// Milliseconds: not over before everything is in place, also on a busy machine.
const IN_A_WHILE: u64 = 4_000;

fn at(ms: u64) -> String {
    let now = jiff::Timestamp::now().as_millisecond();
    jiff::Timestamp::from_millisecond(now + i64::try_from(ms).unwrap()).unwrap().to_string()
}

pub(crate) async fn an_event_for_later_waits(bus: &Bus) {
    let bus = bus.open().await;
    let later = Event::new("later", "/test", "t").unwrap();
    let later = later.with_attribute("deliverat", &at(IN_A_WHILE)).unwrap();
    bus.publish("orders", vec![later]).await.unwrap();
    publish(&*bus, [1]).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next(&mut consumer).await.event.id(), "1");
    nothing(&mut consumer).await;
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.event.id(), delivery.attempt), ("later", 1));
    let due = delivery.event.deliver_at_ms().unwrap();
    let now = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap();
    assert!(now >= due, "{now} is before {due}");
}

fn later(id: u32, ms: u64) -> Event {
    let event = Event::new(id.to_string(), "/test", "t").unwrap();
    event.with_attribute("deliverat", &at(ms)).unwrap()
}

pub(crate) async fn any_number_of_events_for_later_holds_up_nobody(bus: &Bus) {
    const HOUR: u64 = 3_600_000;
    let bus = bus.open().await;
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/ordered") };
    let mut consumer = bus.consume(ordered).await.unwrap();
    // More than what JetStream lets an ordered subscription have in hand.
    let waiting: Vec<_> = (10..2_510).map(|id| later(id, HOUR)).collect();
    // A disk may take 10 ms for each flush, and a publish waits for its answer for 5 s.
    for some in waiting.chunks(100) {
        bus.publish("orders", some.to_vec()).await.unwrap();
    }
    publish(&*bus, [1]).await;
    assert_eq!(next_ids(&mut consumer, 1).await, ["1"]);
    // Nor does one that starts while they wait.
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/new") };
    let mut consumer = bus.consume(ordered).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 1).await, ["1"]);
    let topics = bus.topics().await.unwrap();
    assert_eq!(topics[0].events, 2_501, "what waits is there");
    let in_flight = bus.subscriptions().await.unwrap().iter().map(|s| s.in_flight).max();
    assert_eq!(in_flight, Some(1));
}

pub(crate) async fn an_event_for_later_comes_once_to_those_who_are_there_then(bus: &Bus) {
    let open = bus.open().await;
    let published = open.publish("orders", vec![later(1, IN_A_WHILE)]).await.unwrap();
    assert!(!published[0].duplicate);
    let again = open.publish("orders", vec![later(1, IN_A_WHILE)]).await.unwrap();
    assert!(again[0].duplicate, "the same event is known while it waits");
    open.close().await;
    let open = bus.open().await;
    let latest = SubscriptionSpec { start: Start::Latest, ..spec("a/latest") };
    let mut consumer = open.consume(latest).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.event.id(), delivery.attempt), ("1", 1));
    consumer.settler().settle(delivery.id, Settle::Ack);
    lag_becomes(&*open, "a/latest", 0).await;
    nothing(&mut consumer).await;
    assert_eq!(open.topics().await.unwrap()[0].events, 1, "it no longer waits");
}

pub(crate) async fn an_event_for_later_outlasts_the_retention(bus: &Bus) {
    let bus = bus.open().await;
    let config =
        TopicConfig { retention_age: Some(Duration::from_secs(1)), ..TopicConfig::default() };
    bus.ensure_topic("orders", config).await.unwrap();
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    bus.publish("orders", vec![later(1, 3_000)]).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 1).await, ["1"]);
}

pub(crate) async fn an_expired_event_is_not_delivered(bus: &Bus) {
    let bus = bus.open().await;
    let expired = Event::new("expired", "/test", "t").unwrap();
    let expired = expired.with_attribute("expirytime", "2020-01-01T00:00:00Z").unwrap();
    bus.publish("orders", vec![expired]).await.unwrap();
    publish(&*bus, [1]).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.event.id(), "1");
    consumer.settler().settle(delivery.id, Settle::Ack);
    lag_becomes(&*bus, "a/s", 0).await;
}

pub(crate) async fn a_redriven_event_goes_to_its_subscription_only(bus: &Bus) {
    let bus = bus.open().await;
    publish(&*bus, [1]).await;
    let mut other = bus.consume(spec("a/other")).await.unwrap();
    settle_all(&mut other, 1).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let delivery = next(&mut consumer).await;
    let dead = Settle::DeadLetter { reason: "no".into(), status: 0 };
    consumer.settler().settle(delivery.id, dead);
    lag_becomes(&*bus, "a/s", 0).await;
    let letters = bus.read("orders.dead-letter", 1, 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].event.id()), (1, "1"));
    let positions = vec![letters[0].position, 99];
    assert_eq!(bus.redrive("orders.dead-letter", positions).await.unwrap(), 1);
    let again = next(&mut consumer).await;
    assert_eq!((again.event.id(), again.attempt), ("1", 1));
    assert_eq!(again.event.attributes().len(), 0, "{:?}", again.event);
    lag_becomes(&*bus, "a/other", 0).await;
    nothing(&mut other).await;
    assert!(bus.read("orders.dead-letter", 1, 10).await.unwrap().is_empty());
}

pub(crate) async fn a_dead_letter_that_has_expired_stays(bus: &Bus) {
    let bus = bus.open().await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    let letter = |id, expires| {
        let notes =
            [("deadlettertopic", "orders"), ("deadlettersub", "a/s"), ("expirytime", expires)];
        let event = Event::new(id, "/test", "t").unwrap();
        notes.iter().fold(event, |event, (name, value)| event.with_attribute(name, value).unwrap())
    };
    let letters =
        vec![letter("old", "2020-01-01T00:00:00Z"), letter("new", "2100-01-01T00:00:00Z")];
    bus.publish("orders.dead-letter", letters).await.unwrap();
    assert_eq!(bus.redrive("orders.dead-letter", vec![1, 2]).await.unwrap(), 1);
    let left = bus.read("orders.dead-letter", 1, 10).await.unwrap();
    assert_eq!((left.len(), left[0].event.id()), (1, "old"));
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next(&mut consumer).await.event.id(), "new");
}

pub(crate) async fn a_subscription_goes_on_that_another_control_plane_resumes(bus: &Bus) {
    let (one, other) = (bus.open().await, bus.open().await);
    one.ensure_subscription(spec("a/s")).await.unwrap();
    one.pause("a/s", true).await.unwrap();
    let mut consumer = other.consume(spec("a/s")).await.unwrap();
    publish(&*one, [1]).await;
    nothing(&mut consumer).await;
    one.pause("a/s", false).await.unwrap();
    assert_eq!(next(&mut consumer).await.event.id(), "1");
}

pub(crate) async fn a_moved_subscription_sees_everything_again(bus: &Bus) {
    let bus = bus.open().await;
    publish(&*bus, 1..=3).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, Settle::Retry { delay: Duration::ZERO });
    let mut attempts = Vec::new();
    for _ in 0..3 {
        let delivery = next(&mut consumer).await;
        attempts.push(delivery.attempt);
        consumer.settler().settle(delivery.id, Settle::Ack);
    }
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 1, 2]);
    lag_becomes(&*bus, "a/s", 0).await;
    for (to, expected) in [
        (Start::Earliest, vec![1, 2, 3]),
        (Start::Position(2), vec![2, 3]),
        (Start::Time(1), vec![1, 2, 3]),
    ] {
        bus.seek("a/s", to).await.unwrap();
        for position in expected {
            let delivery = next(&mut consumer).await;
            assert_eq!((delivery.position, delivery.attempt), (position, 1), "{to:?}");
            consumer.settler().settle(delivery.id, Settle::Ack);
        }
    }
    bus.seek("a/s", Start::Latest).await.unwrap();
    nothing(&mut consumer).await;
    assert!(bus.seek("a/none", Start::Latest).await.is_err());
}

pub(crate) async fn a_paused_subscription_rests_also_after_a_restart(bus: &Bus) {
    let open = bus.open().await;
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    open.pause("a/s", true).await.unwrap();
    publish(&*open, [1]).await;
    nothing(&mut consumer).await;
    open.close().await;
    let open = bus.open().await;
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    assert!(open.subscriptions().await.unwrap()[0].paused);
    nothing(&mut consumer).await;
    // And after a replay.
    open.seek("a/s", Start::Earliest).await.unwrap();
    assert!(open.subscriptions().await.unwrap()[0].paused);
    nothing(&mut consumer).await;
    open.pause("a/s", false).await.unwrap();
    assert_eq!(next(&mut consumer).await.event.id(), "1");
}

pub(crate) async fn topics_and_subscriptions_are_told(bus: &Bus) {
    let bus = bus.open().await;
    publish(&*bus, 1..=3).await;
    bus.publish("other.one", events([1])).await.unwrap();
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let delivery = next(&mut consumer).await;
    consumer.settler().settle(delivery.id, Settle::Ack);
    lag_becomes(&*bus, "a/s", 2).await;
    let topics = bus.topics().await.unwrap();
    let told: Vec<_> =
        topics.iter().map(|t| (t.name.as_str(), t.first, t.next, t.events)).collect();
    assert_eq!(told, [("orders", 1, 4, 3), ("other.one", 1, 2, 1)]);
    let subscriptions = bus.subscriptions().await.unwrap();
    let [told] = &subscriptions[..] else { panic!("{subscriptions:?}") };
    assert_eq!((told.topic.as_str(), told.consumers, told.paused), ("orders", 1, false));
    assert!(told.oldest_ms.is_some_and(|ms| ms > 1_600_000_000_000), "{told:?}");
    assert_eq!(told.attempts, 0);
    // Both wait: one was tried once, the other twice.
    let hour = Duration::from_secs(3600);
    let (two, three) = (next(&mut consumer).await, next(&mut consumer).await);
    consumer.settler().settle(two.id, Settle::Retry { delay: hour });
    consumer.settler().settle(three.id, Settle::Retry { delay: Duration::from_millis(1) });
    let three = next(&mut consumer).await;
    assert_eq!((three.position, three.attempt), (3, 2));
    consumer.settler().settle(three.id, Settle::Retry { delay: hour });
    let twice = async || bus.subscriptions().await.unwrap()[0].attempts == 2;
    eventually("the most attempts are two", twice).await;
}

pub(crate) async fn removed_events_are_gone(bus: &Bus) {
    let bus = bus.open().await;
    publish(&*bus, 1..=3).await;
    assert_eq!(bus.remove_events("orders", vec![2, 9]).await.unwrap(), 1);
    let left = bus.read("orders", 1, 10).await.unwrap();
    assert_eq!(left.iter().map(|e| e.position).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(bus.read("orders", 2, 1).await.unwrap()[0].position, 3);
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 2).await, ["1", "3"]);
}
