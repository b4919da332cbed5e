//! Rows of the store that make no sense: each costs what it is about, and not the log.

use super::*;

/// Writes everything to the tables, and something else in the place of a row.
fn alter<'k, K: redb::Key + 'static>(
    dir: &TempDir,
    mut engine: Engine,
    table: &str,
    key: K::SelfType<'k>,
) {
    engine.commit().unwrap();
    engine.store.settle().unwrap();
    drop(engine);
    let table: TableDefinition<'_, K, &[u8]> = TableDefinition::new(table);
    let database = Database::open(dir.path().join(store::FILE_NAME)).unwrap();
    let write = database.begin_write().unwrap();
    {
        let mut table = write.open_table(table).unwrap();
        // A field that is longer than the row.
        assert!(table.insert(key, [0x0a, 0x7f].as_slice()).unwrap().is_some());
    }
    write.commit().unwrap();
}

/// Positions and attempts that a new consumer gets.
fn deliveries(engine: &mut Engine) -> Vec<(u64, u32)> {
    let (sender, mut deliveries) = mpsc::channel(64);
    engine.consume(1, &spec(Start::Earliest), false, sender).unwrap();
    engine.hand_out(0).unwrap();
    std::iter::from_fn(|| deliveries.try_recv().ok()).map(|d| (d.position, d.attempt)).collect()
}

#[test]
fn a_topic_whose_row_is_lost_begins_anew_and_takes_nothing_of_the_old_one() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("other", prepared([1], 0), 0).unwrap();
    before.append("t", prepared(1..=3, 0), 0).unwrap();
    let old = before.topics["t"].row().id;
    alter::<&str>(&dir, before, "topics", "t");
    let mut engine = engine(&dir);
    assert_eq!(engine.metrics.damaged(), 1);
    assert!(engine.append("other", prepared([1], 0), 0).unwrap()[0].duplicate);
    assert_eq!(engine.append("t", prepared([9], 0), 0).unwrap()[0].position, 1);
    engine.commit().unwrap();
    assert!(engine.topics["t"].row().id > old);
    assert_eq!(deliveries(&mut engine), [(1, 1)]);
}

#[test]
fn a_subscription_whose_row_is_lost_is_declared_anew_and_others_go_on() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("t", prepared(1..=2, 0), 0).unwrap();
    let other = SubscriptionSpec { name: "a/other".to_owned(), ..spec(Start::Earliest) };
    before.declare(&other).unwrap();
    before.declare(&spec(Start::Latest)).unwrap();
    alter::<&str>(&dir, before, "subscriptions", "a/s");
    let mut engine = engine(&dir);
    assert_eq!(engine.metrics.damaged(), 1);
    assert_eq!(engine.backlogs()["a/other"].events, 2);
    assert_eq!(deliveries(&mut engine), [(1, 1), (2, 1)]);
}

#[test]
fn a_subscription_whose_progress_is_lost_gets_everything_again() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("t", prepared(1..=2, 0), 0).unwrap();
    before.commit().unwrap();
    consume_all(&mut before, &Settle::Ack);
    before.append("t", prepared(3..=4, 0), 0).unwrap();
    before.commit().unwrap();
    consume_all(&mut before, &Settle::Retry { delay: Duration::from_secs(9) });
    let (id, epoch) = (before.subscriptions["a/s"].row.id, before.subscriptions["a/s"].row.epoch);
    alter::<u32>(&dir, before, "progress", id);
    let mut reopened = engine(&dir);
    assert_eq!(reopened.metrics.damaged(), 1);
    assert_eq!(reopened.subscriptions["a/s"].row.epoch, epoch, "an inbox knows what it had");
    reopened.commit().unwrap();
    drop(reopened);
    // Rows of attempts would say that what is before them was handled.
    let mut engine = engine(&dir);
    assert_eq!(engine.metrics.damaged(), 0);
    assert_eq!(deliveries(&mut engine), [(1, 1), (2, 1), (3, 1), (4, 1)]);
}

#[test]
fn an_event_whose_attempts_are_lost_is_delivered_again() {
    let dir = TempDir::new().unwrap();
    let mut before = engine(&dir);
    before.append("t", prepared(1..=2, 0), 0).unwrap();
    before.commit().unwrap();
    consume_all(&mut before, &Settle::Retry { delay: Duration::from_secs(9) });
    let id = before.subscriptions["a/s"].row.id;
    alter::<(u32, u64)>(&dir, before, "attempts", (id, 1));
    let mut engine = engine(&dir);
    assert_eq!(engine.metrics.damaged(), 1);
    assert_eq!(deliveries(&mut engine), [(1, 1)], "and the other waits");
}
