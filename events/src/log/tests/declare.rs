//! What consumers and publishers may do to topics and subscriptions without a resource.

use super::*;
use crate::log::declare::MOST_UNDECLARED;

fn on(topic: &str, name: &str) -> SubscriptionSpec {
    SubscriptionSpec::new(name, "default", topic).unwrap()
}

fn with_letters(topic: &str, name: &str, letters: &str) -> SubscriptionSpec {
    SubscriptionSpec { dead_letter_topic: letters.to_owned(), ..on(topic, name) }
}

fn is_full<T>(outcome: &Result<T, LogError>) -> bool {
    matches!(outcome, Err(LogError::TooMany(_)))
}

/// Whether a topic has the settings of those that nobody has dead letters in.
fn is_ordinary(engine: &Engine, topic: &str) -> bool {
    let row = engine.topics[topic].row();
    row.dedup_window_ms > 0 && row.retention_age_ms.is_some() && row.retention_bytes.is_some()
}

#[test]
fn a_consumer_moves_no_subscription_and_a_resource_does() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.declare(&on("t", "a/s")).unwrap();
    engine.append("t", prepared([1], 0), 0).unwrap();
    engine.commit().unwrap();
    let error = engine.declare(&on("junk", "a/s")).unwrap_err();
    assert!(error.to_string().contains("it is on topic \"t\""), "{error}");
    assert!(!engine.topics.contains_key("junk"));
    assert_eq!(engine.backlogs()["a/s"].events, 1);
    // A replica's own of a broadcast is moved by its consumer, as the resource says.
    engine.declare(&SubscriptionSpec { declared: true, ..on("u", "a/s") }).unwrap();
    assert_eq!(engine.subscriptions["a/s"].row.topic, "u");
    engine.declare_for_resource(&on("v", "a/s")).unwrap();
    assert_eq!(engine.subscriptions["a/s"].row.topic, "v");
}

#[test]
fn a_consumer_that_names_a_topic_in_use_for_its_dead_letters_changes_nothing_there() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.append("live", prepared([1], 0), 0).unwrap();
    engine.declare(&with_letters("t", "a/s", "live")).unwrap();
    assert!(is_ordinary(&engine, "live"));
    assert!(engine.append("live", prepared([1], 0), 0).unwrap()[0].duplicate);
    engine.declare_for_resource(&with_letters("t", "a/r", "live")).unwrap();
    assert!(!is_ordinary(&engine, "live"), "whoever writes resources may");
}

#[test]
fn dead_letters_of_a_consumer_stay_in_a_topic_that_is_there_for_them() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    engine.declare(&with_letters("t", "a/first", "poison")).unwrap();
    // Whoever reads them may come first.
    engine.declare(&on("read", "a/reader")).unwrap();
    engine.declare(&with_letters("t", "a/second", "read")).unwrap();
    engine.declare(&on("t.dead-letter", "a/third")).unwrap();
    for topic in ["poison", "read", "t.dead-letter"] {
        assert!(!is_ordinary(&engine, topic), "{topic}");
        for _ in 0..2 {
            engine.append(topic, prepared([1], 0), 0).unwrap();
        }
        // And again, now that there are some.
        engine.declare(&with_letters("t", "a/first", topic)).unwrap();
        engine.commit().unwrap();
        engine.tick(u64::MAX / 2).unwrap();
        assert_eq!(engine.topics[topic].events(), 2, "{topic}");
    }
}

#[test]
fn topics_without_a_resource_are_bounded_and_those_that_are_there_go_on() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("t", prepared([1], 0), 0).unwrap();
    for number in 1..MOST_UNDECLARED {
        before.append(&format!("t{number}"), prepared([1], 0), 0).unwrap();
    }
    assert!(is_full(&before.append("more", prepared([1], 0), 0)));
    assert!(is_full(&before.declare(&on("more", "a/s"))));
    assert!(is_full(&before.declare(&with_letters("t", "a/s", "more"))));
    assert!(!before.topics.contains_key("more") && before.subscriptions.is_empty());
    // Resources decide for themselves, and dead letters are never lost for want of a topic.
    before.ensure_topic("declared", &TopicConfig::default(), 0).unwrap();
    before.declare_for_resource(&on("more", "a/r")).unwrap();
    before.declare(&spec(Start::Earliest)).unwrap();
    before.commit().unwrap();
    let dead = Settle::DeadLetter { reason: "no".to_owned(), status: 0 };
    consume_all(&mut before, &dead);
    assert_eq!(before.topics["t.dead-letter"].events(), 1);
    drop(before);
    let mut engine = engine(&dir);
    assert!(engine.topics.len() > MOST_UNDECLARED + 1);
    engine.append("t", prepared([2], 0), 0).unwrap();
    engine.declare(&on("t", "a/new")).unwrap();
    assert!(is_full(&engine.append("others", prepared([1], 0), 0)));
    // What a resource takes over makes room, and what one leaves takes it.
    for number in 1..=3 {
        engine.ensure_topic(&format!("t{number}"), &TopicConfig::default(), 0).unwrap();
    }
    engine.append("others", prepared([1], 0), 0).unwrap();
    engine.reset_topic("t1", 0).unwrap();
    assert!(is_full(&engine.append("last", prepared([1], 0), 0)));
}

#[test]
fn subscriptions_without_a_resource_are_bounded_and_those_that_are_there_go_on() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    for number in 0..MOST_UNDECLARED {
        before.declare(&on("t", &format!("a/{number}"))).unwrap();
    }
    assert!(is_full(&before.declare(&on("t", "a/more"))));
    before.declare(&SubscriptionSpec { declared: true, ..on("t", "a/all@1") }).unwrap();
    before.declare_for_resource(&on("t", "a/r")).unwrap();
    before.commit().unwrap();
    drop(before);
    let mut engine = engine(&dir);
    engine.declare(&on("t", "a/1")).unwrap();
    assert!(is_full(&engine.declare(&on("t", "a/more"))));
    engine.remove("a/all@1");
    engine.remove("a/r");
    assert!(is_full(&engine.declare(&on("t", "a/more"))), "a resource's made no room");
    engine.declare_for_resource(&on("t", "a/1")).unwrap();
    engine.declare(&on("t", "a/more")).unwrap();
}
