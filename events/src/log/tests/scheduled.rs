//! What is told of events that were published for later.

use super::*;
use crate::bus::{FirstWaiting, SubscriptionStatus};

fn for_later(id: u32, at: &str, now_ms: u64) -> Vec<Prepared> {
    let event = Event::new(id.to_string(), "/test", "t").unwrap();
    let event = event.with_attribute("deliverat", at).unwrap();
    vec![Prepared::new(Entry { event, route: String::new() }, now_ms)]
}

fn status(engine: &mut Engine, now_ms: u64) -> SubscriptionStatus {
    engine.subscription_statuses(now_ms).unwrap().remove(0)
}

/// Lag, what is for later, and since when the oldest waits.
fn told(engine: &mut Engine, now_ms: u64) -> (u64, u64, Option<u64>) {
    let status = status(engine, now_ms);
    assert_eq!(status.waiting(), status.lag + status.scheduled.unwrap());
    (status.lag, status.scheduled.unwrap(), status.oldest_ms)
}

fn consume(engine: &mut Engine) -> mpsc::Receiver<LogDelivery> {
    let (sender, deliveries) = mpsc::channel(64);
    engine.consume(1, &spec(Start::Earliest), false, sender).unwrap();
    deliveries
}

#[test]
fn what_is_for_later_is_no_lag_before_its_time_and_waits_since_then() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    let mut deliveries = consume(&mut engine);
    engine.append("t", for_later(1, "1970-01-01T00:00:05Z", 1_000), 1_000).unwrap();
    engine.append("t", prepared([2], 2_000), 2_000).unwrap();
    engine.commit().unwrap();
    assert_eq!(told(&mut engine, 2_500), (2, 0, Some(1_000)), "nobody has looked at it");
    engine.hand_out(2_500).unwrap();
    assert_eq!(told(&mut engine, 2_500), (1, 1, Some(2_000)));
    let plain = deliveries.try_recv().unwrap();
    engine.settle(1, plain.id, &Settle::Ack, 2_500).unwrap();
    assert_eq!(told(&mut engine, 4_999), (0, 1, None));
    let first = FirstWaiting { position: 1, published_ms: 1_000 };
    assert_eq!(status(&mut engine, 4_999).first, Some(first), "a replay could skip it");
    // It is due, whether or not somebody is there for it.
    assert_eq!(told(&mut engine, 5_000), (1, 0, Some(5_000)));
    engine.hand_out(6_000).unwrap();
    assert_eq!(told(&mut engine, 6_000), (1, 0, Some(5_000)));
    let due = deliveries.try_recv().unwrap();
    let retry = Settle::Retry { delay: Duration::from_secs(1) };
    engine.settle(1, due.id, &retry, 6_000).unwrap();
    assert_eq!(told(&mut engine, 6_500), (1, 0, Some(5_000)));
    engine.commit().unwrap();
    drop(engine);
    let mut engine = super::engine(&dir);
    assert_eq!(told(&mut engine, 7_000), (1, 0, Some(5_000)), "also after a restart");
}

#[test]
fn what_became_due_hides_nothing_that_has_waited_for_longer() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    let mut deliveries = consume(&mut engine);
    engine.append("t", for_later(1, "1970-01-01T00:00:09Z", 1_000), 1_000).unwrap();
    engine.append("t", prepared([2], 2_000), 2_000).unwrap();
    engine.commit().unwrap();
    engine.hand_out(2_000).unwrap();
    engine.hand_out(9_000).unwrap();
    assert_eq!(told(&mut engine, 9_500), (2, 0, Some(2_000)));
    for _ in 0..2 {
        let delivery = deliveries.try_recv().unwrap();
        engine.settle(1, delivery.id, &Settle::Ack, 9_500).unwrap();
    }
    assert_eq!(told(&mut engine, 9_500), (0, 0, None));
}

#[test]
fn what_nobody_has_looked_at_waits_since_its_publication() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    drop(consume(&mut engine));
    engine.close_consumer(1);
    engine.append("t", for_later(1, "1970-01-01T00:00:09Z", 1_000), 1_000).unwrap();
    engine.append("t", prepared([2], 2_000), 2_000).unwrap();
    engine.commit().unwrap();
    assert_eq!(told(&mut engine, 8_999), (2, 0, Some(1_000)));
    assert_eq!(
        told(&mut engine, 9_500),
        (2, 0, Some(1_000)),
        "its time hides not what is behind it"
    );
}
