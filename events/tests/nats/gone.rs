//! What somebody removed, or what vanished, and messages that are too large.

use std::time::Duration;

use async_nats::jetstream;
use duet_events::Event;
use duet_events::bus::{
    EventBus as _, ManagedBus as _, PublishErrorKind, Settle, Start, SubscriptionSpec,
};

use super::behaviour::{events, eventually, next, publish, spec};
use super::{Server, connect, options};

#[tokio::test]
async fn what_comes_after_a_stream_was_removed_is_for_those_who_subscribed_before() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    let js = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let latest = |name| SubscriptionSpec { start: Start::Latest, ..spec(name) };
    for name in ["a/one", "a/two"] {
        bus.ensure_subscription(latest(name)).await.unwrap();
    }
    publish(&*bus, [1]).await;
    js.delete_stream("duet_orders").await.unwrap();
    for id in [2, 3, 4] {
        eventually("it is published", async || bus.publish("orders", events([id])).await.is_ok())
            .await;
    }
    for name in ["a/one", "a/two"] {
        let mut consumer = bus.consume(latest(name)).await.unwrap();
        for id in ["2", "3", "4"] {
            let delivery = next(&mut consumer).await;
            assert_eq!(delivery.event.id(), id, "{name}");
            consumer.settler().settle(delivery.id, Settle::Ack);
        }
        consumer.finish().await;
    }
    js.delete_stream("duet_orders").await.unwrap();
    let mut consumer = bus.consume(latest("a/one")).await.unwrap();
    publish(&*bus, [5]).await;
    assert_eq!(next(&mut consumer).await.event.id(), "5");
    assert_eq!(next(&mut bus.consume(latest("a/two")).await.unwrap()).await.event.id(), "5");
}

#[tokio::test]
async fn a_machine_that_vanishes_is_known_to_be_gone() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    server.freeze();
    // Twice what it should take.
    let gone = async {
        while bus.connected(Duration::ZERO).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(40), gone).await.is_ok());
}

#[tokio::test]
async fn an_operator_is_heard_when_the_servers_answer_again() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    for name in ["a/moved", "a/paused"] {
        bus.ensure_subscription(spec(name)).await.unwrap();
    }
    publish(&*bus, 1..=3).await;
    server.freeze();
    // As long as an election: a request waits five seconds for its answer.
    let back = async {
        tokio::time::sleep(Duration::from_secs(7)).await;
        server.thaw();
    };
    let ((), paused, moved, removed, read) = tokio::join!(
        back,
        bus.pause("a/paused", true),
        bus.seek("a/moved", Start::Position(2)),
        bus.remove_events("orders", vec![3]),
        bus.read("orders", 1, 1),
    );
    assert_eq!((paused, moved, removed), (Ok(()), Ok(()), Ok(1)));
    assert_eq!(read.unwrap()[0].position, 1);
    let told = bus.subscriptions().await.unwrap();
    let told: Vec<_> = told.iter().map(|told| (told.name.as_str(), told.paused)).collect();
    assert_eq!(told, [("a/moved", false), ("a/paused", true)]);
    let mut consumer = bus.consume(spec("a/moved")).await.unwrap();
    assert_eq!(next(&mut consumer).await.position, 2);
}

#[tokio::test]
async fn a_dead_letter_has_room_or_leaves_its_data_where_it_is() {
    let Some(server) = Server::start("max_payload: 65536").await else { return };
    let bus = connect(options(&server)).await;
    let of = |bytes: usize| Event::new("1", "/test", "t").unwrap().with_data("x".repeat(bytes));
    let error = bus.publish("orders", vec![of(64_000)]).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Invalid);
    assert!(error.message.contains("max_payload"), "{error}");
    bus.publish("orders", vec![of(61_000)]).await.unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    client.publish("duet.orders", "y".repeat(65_500).into()).await.unwrap();
    client.flush().await.unwrap();
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    for _ in 0..2 {
        let delivery = next(&mut consumer).await;
        let dead = Settle::DeadLetter { reason: "no".repeat(2_000), status: 0 };
        consumer.settler().settle(delivery.id, dead);
    }
    let letters = SubscriptionSpec::new("a/dead", "default", "orders.dead-letter").unwrap();
    let letters = SubscriptionSpec { start: Start::Earliest, ..letters };
    let mut letters = bus.consume(letters).await.unwrap();
    let whole = next(&mut letters).await.event;
    assert_eq!(whole.data().unwrap().len(), 61_000);
    let event = next(&mut letters).await.event;
    assert!(event.data().is_none_or(|data| data.is_empty()));
    let reason = event.attribute("deadletterreason").unwrap();
    assert!(reason.contains("at position 2 of orders"), "{reason}");
}
