//! What the bus has and what the table still has are not the same for ever.

use super::*;

const ROWS: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100) \
    INSERT INTO outbox (id, aggregatetype, type) SELECT i, 't', 'x' FROM n";
const DUPLICATES: &str = "duet_outbox_source_duplicate_rows_total";
const ERRORS: &str = "duet_outbox_source_errors_total";

/// A hundred rows, of which none can be deleted. Publishes the first ones once, and the others when it can.
async fn published_once(trigger: &str) {
    let mut world = World::new(TABLE).await;
    world.sql(ROWS).await;
    world.sql(&format!("CREATE TRIGGER keep BEFORE DELETE ON outbox BEGIN {trigger}; END")).await;
    let relay = world.start(world.spec(|_| ()));
    let mut errors = 0.0;
    for _ in 0..1000 {
        errors = world.metric(ERRORS);
        if errors >= 4.0 {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert!(errors >= 4.0, "only {errors} errors");
    assert_eq!(world.topic("t").await.len(), 64, "the first read, and no more");
    assert!(world.metric(DUPLICATES) < 0.1, "rows were published again");
    assert!(errors < 20.0, "it tries without a pause");
    world.sql("DROP TRIGGER keep").await;
    world.waits_for("duet_outbox_source_relayed_rows_total", 100.0).await;
    assert_eq!(world.topic("t").await.len(), 100);
    assert!(world.metric(DUPLICATES) < 0.1, "rows were published again");
    assert_eq!(world.count("SELECT count(*) FROM outbox").await, 0);
    relay.stop().await;
}

#[tokio::test]
async fn rows_that_a_trigger_keeps_in_silence_are_an_error_and_published_once() {
    published_once("SELECT RAISE(IGNORE)").await;
}

#[tokio::test]
async fn rows_that_cannot_be_deleted_are_published_once() {
    published_once("SELECT RAISE(ABORT, 'not now')").await;
}

#[tokio::test]
async fn rows_that_the_application_removed_meanwhile_are_no_error() {
    let mut world = World::new(TABLE).await;
    // The first DELETE is the relay's: it removes all rows before it can, but the first.
    world.sql(ROWS).await;
    world.sql("CREATE TRIGGER first BEFORE DELETE ON outbox WHEN old.id = '1' BEGIN DELETE FROM outbox WHERE id <> '1'; END").await;
    let relay = world.start(world.spec(|_| ()));
    world.waits_for("duet_outbox_source_relayed_rows_total", 1.0).await;
    world.sql("INSERT INTO outbox (id, aggregatetype, type) VALUES ('new', 't2', 'x')").await;
    world.has("t2", &["new"]).await;
    world.waits_for("duet_outbox_source_relayed_rows_total", 2.0).await;
    assert!(world.metric(ERRORS) < 0.1);
    relay.stop().await;
}

#[tokio::test]
async fn what_is_owed_to_one_file_is_not_deleted_from_another() {
    let mut world = World::new(TABLE).await;
    world
        .sql(
            "CREATE TRIGGER keep BEFORE DELETE ON outbox BEGIN SELECT RAISE(ABORT, 'not now'); END",
        )
        .await;
    world.sql("INSERT INTO outbox (id, aggregatetype, type) VALUES ('1', 't', 'x')").await;
    let relay = world.start(world.spec(|_| ()));
    world.has("t", &["1"]).await;
    let file = world.folder.path().join("app.db");
    let url = format!("sqlite:{}?mode=rwc", file.display());
    let made = SqliteConnection::connect(&url.replace("app.db", "new.db")).await.unwrap();
    std::mem::replace(&mut world.app, made).close().await.unwrap();
    world.sql(TABLE).await;
    // The same place and id, but not the same row: it has another topic.
    world.sql("INSERT INTO outbox (id, aggregatetype, type) VALUES ('1', 't2', 'x')").await;
    std::fs::rename(world.folder.path().join("new.db"), &file).unwrap();
    world.has("t2", &["1"]).await;
    relay.stop().await;
}

#[tokio::test]
async fn what_is_no_longer_known_is_no_longer_said() {
    let mut world = World::new(TABLE).await;
    world
        .sql("INSERT INTO outbox (id, aggregatetype, type) VALUES ('1', 'no no', 'x'), ('2', 'no no', 'x')")
        .await;
    let relay = world.start(world.spec(|_| ()));
    world.waits_for("duet_outbox_source_bad_rows", 2.0).await;
    world.waits_for("duet_outbox_source_waiting_rows", 2.0).await;
    world.sql("ALTER TABLE outbox RENAME TO away").await;
    world.waits_for("duet_outbox_source_bad_rows", 0.0).await;
    world.waits_for("duet_outbox_source_waiting_rows", 0.0).await;
    world.sql("ALTER TABLE away RENAME TO outbox").await;
    world.waits_for("duet_outbox_source_bad_rows", 2.0).await;
    relay.stop().await;
}

#[tokio::test]
async fn rows_without_a_place_are_bad_and_hold_up_no_other() {
    let mut world = World::new(&TABLE.replace(")", ", n)")).await;
    world
        .sql("INSERT INTO outbox (id, aggregatetype, type, n) VALUES ('1', 't', 'x', NULL), ('2', 't', 'x', 7)")
        .await;
    let sequence = |raw: &mut proto::OutboxSource| {
        raw.columns.get_or_insert_default().sequence = "n".to_owned();
    };
    let relay = world.start(world.spec(sequence));
    world.has("t", &["2"]).await;
    world.waits_for("duet_outbox_source_bad_rows", 1.0).await;
    assert!((world.metric(ERRORS) - 1.0).abs() < 0.1);
    world.sql("UPDATE outbox SET n = 8").await;
    world.has("t", &["2", "1"]).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_database_that_does_not_answer_does_not_hold_up_the_end() {
    let mut world = World::new(TABLE).await;
    // Nothing shows that the relay waits for the lock, but how long it takes to leave.
    for wait in [100, 400, 1600].map(Duration::from_millis) {
        let relay = world.start(world.spec(|_| ()));
        world.waits_for("duet_outbox_source_active_replicas", 1.0).await;
        // Nobody else may even read, and the relay waits ten seconds for that.
        let row = "INSERT INTO outbox (id, aggregatetype, type) VALUES ('1', 't', 'x')";
        world.sql(&format!("BEGIN EXCLUSIVE; {row}")).await;
        sleep(wait).await;
        let told = Instant::now();
        relay.stop().await;
        let took = told.elapsed();
        assert!(took < Duration::from_secs(7), "{took:?}");
        if took > Duration::from_secs(2) {
            return;
        }
        world.sql("ROLLBACK").await;
    }
    panic!("the relay never waited for the database");
}

#[test]
fn a_slow_look_is_followed_by_a_longer_pause() {
    let ms = Duration::from_millis;
    assert_eq!(long_enough(ms(50), ms(2)), ms(50));
    assert_eq!(long_enough(ms(50), ms(500)), ms(2000));
}
