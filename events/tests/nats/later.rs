//! Events for later, where the server was not asked to keep them: streams of older versions, and other clients.

use std::time::Duration;

use async_nats::jetstream;
use duet_events::Event;
use duet_events::bus::{EventBus as _, ManagedBus as _};

use super::behaviour::{next, nothing, publish, spec};
use super::{Server, connect, options};

/// Not over before everything is in place, also on a busy machine.
fn in_a_while() -> String {
    (jiff::Timestamp::now() + Duration::from_secs(4)).to_string()
}

#[tokio::test]
async fn a_stream_of_an_older_version_learns_to_keep_events_for_later() {
    let Some(server) = Server::start("").await else { return };
    let js = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let old = jetstream::stream::Config {
        name: "duet_orders".to_owned(),
        subjects: vec!["duet.orders".to_owned()],
        max_age: Duration::from_secs(1_000),
        metadata: [("duet-topic".to_owned(), "orders".to_owned())].into(),
        ..Default::default()
    };
    js.create_stream(old).await.unwrap();
    let bus = connect(options(&server)).await;
    let event = Event::new("later", "/test", "t").unwrap();
    let event = event.with_attribute("deliverat", &in_a_while()).unwrap();
    bus.publish("orders", vec![event]).await.unwrap();
    let stream = js.get_stream("duet_orders").await.unwrap();
    let config = &stream.cached_info().config;
    assert!(config.allow_message_schedules, "{config:?}");
    assert_eq!(config.max_age, Duration::from_secs(1_000), "the rest stays");
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    let info = stream.consumer_info("a_2Fs").await.unwrap();
    assert_eq!((info.num_pending, info.num_ack_pending), (0, 0), "nobody has it in hand");
    assert_eq!(next(&mut consumer).await.event.id(), "later");
}

#[tokio::test]
async fn an_event_for_later_of_another_client_waits_too() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    let mut headers = async_nats::HeaderMap::new();
    let due = in_a_while();
    for (name, value) in [
        ("ce-specversion", "1.0"),
        ("ce-id", "later"),
        ("ce-source", "/other"),
        ("ce-type", "t"),
        ("ce-deliverat", due.as_str()),
    ] {
        headers.insert(name, value);
    }
    client.publish_with_headers("duet.orders", headers, "x".into()).await.unwrap();
    client.flush().await.unwrap();
    publish(&*bus, [1]).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next(&mut consumer).await.event.id(), "1");
    nothing(&mut consumer).await;
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.event.id(), delivery.attempt), ("later", 1));
    let due: jiff::Timestamp = due.parse().unwrap();
    assert!(jiff::Timestamp::now() >= due, "not before its time");
}
