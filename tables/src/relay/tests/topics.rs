//! A topic that the bus does not take for a while is no reason to hold up the others.

use std::future::ready;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use duet_events::Event;
use duet_events::bus::{
    ConsumeError, Consumer, PublishError, PublishErrorKind, Published, SubscriptionSpec,
};
use futures::future::BoxFuture;

use super::*;

/// A bus on which the topic `full` is full, until it is told otherwise.
#[derive(Debug)]
struct Partly {
    bus: Arc<EmbeddedBus>,
    full: AtomicBool,
    refused: AtomicU32,
}

impl EventBus for Partly {
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        if topic != "full" || !self.full.load(Ordering::Relaxed) {
            return self.bus.publish(topic, events);
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        Box::pin(ready(Err(PublishError::new(PublishErrorKind::Full, "not now"))))
    }

    fn consume(
        &self,
        subscription: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        self.bus.consume(subscription)
    }
}

#[tokio::test]
async fn others_pass_rows_of_a_topic_that_is_not_taken_now() {
    let mut world = World::new(TABLE).await;
    // More than one read holds, and before all others.
    world
        .sql(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000) \
             INSERT INTO outbox SELECT 'f' || i, 'full', 'k', 'x', '{}', NULL FROM n",
        )
        .await;
    world.sql("INSERT INTO outbox VALUES ('1', 't', 'k', 'x', NULL, NULL)").await;
    let (full, refused) = (AtomicBool::new(true), AtomicU32::new(0));
    let bus = Arc::new(Partly { bus: Arc::clone(&world.bus), full, refused });
    let relay = world.start_with(world.spec(|_| ()), Arc::<Partly>::clone(&bus));
    world.has("t", &["1"]).await;
    // It is tried again and again, ever slower, and nobody waits for that.
    while bus.refused.load(Ordering::Relaxed) < 4 {
        sleep(Duration::from_millis(10)).await;
    }
    world.sql("INSERT INTO outbox VALUES ('2', 't', 'k', 'x', NULL, NULL)").await;
    let written = Instant::now();
    world.has("t", &["1", "2"]).await;
    let took = written.elapsed();
    assert!(took < Duration::from_millis(500), "it waited {took:?} for another topic");
    assert!(bus.refused.load(Ordering::Relaxed) < 8, "tried without a pause");
    bus.full.store(false, Ordering::Relaxed);
    world.waits_for("duet_outbox_source_relayed_rows_total", 3002.0).await;
    let expected: Vec<String> = (1..=3000).map(|i| format!("f{i}")).collect();
    assert!(world.ids("full").await == expected, "in their order");
    relay.stop().await;
}
