//! Several control planes on one cluster, and consumers that follow one another.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::pull;
use duet_events::Event;
use duet_events::bus::{
    EventBus as _, ManagedBus as _, Settle, Start, SubscriptionSpec, TopicConfig,
};
use duet_events::nats::NatsBus;
use futures::StreamExt as _;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::behaviour::{Bus, eventually, next, publish, settle_all, spec};
use super::{Server, connect, options};

pub(crate) async fn a_replay_that_another_control_plane_asks_for_misses_nothing(bus: &Bus) {
    let (one, other) = (bus.open().await, bus.open().await);
    publish(&*one, 1..=20).await;
    for ordered in [false, true] {
        let name = format!("a/{ordered}");
        let spec = SubscriptionSpec { max_in_flight: 1, ordered, ..spec(&name) };
        let mut consumer = other.consume(spec).await.unwrap();
        settle_all(&mut consumer, 19).await;
        // While it has this one, an unordered one asks for nothing more.
        let last = next(&mut consumer).await;
        one.seek(&name, Start::Earliest).await.unwrap();
        consumer.settler().settle(last.id, Settle::Ack);
        for position in 1..=20 {
            let delivery = next(&mut consumer).await;
            assert_eq!((delivery.position, delivery.generation), (position, 1), "{name}");
            consumer.settler().settle(delivery.id, Settle::Ack);
        }
    }
}

pub(crate) async fn an_ordered_subscription_goes_on_at_once_with_the_next_consumer(bus: &Bus) {
    let bus = bus.open().await;
    for first in (0..3_000).step_by(100) {
        publish(&*bus, first..first + 100).await;
    }
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/s") };
    for _ in 0..3 {
        let before = Instant::now();
        let mut consumer = bus.consume(ordered.clone()).await.unwrap();
        next(&mut consumer).await;
        let took = before.elapsed();
        assert!(took < Duration::from_secs(5), "{took:?}");
        consumer.finish().await;
    }
}

pub(crate) async fn a_subscription_rests_that_another_control_plane_pauses(bus: &Bus) {
    let (one, other) = (bus.open().await, bus.open().await);
    let keyed = |id: u32| {
        let event = Event::new(id.to_string(), "/test", "t").unwrap();
        event.with_attribute("partitionkey", "a").unwrap()
    };
    one.publish("orders", (0..200).map(keyed).collect()).await.unwrap();
    let ordered = SubscriptionSpec { ordered: true, max_in_flight: 50, ..spec("a/s") };
    let mut consumer = other.consume(ordered).await.unwrap();
    settle_all(&mut consumer, 1).await;
    one.pause("a/s", true).await.unwrap();
    let mut handled = 0;
    let rests = async {
        while let Ok(Some(Ok(delivery))) = timeout(Duration::from_secs(2), consumer.next()).await {
            sleep(Duration::from_millis(100)).await;
            consumer.settler().settle(delivery.id, Settle::Ack);
            handled += 1;
        }
    };
    timeout(Duration::from_secs(30), rests).await.unwrap();
    assert!(handled < 150, "{handled} of what it had in hand");
}

pub(crate) async fn consumers_of_another_control_plane_are_seen(bus: &Bus) {
    let (one, other) = (bus.open().await, bus.open().await);
    let spec = SubscriptionSpec { max_in_flight: 1, ..spec("a/s") };
    let consumers = async || one.subscriptions().await.unwrap()[0].consumers;
    let mut consumer = other.consume(spec).await.unwrap();
    eventually("it waits for events", async || consumers().await == 1).await;
    publish(&*one, [1]).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(consumers().await, 1, "it has as many events as it wants");
    consumer.settler().settle(delivery.id, Settle::Ack);
    consumer.finish().await;
    eventually("it is gone", async || consumers().await == 0).await;
}

