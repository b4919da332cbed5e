//! Clocks that are set back.

use super::*;

const HOUR: u64 = 3_600_000;

/// What a consumer of an engine gets next, as position and attempt.
fn next(
    engine: &mut Engine,
    deliveries: &mut mpsc::Receiver<LogDelivery>,
    now_ms: u64,
) -> Option<LogDelivery> {
    engine.hand_out(now_ms).unwrap();
    deliveries.try_recv().ok()
}

fn retry(seconds: u64) -> Settle {
    Settle::Retry { delay: Duration::from_secs(seconds) }
}

#[test]
fn a_clock_that_is_set_back_holds_up_no_retry() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.append("t", prepared([1], HOUR), HOUR).unwrap();
    engine.commit().unwrap();
    let (sender, mut deliveries) = mpsc::channel(4);
    engine.consume(1, &spec(Start::Earliest), false, sender).unwrap();
    let first = next(&mut engine, &mut deliveries, HOUR).unwrap();
    engine.settle(1, first.id, &retry(5), HOUR).unwrap();
    engine.clock_set_back(HOUR - 10_000);
    assert!(next(&mut engine, &mut deliveries, 14_999).is_none(), "it still waits its time");
    let again = next(&mut engine, &mut deliveries, 15_000).unwrap();
    assert_eq!((again.position, again.attempt), (1, 2));
}

#[test]
fn a_clock_that_was_set_back_meanwhile_holds_up_no_retry_for_longer_than_its_delay() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("t", prepared(1..=2, HOUR), HOUR).unwrap();
    before.commit().unwrap();
    let (sender, mut deliveries) = mpsc::channel(4);
    before.consume(1, &spec(Start::Earliest), false, sender).unwrap();
    let first = next(&mut before, &mut deliveries, HOUR).unwrap();
    before.settle(1, first.id, &retry(5), HOUR).unwrap();
    let second = deliveries.try_recv().unwrap();
    before.settle(1, second.id, &Settle::Release { delay: Duration::from_secs(7) }, HOUR).unwrap();
    before.commit().unwrap();
    drop(before);
    // Loaded at time 0.
    let mut engine = engine(&dir);
    let (sender, mut deliveries) = mpsc::channel(4);
    engine.consume(1, &spec(Start::Earliest), false, sender).unwrap();
    assert!(next(&mut engine, &mut deliveries, 4_999).is_none());
    let again = next(&mut engine, &mut deliveries, 5_000).unwrap();
    assert_eq!((again.position, again.attempt), (1, 2));
    let again = next(&mut engine, &mut deliveries, 7_000).unwrap();
    assert_eq!((again.position, again.attempt), (2, 1));
}

#[test]
fn what_is_published_for_a_time_waits_for_that_time_unless_it_was_due_before() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    let at = |id: &str, time: &str| {
        let event = Event::new(id, "/test", "t").unwrap();
        let event = event.with_attribute("deliverat", time).unwrap();
        Prepared::new(Entry { event, route: String::new() }, 0)
    };
    let events = vec![at("1", "1970-01-01T01:00:00Z"), at("2", "1970-01-01T02:00:00Z")];
    engine.append("t", events, 0).unwrap();
    engine.commit().unwrap();
    let (sender, mut deliveries) = mpsc::channel(4);
    engine.consume(1, &spec(Start::Earliest), false, sender).unwrap();
    let first = next(&mut engine, &mut deliveries, HOUR).unwrap();
    assert_eq!(first.position, 1);
    engine.settle(1, first.id, &retry(5), HOUR).unwrap();
    engine.clock_set_back(HOUR - 10_000);
    let again = next(&mut engine, &mut deliveries, 15_000).unwrap();
    assert_eq!((again.position, again.attempt), (1, 2));
    assert!(next(&mut engine, &mut deliveries, 2 * HOUR - 1).is_none());
    assert_eq!(next(&mut engine, &mut deliveries, 2 * HOUR).unwrap().position, 2);
}
