//! Three servers, and one of them dies.

use std::collections::BTreeSet;

use async_nats::jetstream;
use duet_events::Event;
use duet_events::bus::{Consumer, EventBus as _, Settle};
use duet_events::nats::{NatsBus, NatsOptions};

use super::behaviour::{events, eventually, next, spec};
use super::{Server, connect, options};

/// Publishes until so many of these are acknowledged, whatever fails in between.
async fn publish(bus: &NatsBus, ids: std::ops::Range<u32>) -> BTreeSet<String> {
    for id in ids.clone() {
        eventually(&format!("{id} is acknowledged"), async || {
            bus.publish("orders", events([id])).await.is_ok()
        })
        .await;
    }
    ids.map(|id| id.to_string()).collect()
}

async fn all_come(consumer: &mut Consumer, mut missing: BTreeSet<String>) {
    while !missing.is_empty() {
        let delivery = next(consumer).await;
        missing.remove(delivery.event.id());
        consumer.settler().settle(delivery.id, Settle::Ack);
    }
}

#[tokio::test]
async fn every_acknowledged_event_outlives_the_leader_of_its_stream() {
    let Some(mut servers) = Server::cluster().await else { return };
    let urls: Vec<String> = servers.iter().map(Server::url).collect();
    let bus = NatsOptions { servers: urls.clone(), replicas: 3, ..options(&servers[0]) };
    let bus = connect(bus).await;
    // A new cluster has nobody who decides yet.
    let mut acknowledged = publish(&bus, 0..1).await;
    let due = jiff::Timestamp::now() + std::time::Duration::from_secs(3);
    let later = Event::new("later", "/test", "t").unwrap();
    let later = later.with_attribute("deliverat", &due.to_string()).unwrap();
    bus.publish("orders", vec![later]).await.unwrap();
    acknowledged.insert("later".to_owned());
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    acknowledged.append(&mut publish(&bus, 1..200).await);

    let client = async_nats::connect(urls).await.unwrap();
    let stream = jetstream::new(client).get_stream("duet_orders").await.unwrap();
    let info = stream.cached_info();
    assert_eq!(info.config.num_replicas, 3);
    let leader = info.cluster.as_ref().unwrap().leader.clone().unwrap();
    let number: usize = leader.trim_start_matches('n').parse().unwrap();
    servers[number].kill();

    let mut more = publish(&bus, 200..400).await;
    acknowledged.append(&mut more);
    all_come(&mut consumer, acknowledged).await;
}
