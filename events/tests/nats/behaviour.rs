//! The behaviours, for any bus that can be opened again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use duet_events::Event;
use duet_events::bus::{
    ConsumeError, Consumer, Delivery, ManagedBus, PublishErrorKind, Published, Settle, Start,
    SubscriptionSpec, TopicConfig,
};
use duet_events::embedded::EmbeddedBus;
use duet_events::log::LogOptions;
use duet_events::nats::NatsOptions;
use tokio::time::timeout;

/// A bus, closed.
pub(crate) enum Bus {
    Embedded(PathBuf),
    Nats(NatsOptions),
}

impl Bus {
    pub(crate) async fn open(&self) -> Arc<dyn ManagedBus> {
        let registry = prometheus::Registry::new();
        match self {
            Self::Embedded(dir) => {
                let options = LogOptions::default();
                Arc::new(EmbeddedBus::open("default", dir, options, &registry).await.unwrap())
            }
            Self::Nats(options) => super::connect(options.clone()).await,
        }
    }
}

pub(crate) fn spec(name: &str) -> SubscriptionSpec {
    SubscriptionSpec {
        start: Start::Earliest,
        ..SubscriptionSpec::new(name, "default", "orders").unwrap()
    }
}

pub(crate) fn events(ids: impl IntoIterator<Item = u32>) -> Vec<Event> {
    ids.into_iter().map(|id| Event::new(id.to_string(), "/test", "t").unwrap()).collect()
}

pub(crate) async fn publish(
    bus: &dyn ManagedBus,
    ids: impl IntoIterator<Item = u32>,
) -> Vec<Published> {
    bus.publish("orders", events(ids)).await.unwrap()
}

pub(crate) async fn next(consumer: &mut Consumer) -> Delivery {
    timeout(Duration::from_secs(30), consumer.next()).await.unwrap().unwrap().unwrap()
}

pub(crate) async fn next_ids(consumer: &mut Consumer, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(next(consumer).await.event.id().to_owned());
    }
    ids
}

pub(crate) async fn nothing(consumer: &mut Consumer) {
    let more = timeout(Duration::from_millis(300), consumer.next()).await;
    assert!(more.is_err(), "{more:?}");
}

pub(crate) async fn eventually(what: &str, check: impl AsyncFn() -> bool) {
    let all = async {
        while !check().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(Duration::from_secs(30), all).await.is_ok(), "never: {what}");
}

pub(crate) async fn settle_all(consumer: &mut Consumer, count: usize) {
    for _ in 0..count {
        let delivery = next(consumer).await;
        consumer.settler().settle(delivery.id, Settle::Ack);
    }
}

pub(crate) async fn lag_becomes(bus: &dyn ManagedBus, name: &str, lag: u64) {
    eventually(&format!("lag {lag} of {name}"), async || {
        let all = bus.subscriptions().await.unwrap();
        all.iter().any(|status| status.name == name && status.lag == lag)
    })
    .await;
}

pub(crate) async fn positions_count_from_one_and_survive_a_restart(bus: &Bus) {
    let open = bus.open().await;
    let positions: Vec<_> = publish(&*open, 1..=3).await.iter().map(|p| p.position).collect();
    assert_eq!(positions, [1, 2, 3]);
    open.close().await;
    let open = bus.open().await;
    assert_eq!(publish(&*open, [4]).await, [Published { position: 4, duplicate: false }]);
}

pub(crate) async fn the_same_source_and_id_is_stored_once_also_after_a_restart(bus: &Bus) {
    let open = bus.open().await;
    publish(&*open, [1, 2]).await;
    let again = [
        Published { position: 2, duplicate: true },
        Published { position: 3, duplicate: false },
        Published { position: 3, duplicate: true },
    ];
    assert_eq!(publish(&*open, [2, 3, 3]).await, again);
    open.close().await;
    let open = bus.open().await;
    assert_eq!(publish(&*open, [1]).await, [Published { position: 1, duplicate: true }]);
    let other_topic = open.publish("other", events([1])).await.unwrap();
    assert_eq!(other_topic, [Published { position: 1, duplicate: false }]);
}

