//! Three servers.

use std::collections::BTreeSet;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{FromConsumer as _, pull};
use duet_events::Event;
use duet_events::bus::{Consumer, EventBus as _, ManagedBus as _, Settle, SubscriptionSpec};
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

#[tokio::test]
async fn an_event_that_comes_twice_at_once_is_a_duplicate_on_several_servers_too() {
    let Some(servers) = Server::cluster().await else { return };
    let urls: Vec<String> = servers.iter().map(Server::url).collect();
    let bus = connect(NatsOptions { servers: urls, replicas: 3, ..options(&servers[0]) }).await;
    publish(&bus, 0..1).await;
    for id in 1..40 {
        let published = bus.publish("orders", events([id, id])).await.unwrap();
        let duplicates: Vec<_> = published.iter().map(|published| published.duplicate).collect();
        assert_eq!(duplicates, [false, true]);
        assert_eq!(published[0].position, published[1].position);
    }
}

#[tokio::test]
async fn the_number_of_copies_may_change() {
    let Some(servers) = Server::cluster().await else { return };
    let urls: Vec<String> = servers.iter().map(Server::url).collect();
    let copies = |replicas| NatsOptions { servers: urls.clone(), replicas, ..options(&servers[0]) };
    let js = jetstream::new(async_nats::connect(urls.clone()).await.unwrap());
    let stream = async || js.get_stream("duet_orders").await.unwrap();
    let followers = async || {
        let info = stream().await.consumer_info("a_2Fs").await.unwrap();
        info.cluster.map_or(0, |cluster| cluster.replicas.len())
    };
    let bus = connect(copies(1)).await;
    publish(&bus, 0..1).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    // As an older version made it.
    let mut old = stream().await.consumer_info("a_2Fs").await.unwrap().config;
    old.num_replicas = 1;
    let old = pull::Config::try_from_consumer_config(old).unwrap();
    js.create_consumer_on_stream(old, "duet_orders").await.unwrap();
    bus.close().await;

    // The stream is given its copies first, which takes a moment.
    let bus = connect(copies(3)).await;
    for name in ["a/s", "a/new"] {
        eventually("a subscription is made, or changed", async || {
            bus.ensure_subscription(spec(name)).await.is_ok()
        })
        .await;
    }
    assert_eq!(stream().await.cached_info().config.num_replicas, 3);
    eventually("its consumer has copies", async || followers().await == 2).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    all_come(&mut consumer, ["0".to_owned()].into()).await;
    drop(consumer);
    bus.close().await;

    let bus = connect(copies(1)).await;
    let idle_expiry = Some(std::time::Duration::from_secs(3_600));
    let changed = SubscriptionSpec { idle_expiry, ..spec("a/s") };
    eventually("a subscription is changed", async || {
        bus.ensure_subscription(changed.clone()).await.is_ok()
    })
    .await;
    assert_eq!(stream().await.cached_info().config.num_replicas, 1);
    eventually("its consumer has no copies", async || followers().await == 0).await;
}
