//! Large events: what a control plane holds of them is bounded in bytes.

use std::time::Duration;

use async_nats::jetstream;
use duet_events::Event;
use duet_events::bus::{
    Consumer, Delivery, EventBus as _, ManagedBus as _, Settle, SubscriptionSpec,
};
use tokio::time::timeout;

use super::behaviour::{next, spec};
use super::{Server, connect, options};

/// Bytes of one event, and of what one consumer may have in hand.
const LARGE: usize = 1 << 20;
const FULL: usize = 16 << 20;

/// What comes until nothing more does.
async fn all(consumer: &mut Consumer) -> Vec<Delivery> {
    let mut all = vec![next(consumer).await];
    while let Ok(delivery) = timeout(Duration::from_secs(1), consumer.next()).await {
        all.push(delivery.unwrap().unwrap());
    }
    all
}

#[tokio::test]
async fn large_events_fill_a_consumers_hands_before_their_number_does() {
    let Some(server) = Server::start("max_payload: 32MB").await else { return };
    let bus = connect(options(&server)).await;
    for ordered in [false, true] {
        bus.ensure_subscription(SubscriptionSpec { ordered, ..spec(&format!("a/{ordered}")) })
            .await
            .unwrap();
    }
    for id in 0..40 {
        let event = Event::new(id.to_string(), format!("/{id}"), "t").unwrap();
        let data = "x".repeat(LARGE);
        bus.publish("orders", vec![event.with_data(data)]).await.unwrap();
    }
    let js = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let handed_out = async |name: &str| {
        let stream = js.get_stream("duet_orders").await.unwrap();
        stream.consumer_info(name).await.unwrap().num_ack_pending
    };
    for (ordered, token) in [(false, "a_2Ffalse"), (true, "a_2Ftrue")] {
        let spec = SubscriptionSpec { ordered, ..spec(&format!("a/{ordered}")) };
        let mut consumer = bus.consume(spec).await.unwrap();
        let mut seen = 0;
        while seen < 40 {
            let deliveries = all(&mut consumer).await;
            assert!((1..=FULL / LARGE + 1).contains(&deliveries.len()), "{}", deliveries.len());
            assert!(handed_out(token).await <= FULL / LARGE + 1, "no more are held");
            seen += deliveries.len();
            for delivery in deliveries {
                assert_eq!(delivery.attempt, 1);
                consumer.settler().settle(delivery.id, Settle::Ack);
            }
        }
        consumer.finish().await;
    }
}

#[tokio::test]
async fn an_event_that_is_larger_than_all_the_room_there_is_comes_too() {
    let Some(server) = Server::start("max_payload: 32MB").await else { return };
    let bus = connect(options(&server)).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    let js = jetstream::new(client);
    let sizes = [1, FULL + LARGE, LARGE, FULL + LARGE, 1];
    for bytes in sizes {
        let stored = js.publish("duet.orders", "x".repeat(bytes).into()).await.unwrap();
        stored.await.unwrap();
    }
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let mut came = Vec::new();
    for _ in sizes {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt, 1);
        came.push(delivery.event.data().unwrap().len());
        consumer.settler().settle(delivery.id, Settle::Ack);
    }
    came.sort_unstable();
    let mut sizes = sizes;
    sizes.sort_unstable();
    assert_eq!(came, sizes);
}