pub(crate) async fn the_deduplication_window_ends(bus: &Bus) {
    let bus = bus.open().await;
    let config = TopicConfig { dedup_window: Duration::from_millis(1), ..TopicConfig::default() };
    bus.ensure_topic("orders", config).await.unwrap();
    publish(&*bus, [1]).await;
    eventually("it is stored again", async || !publish(&*bus, [1]).await[0].duplicate).await;
}

pub(crate) async fn a_new_subscription_starts_at_latest_unless_it_says_earliest(bus: &Bus) {
    let open = bus.open().await;
    publish(&*open, [1]).await;
    let latest = SubscriptionSpec { start: Start::Latest, ..spec("a/latest") };
    open.ensure_subscription(latest.clone()).await.unwrap();
    publish(&*open, [2]).await;
    open.close().await;
    let open = bus.open().await;
    let mut consumer = open.consume(latest).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 1).await, ["2"]);
    let mut consumer = open.consume(spec("a/earliest")).await.unwrap();
    assert_eq!(next_ids(&mut consumer, 2).await, ["1", "2"]);
}

pub(crate) async fn acknowledged_events_stay_handled_across_a_restart_and_others_come_back_unspent(
    bus: &Bus,
) {
    let open = bus.open().await;
    publish(&*open, 1..=5).await;
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    let settler = consumer.settler();
    for _ in 0..4 {
        let delivery = next(&mut consumer).await;
        if delivery.position % 2 == 0 {
            settler.settle(delivery.id, Settle::Ack);
        }
    }
    open.close().await;
    let open = bus.open().await;
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    let mut back = Vec::new();
    for _ in 0..3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt, 1);
        back.push(delivery.position);
    }
    back.sort_unstable();
    assert_eq!(back, [1, 3, 5]);
    nothing(&mut consumer).await;
}

pub(crate) async fn competing_consumers_share_and_credit_bounds_each(bus: &Bus) {
    let bus = bus.open().await;
    let spec = SubscriptionSpec { max_in_flight: 2, ..spec("a/s") };
    let mut one = bus.consume(spec.clone()).await.unwrap();
    let mut two = bus.consume(spec).await.unwrap();
    publish(&*bus, 1..=6).await;
    let mut all = next_ids(&mut one, 2).await;
    all.extend(next_ids(&mut two, 2).await);
    all.sort();
    assert_eq!(all, ["1", "2", "3", "4"]);
    nothing(&mut one).await;
    drop(two);
    nothing(&mut one).await;
}

pub(crate) async fn what_a_leaving_consumer_had_goes_to_the_others_unspent(bus: &Bus) {
    let bus = bus.open().await;
    publish(&*bus, 1..=4).await;
    let leaving = bus.consume(spec("a/s")).await.unwrap();
    let mut staying = bus.consume(spec("a/s")).await.unwrap();
    publish(&*bus, 5..=6).await;
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

pub(crate) async fn what_a_consumer_left_comes_before_what_is_newer(bus: &Bus) {
    let bus = bus.open().await;
    for round in 0..10 {
        let (first, last) = (round * 8 + 1, round * 8 + 8);
        let spec = spec(&format!("a/{round}"));
        let spec = SubscriptionSpec { start: Start::Latest, ..spec };
        bus.ensure_subscription(spec.clone()).await.unwrap();
        // It wants more than there is, or there is more than it wants.
        let (wants, there) = if round % 2 == 0 { (64, first + 3) } else { (4, last) };
        publish(&*bus, first..=there).await;
        let leaving = SubscriptionSpec { max_in_flight: wants, ..spec.clone() };
        let mut leaving = bus.consume(leaving).await.unwrap();
        for position in first..first + 4 {
            assert_eq!(next(&mut leaving).await.position, u64::from(position));
        }
        leaving.finish().await;
        publish(&*bus, there + 1..=last).await;
        let mut consumer = bus.consume(spec).await.unwrap();
        for position in first..=last {
            let delivery = next(&mut consumer).await;
            let expected = (u64::from(position), 1);
            assert_eq!((delivery.position, delivery.attempt), expected, "round {round}");
        }
    }
}

pub(crate) async fn a_retry_spends_an_attempt_that_a_restart_remembers_and_a_release_does_not(
    bus: &Bus,
) {
    let open = bus.open().await;
    publish(&*open, [1]).await;
    open.close().await;
    let delay = Duration::from_millis(1);
    let outcomes = [
        (Settle::Retry { delay }, 2),
        (Settle::Release { delay }, 2),
        (Settle::Release { delay: Duration::ZERO }, 2),
        (Settle::Retry { delay }, 3),
    ];
    let mut attempt = 1;
    for (outcome, attempt_after) in outcomes {
        let open = bus.open().await;
        let mut consumer = open.consume(spec("a/s")).await.unwrap();
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt, attempt);
        consumer.settler().settle(delivery.id, outcome);
        assert_eq!(next(&mut consumer).await.attempt, attempt_after);
        open.close().await;
        attempt = attempt_after;
    }
}

