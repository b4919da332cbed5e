//! Workloads that make topics and subscriptions without end.

use async_nats::jetstream::{self, stream};
use duet_events::bus::{
    ConsumeError, EventBus as _, ManagedBus as _, PublishErrorKind, SubscriptionSpec, TopicConfig,
};
use futures::stream::{StreamExt as _, iter};

use super::behaviour::{events, publish, spec};
use super::{Server, connect, options};

/// As many as there may be without a resource.
const MOST: usize = 10_000;

#[tokio::test]
async fn beyond_so_many_topics_only_resources_and_dead_letters_make_more() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    bus.ensure_topic("declared", TopicConfig::default()).await.unwrap();
    publish(&*bus, [1]).await;
    let js = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let make = |number: usize| {
        let js = js.clone();
        async move {
            let name = format!("t{number}");
            let config = stream::Config {
                name: format!("duet_{name}"),
                subjects: vec![format!("duet.{name}")],
                storage: stream::StorageType::Memory,
                metadata: [("duet-topic".to_owned(), name)].into(),
                ..stream::Config::default()
            };
            js.create_stream(config).await.unwrap();
        }
    };
    iter(2..=MOST).map(make).buffer_unordered(64).collect::<Vec<()>>().await;
    let error = bus.publish("more", events([1])).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::UnknownTopic, "{error}");
    for (topic, letters) in [("more", "orders.dead-letter"), ("orders", "letters")] {
        let spec = SubscriptionSpec {
            topic: topic.to_owned(),
            dead_letter_topic: letters.to_owned(),
            ..spec("a/s")
        };
        let refused = bus.consume(spec).await;
        assert!(matches!(refused, Err(ConsumeError::Refused { .. })), "{refused:?}");
    }
    // What is there goes on, also where this bus has not met it.
    publish(&*bus, [2]).await;
    bus.publish("t7", events([1])).await.unwrap();
    bus.consume(spec("a/s")).await.unwrap();
    bus.ensure_topic("more", TopicConfig::default()).await.unwrap();
    bus.publish("more", events([1])).await.unwrap();
}
