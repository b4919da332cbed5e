//! What retention takes, and when.

use super::*;

#[test]
fn retention_takes_old_events_but_none_that_a_subscription_needs() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.ensure_topic("t", &short_lived(), 0).unwrap();
    engine.append("t", prepared(1..=2, 0), 0).unwrap();
    engine.append("t", prepared(3..=4, 90), 90).unwrap();
    engine.commit().unwrap();
    engine.tick(99).unwrap();
    assert_eq!(engine.topics["t"].row().first, 1);
    engine.tick(100).unwrap();
    engine.commit().unwrap();
    assert_eq!(engine.topics["t"].row().first, 3);
    engine.declare(&spec(Start::Earliest)).unwrap();
    engine.commit().unwrap();
    engine.tick(1000).unwrap();
    assert_eq!(engine.topics["t"].row().first, 3, "the subscription has not had them");
    engine.remove("a/s");
    engine.tick(1000).unwrap();
    engine.commit().unwrap();
    assert_eq!((engine.topics["t"].row().first, engine.topics["t"].row().bytes), (5, 0));
    assert_eq!(engine.append("t", prepared([5], 0), 0).unwrap()[0].position, 5);
}

#[test]
fn retention_by_bytes_takes_the_oldest() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    let config = TopicConfig { retention_bytes: Some(200), ..TopicConfig::keep_all() };
    engine.ensure_topic("t", &config, 0).unwrap();
    engine.append("t", prepared(1..=100, 0), 0).unwrap();
    engine.commit().unwrap();
    engine.tick(0).unwrap();
    let row = engine.topics["t"].row();
    assert!(row.bytes <= 200 && row.first > 80 && row.first < 100, "{row:?}");
}

#[test]
fn retention_goes_on_turn_by_turn_until_it_is_through() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.ensure_topic("t", &short_lived(), 0).unwrap();
    let count = u32::try_from(topic::TRIM_STEP).unwrap() * 2 + 10;
    engine.append("t", prepared(1..=count, 0), 0).unwrap();
    engine.commit().unwrap();
    engine.tick(100).unwrap();
    assert_eq!(engine.topics["t"].row().first, topic::TRIM_STEP + 1, "a step, not more");
    for _ in 0..2 {
        assert!(engine.trims_more());
        engine.commit().unwrap();
        engine.trim_on(100).unwrap();
    }
    assert!(!engine.trims_more());
    assert_eq!(engine.topics["t"].row().first, u64::from(count) + 1);
}

#[test]
fn retention_takes_more_than_publishers_bring_meanwhile() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.ensure_topic("t", &short_lived(), 0).unwrap();
    let many = u32::try_from(topic::TRIM_STEP).unwrap() * 3;
    engine.append("t", prepared(1..=many, 0), 0).unwrap();
    engine.commit().unwrap();
    engine.append("t", prepared(0..many / 3 * 2, 100), 100).unwrap();
    engine.tick(100).unwrap();
    assert_eq!(engine.topics["t"].row().first, u64::from(many) + 1);
}

#[tokio::test]
async fn retention_takes_more_than_a_step_between_two_rounds_of_housekeeping() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir).await;
    let steps = 30;
    let count = u32::try_from(topic::TRIM_STEP).unwrap() * steps;
    log.ensure_topic("t", TopicConfig { retention_bytes: Some(0), ..TopicConfig::keep_all() })
        .await
        .unwrap();
    log.append("t", entries(1..=count)).await.unwrap();
    let gone = async {
        while log.topics().await.unwrap()[0].events > 0 {
            tokio::task::yield_now().await;
        }
    };
    // With a step each second it would take thirty.
    timeout(Duration::from_secs(20), gone).await.unwrap();
}

#[test]
fn events_of_the_current_batch_are_not_taken_for_missing() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.append("t", prepared(1..=2, 0), 0).unwrap();
    engine.tick(0).unwrap();
    engine.commit().unwrap();
    assert_eq!(engine.topics["t"].row().first, 1);
}

#[test]
fn retention_leaves_the_deduplication_window_alone() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    let config = TopicConfig { dedup_window: Duration::from_secs(1), ..short_lived() };
    engine.ensure_topic("t", &config, 0).unwrap();
    engine.append("t", prepared([1], 0), 0).unwrap();
    engine.commit().unwrap();
    engine.tick(999).unwrap();
    engine.commit().unwrap();
    assert!(engine.append("t", prepared([1], 999), 999).unwrap()[0].duplicate);
    engine.tick(1001).unwrap();
    engine.commit().unwrap();
    assert!(!engine.append("t", prepared([1], 1001), 1001).unwrap()[0].duplicate);
}

#[test]
fn what_is_removed_and_then_taken_by_retention_in_one_turn_counts_once() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.ensure_topic("t", &short_lived(), 0).unwrap();
    engine.append("t", prepared(1..=2, 0), 0).unwrap();
    let gone = engine.topics["t"].row().bytes;
    engine.append("t", prepared(3..=4, 90), 90).unwrap();
    engine.commit().unwrap();
    let bytes = engine.topics["t"].row().bytes;
    assert_eq!(engine.remove_events("t", vec![1, 2]).unwrap(), 2);
    engine.tick(100).unwrap();
    engine.commit().unwrap();
    let topic = &engine.topics["t"];
    assert_eq!((topic.row().first, topic.row().holes), (3, 0));
    assert_eq!((topic.row().bytes, topic.events()), (bytes - gone, 2));
}

#[test]
fn what_is_redriven_and_then_taken_by_retention_in_one_turn_counts_once() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.append("t", prepared(1..=3, 0), 0).unwrap();
    engine.commit().unwrap();
    consume_all(&mut engine, &Settle::DeadLetter { reason: "no".to_owned(), status: 0 });
    engine.ensure_topic("t.dead-letter", &short_lived(), 0).unwrap();
    assert_eq!(engine.redrive("t.dead-letter", vec![1, 2], 0).unwrap(), 2);
    engine.tick(100).unwrap();
    engine.commit().unwrap();
    let row = engine.topics["t.dead-letter"].row();
    assert_eq!((row.first, row.holes, row.bytes), (4, 0, 0));
    assert_eq!(engine.backlogs()["a/s"].events, 2);
}

#[test]
fn what_cannot_be_read_any_more_is_not_counted_for_ever() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.append("t", prepared(1..=4, 0), 0).unwrap();
    let each = engine.topics["t"].row().bytes / 4;
    let topic = engine.topics.get_mut("t").unwrap();
    // Nobody knows its length any more.
    topic.remove(2, 0, &mut engine.batch);
    assert_eq!(topic.row().bytes, 3 * each);
    for position in [1, 3, 4] {
        topic.remove(position, 0, &mut engine.batch);
    }
    assert_eq!(topic.row().bytes, 0);
}
