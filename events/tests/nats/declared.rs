//! What resources declare, and what consumers ask for without one.

use std::time::Duration;

use duet_events::bus::{ConsumeError, Start, SubscriptionSpec, TopicConfig};

use super::behaviour::{Bus, events, next, publish, spec};

pub(crate) async fn a_declared_subscription_says_so_also_after_a_restart(bus: &Bus) {
    let open = bus.open().await;
    drop(open.consume(spec("a/own")).await.unwrap());
    // Whoever comes first.
    drop(open.consume(spec("a/s")).await.unwrap());
    open.ensure_subscription(spec("a/s")).await.unwrap();
    open.close().await;
    let open = bus.open().await;
    drop(open.consume(spec("a/s")).await.unwrap());
    let told = open.subscriptions().await.unwrap();
    let told: Vec<_> = told.iter().map(|told| (told.name.as_str(), told.declared)).collect();
    assert_eq!(told, [("a/own", false), ("a/s", true)]);
}

pub(crate) async fn each_move_of_a_subscription_is_another_generation_also_after_a_restart(
    bus: &Bus,
) {
    let open = bus.open().await;
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    publish(&*open, [1]).await;
    let mut seen = vec![next(&mut consumer).await];
    for _ in 0..2 {
        open.seek("a/s", Start::Earliest).await.unwrap();
        seen.push(next(&mut consumer).await);
    }
    open.close().await;
    let open = bus.open().await;
    let mut consumer = open.consume(spec("a/s")).await.unwrap();
    // Never acknowledged, so delivered again: of the same generation.
    seen.push(next(&mut consumer).await);
    open.seek("a/s", Start::Earliest).await.unwrap();
    seen.push(next(&mut consumer).await);
    let generations: Vec<u64> = seen.iter().map(|delivery| delivery.generation).collect();
    assert_eq!(generations, [0, 1, 2, 2, 3]);
}

pub(crate) async fn a_topic_that_is_no_longer_declared_is_as_if_it_never_was(bus: &Bus) {
    let open = bus.open().await;
    let off = TopicConfig { dedup_window: Duration::ZERO, ..TopicConfig::default() };
    open.ensure_topic("orders", off).await.unwrap();
    publish(&*open, [1, 1]).await;
    assert_eq!(open.topics().await.unwrap()[0].events, 2, "no window");
    open.close().await;
    let open = bus.open().await;
    assert!(open.topics().await.unwrap()[0].declared);
    open.reset_topic("orders").await.unwrap();
    open.reset_topic("nobody.knows.it").await.unwrap();
    publish(&*open, [2, 2]).await;
    let topics = open.topics().await.unwrap();
    let [topic] = &topics[..] else { panic!("{topics:?}") };
    assert_eq!((topic.declared, topic.events), (false, 3));
}

pub(crate) async fn dead_letters_are_all_kept_also_where_a_subscriber_came_first(bus: &Bus) {
    let bus = bus.open().await;
    let topic = "orders.dead-letter";
    let read = SubscriptionSpec::new("a/read", "default", topic).unwrap();
    bus.ensure_subscription(read).await.unwrap();
    // What keeps everything has no window either.
    bus.publish(topic, events([1])).await.unwrap();
    bus.publish(topic, events([1])).await.unwrap();
    assert_eq!(bus.topics().await.unwrap()[0].events, 2);
}

pub(crate) async fn dead_letters_are_all_kept_also_where_their_topic_is_older(bus: &Bus) {
    let bus = bus.open().await;
    let read = SubscriptionSpec::new("a/read", "default", "poison").unwrap();
    bus.ensure_subscription(read).await.unwrap();
    let dead_letter_topic = "poison".to_owned();
    bus.ensure_subscription(SubscriptionSpec { dead_letter_topic, ..spec("a/s") }).await.unwrap();
    bus.publish("poison", events([1])).await.unwrap();
    bus.publish("poison", events([1])).await.unwrap();
    let topics = bus.topics().await.unwrap();
    let poison = topics.into_iter().find(|topic| topic.name == "poison").unwrap();
    assert_eq!((poison.events, poison.declared), (2, false), "no window");
}

pub(crate) async fn a_consumer_moves_nothing_and_leaves_other_topics_as_they_are(bus: &Bus) {
    let bus = bus.open().await;
    drop(bus.consume(spec("a/s")).await.unwrap());
    publish(&*bus, [1]).await;
    let junk = SubscriptionSpec::new("a/s", "default", "junk").unwrap();
    let moved = bus.consume(junk).await;
    assert!(matches!(moved, Err(ConsumeError::Refused { .. })), "{moved:?}");
    // A topic in use stays as it is, whoever has dead letters there.
    let dead_letter_topic = "orders".to_owned();
    let other = SubscriptionSpec::new("a/other", "default", "other").unwrap();
    drop(bus.consume(SubscriptionSpec { dead_letter_topic, ..other }).await.unwrap());
    assert!(publish(&*bus, [1]).await[0].duplicate);
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next(&mut consumer).await.event.id(), "1");
    let resource = SubscriptionSpec::new("a/s", "default", "elsewhere").unwrap();
    bus.ensure_subscription(resource).await.unwrap();
    let found = bus.subscriptions().await.unwrap().into_iter().find(|it| it.name == "a/s");
    assert_eq!(found.unwrap().topic, "elsewhere");
}