/// Consumers that come and go, each with something in hand, and then one that stays. Returns how long that one waited for
/// the first event.
async fn handed_over(bus: Arc<NatsBus>, spec: SubscriptionSpec) -> Duration {
    for _ in 0..12 {
        let mut consumer = bus.consume(spec.clone()).await.unwrap();
        let leaves = Instant::now() + Duration::from_millis(350);
        while let Ok(Some(Ok(delivery))) = timeout_at(leaves, consumer.next()).await {
            if delivery.position % 4 > 0 {
                consumer.settler().settle(delivery.id, Settle::Ack);
            }
        }
    }
    let before = Instant::now();
    let mut consumer = bus.consume(spec).await.unwrap();
    next(&mut consumer).await;
    before.elapsed()
}

#[tokio::test]
async fn nothing_is_on_its_way_to_a_consumer_that_left() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    let mut handovers = JoinSet::new();
    for number in 0..10 {
        let ordered = SubscriptionSpec { ordered: true, ..spec(&format!("a/{number}")) };
        bus.ensure_subscription(ordered.clone()).await.unwrap();
        handovers.spawn(handed_over(Arc::clone(&bus), ordered));
    }
    for id in 0.. {
        publish(&*bus, [id]).await;
        // At the same time as others come and go.
        sleep(Duration::from_millis(5)).await;
        if handovers.is_empty() {
            break;
        }
        while let Some(took) = handovers.try_join_next() {
            let took = took.unwrap();
            assert!(took < Duration::from_secs(5), "handed out again only after {took:?}");
        }
    }
}

#[tokio::test]
async fn an_ordered_subscription_goes_on_once_another_process_handled_what_it_had() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    let ordered = SubscriptionSpec { ordered: true, ..spec("a/s") };
    bus.ensure_subscription(ordered.clone()).await.unwrap();
    publish(&*bus, 1..=3).await;
    let js = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let stream = js.get_stream("duet_orders").await.unwrap();
    let another = stream.get_consumer::<pull::Config>("a_2Fs").await.unwrap();
    let had = another.fetch().max_messages(1).messages().await.unwrap().next().await;
    let mut consumer = bus.consume(ordered).await.unwrap();
    // It has the others, and asks what became of that one.
    assert!(timeout(Duration::from_secs(1), consumer.next()).await.is_err(), "overtaken");
    had.unwrap().unwrap().ack().await.unwrap();
    for id in ["2", "3"] {
        let delivery = timeout(Duration::from_secs(5), consumer.next()).await;
        assert_eq!(delivery.expect("soon").unwrap().unwrap().event.id(), id);
    }
}

#[tokio::test]
async fn who_does_not_wait_for_a_consumer_leaves_none_behind() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    let knows = || format!("{bus:?}").contains("a/reader");
    let mut consumer = bus.consume(spec("a/reader"));
    while !knows() {
        assert!(futures::poll!(&mut consumer).is_pending());
        yield_now().await;
    }
    // It is taken in now, and nobody hears of that.
    for _ in 0..100 {
        yield_now().await;
    }
    drop(consumer);
    eventually("it is forgotten", async || !knows()).await;
}

#[tokio::test]
async fn a_bus_forgets_who_consumed_once() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    let knows = || format!("{bus:?}").contains("a/reader");
    let consumer = bus.consume(spec("a/reader")).await.unwrap();
    assert!(knows());
    drop(consumer);
    eventually("it is forgotten", async || !knows()).await;
}

#[tokio::test]
async fn what_was_declared_for_another_bus_is_not_this_ones_to_forget() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    bus.ensure_topic("orders", TopicConfig::default()).await.unwrap();
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    let registry = prometheus::Registry::new();
    let other = NatsBus::open("audit", options(&server), &registry).await.unwrap();
    other.connected(Duration::from_secs(20)).await.unwrap();
    for (bus, declared) in [(&*bus, true), (&other, false)] {
        assert_eq!(bus.topics().await.unwrap()[0].declared, declared);
        assert_eq!(bus.subscriptions().await.unwrap()[0].declared, declared);
    }
}
