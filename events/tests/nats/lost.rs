//! Servers whose disks were replaced, and what a bus leaves on them.

use std::time::Duration;

use async_nats::jetstream;
use duet_events::bus::{
    Consumer, EventBus as _, ManagedBus as _, Settle, SubscriptionSpec, TopicConfig,
};
use duet_events::nats::NatsBus;

use super::behaviour::{events, eventually, next, nothing, publish, spec};
use super::{Server, connect, options};

/// Takes events until this one comes.
async fn comes(consumer: &mut Consumer, id: &str) {
    loop {
        let delivery = next(consumer).await;
        consumer.settler().settle(delivery.id, Settle::Ack);
        if delivery.event.id() == id {
            assert_eq!(delivery.attempt, 1, "nobody's fault");
            return;
        }
    }
}

/// How many of a kind were made anew.
fn remade(registry: &prometheus::Registry, kind: &str) -> f64 {
    let families = registry.gather();
    let family = families.iter().filter(|family| family.name() == "duet_bus_nats_remade_total");
    let of_kind = family.flat_map(|family| family.get_metric()).filter(|metric| {
        metric.get_label().iter().any(|label| label.name() == "kind" && label.value() == kind)
    });
    of_kind.map(|one| one.get_counter().get_value()).sum()
}

#[tokio::test]
async fn a_bus_goes_on_by_itself_where_the_servers_lost_everything() {
    let Some(mut server) = Server::start("").await else { return };
    let registry = prometheus::Registry::new();
    let bus = NatsBus::open("default", options(&server), &registry).await.unwrap();
    bus.connected(Duration::from_secs(20)).await.unwrap();
    let age = Some(Duration::from_secs(1_000));
    let config = TopicConfig { retention_age: age, ..TopicConfig::default() };
    bus.ensure_topic("orders", config).await.unwrap();
    let latest = |name| SubscriptionSpec::new(name, "default", "orders").unwrap();
    for name in ["a/waits", "a/declared"] {
        bus.ensure_subscription(latest(name)).await.unwrap();
    }
    let idle_expiry = Some(Duration::from_secs(60));
    let reader = SubscriptionSpec { idle_expiry, ..latest("a/reader") };
    let mut consumers = Vec::new();
    for spec in [latest("a/declared"), latest("a/own"), reader] {
        consumers.push(bus.consume(spec).await.unwrap());
    }
    publish(&bus, [1]).await;
    for consumer in &mut consumers {
        comes(consumer, "1").await;
    }
    bus.pause("a/waits", true).await.unwrap();
    server.kill();
    server.wipe();
    server.restart().await;
    // The first that is acknowledged comes to everybody who was there.
    eventually("it is published", async || bus.publish("orders", events([2])).await.is_ok()).await;
    for consumer in &mut consumers {
        comes(consumer, "2").await;
    }
    let known = async || bus.subscriptions().await.unwrap();
    eventually("they are all there", async || known().await.len() == 4).await;
    let declared = known().await.into_iter().filter(|status| status.declared);
    let declared: Vec<_> = declared.map(|status| status.name).collect();
    assert_eq!(declared, ["a/declared", "a/waits"]);
    let mut waits = bus.consume(latest("a/waits")).await.unwrap();
    nothing(&mut waits).await;
    let paused = known().await.into_iter().filter(|status| status.paused);
    assert_eq!(paused.map(|status| status.name).collect::<Vec<_>>(), ["a/waits"]);
    bus.pause("a/waits", false).await.unwrap();
    comes(&mut waits, "2").await;
    let js = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let stream = js.get_stream("duet_orders").await.unwrap();
    assert_eq!(Some(stream.cached_info().config.max_age), age);
    // Perhaps by two at the same time.
    assert!(remade(&registry, "stream") >= 1.0);
    assert_eq!(remade(&registry, "subscription"), 4.0);
}

#[tokio::test]
async fn two_control_planes_make_each_subscription_anew_once() {
    const SUBSCRIPTIONS: usize = 40;
    let Some(mut server) = Server::start("").await else { return };
    let registries = [(); 2].map(|()| prometheus::Registry::new());
    let open = |registry| NatsBus::open("default", options(&server), registry);
    // Both look at what there is every five seconds, from now on.
    let (one, other) = tokio::join!(open(&registries[0]), open(&registries[1]));
    let buses = [one.unwrap(), other.unwrap()];
    for bus in &buses {
        bus.connected(Duration::from_secs(20)).await.unwrap();
        for number in 0..SUBSCRIPTIONS {
            bus.ensure_subscription(spec(&format!("a/{number}"))).await.unwrap();
        }
    }
    server.kill();
    server.wipe();
    server.restart().await;
    for bus in &buses {
        eventually("they are all there", async || {
            bus.subscriptions().await.is_ok_and(|all| all.len() == SUBSCRIPTIONS)
        })
        .await;
    }
    let all: f64 = registries.iter().map(|registry| remade(registry, "subscription")).sum();
    assert_eq!(all, SUBSCRIPTIONS as f64, "each of one generation");
}

#[tokio::test]
async fn what_was_removed_is_not_made_again() {
    let Some(server) = Server::start("").await else { return };
    let registry = prometheus::Registry::new();
    let bus = NatsBus::open("default", options(&server), &registry).await.unwrap();
    bus.connected(Duration::from_secs(20)).await.unwrap();
    bus.ensure_subscription(spec("a/declared")).await.unwrap();
    bus.consume(spec("a/own")).await.unwrap().finish().await;
    let client = async_nats::connect(server.url()).await.unwrap();
    let stream = jetstream::new(client).get_stream("duet_orders").await.unwrap();
    let waiting = async || stream.consumer_info("a_2Fown").await.unwrap().num_waiting;
    eventually("nobody pulls", async || waiting().await == 0).await;
    bus.remove_subscription("a/declared").await.unwrap();
    // By way of another control plane.
    connect(options(&server)).await.remove_subscription("a/own").await.unwrap();
    bus.ensure_subscription(spec("a/kept")).await.unwrap();
    eventually("the bus has looked at what there is", async || {
        let measured = super::gauge(&registry, "duet_bus_subscription_lag_events");
        measured.iter().any(|(name, _)| name == "a/kept")
    })
    .await;
    let known = bus.subscriptions().await.unwrap();
    assert_eq!(known.into_iter().map(|status| status.name).collect::<Vec<_>>(), ["a/kept"]);
}

#[tokio::test]
async fn the_bucket_of_state_has_no_consumers() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    for number in 0..20 {
        bus.ensure_subscription(spec(&format!("a/{number}"))).await.unwrap();
    }
    let names: Vec<_> =
        bus.subscriptions().await.unwrap().into_iter().map(|status| status.name).collect();
    assert_eq!(names.len(), 20);
    let js = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let bucket = js.get_stream("KV_duet-state").await.unwrap();
    assert_eq!(bucket.cached_info().state.consumer_count, 0);
}