pub(crate) async fn a_retried_event_waits_while_others_pass(bus: &Bus) {
    let bus = bus.open().await;
    publish(&*bus, 1..=2).await;
    let spec = SubscriptionSpec { max_in_flight: 1, ..spec("a/s") };
    let mut consumer = bus.consume(spec).await.unwrap();
    let first = next(&mut consumer).await;
    let delay = Duration::from_millis(300);
    consumer.settler().settle(first.id, Settle::Retry { delay });
    let second = next(&mut consumer).await;
    assert_eq!(second.position, 2);
    consumer.settler().settle(second.id, Settle::Ack);
    let again = next(&mut consumer).await;
    assert_eq!((again.position, again.attempt), (1, 2));
}

pub(crate) async fn dead_letters_carry_the_reason_and_the_original_is_handled(bus: &Bus) {
    let open = bus.open().await;
    let event = Event::new("1", "/test", "t").unwrap().with_data("x");
    open.publish("orders", vec![event]).await.unwrap();
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    let delivery = next(&mut consumer).await;
    let dead = Settle::DeadLetter { reason: "no\nstock".into(), status: 500 };
    consumer.settler().settle(delivery.id, dead);
    let mut letters = SubscriptionSpec::new("a/dead", "default", "orders.dead-letter").unwrap();
    letters.start = Start::Earliest;
    let mut dead = open.consume(letters).await.unwrap();
    let event = next(&mut dead).await.event;
    assert_eq!((event.id(), event.data().unwrap().as_ref()), ("1", &b"x"[..]));
    assert_eq!(event.attribute("deadletterreason"), Some("no\u{fffd}stock"));
    assert_eq!(event.attribute("deadletterstatus"), Some("500"));
    assert_eq!(event.attribute("deadlettertopic"), Some("orders"));
    assert_eq!(event.attribute("deadlettersub"), Some("a/s"));
    assert_eq!(event.attribute("deadletterattempts"), Some("1"));
    open.close().await;
    let open = bus.open().await;
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    nothing(&mut consumer).await;
}

pub(crate) async fn a_removed_subscription_ends_its_consumers_and_starts_anew(bus: &Bus) {
    let bus = bus.open().await;
    publish(&*bus, [1]).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    next(&mut consumer).await;
    bus.remove_subscription("a/s").await.unwrap();
    let end = timeout(Duration::from_secs(5), consumer.next()).await.unwrap();
    assert!(matches!(end, Some(Err(ConsumeError::Unavailable { .. }))), "{end:?}");
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next(&mut consumer).await.position, 1);
}

pub(crate) async fn bad_topic_names_are_invalid(bus: &Bus) {
    let bus = bus.open().await;
    for name in ["", "a b", "a\u{0}", &"x".repeat(256)] {
        let error = bus.publish(name, events([1])).await.unwrap_err();
        assert_eq!(error.kind, PublishErrorKind::Invalid, "{name:?}");
    }
    publish(&*bus, [1]).await;
}

pub(crate) async fn any_printable_topic_name_is_a_topic_of_its_own(bus: &Bus) {
    let bus = bus.open().await;
    let long = "x".repeat(255);
    for name in ["a.b", "a_b", "a*", "a>", ">", "a/b", "$JS.API", "ä", "A", "a", &long] {
        let published = bus.publish(name, events([1])).await.unwrap();
        assert_eq!(published, [Published { position: 1, duplicate: false }], "{name:?}");
    }
}

pub(crate) async fn a_closed_bus_says_so(bus: &Bus) {
    let bus = bus.open().await;
    bus.close().await;
    bus.close().await;
    let error = bus.publish("orders", events([1])).await.unwrap_err();
    assert!(error.is_unavailable(), "an outbox keeps it for the next one: {error:?}");
    let error = bus.consume(spec("a/s")).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
}
