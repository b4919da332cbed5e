//! The application changes its table, or its file, while it is relayed.

use super::*;

#[tokio::test]
async fn a_column_that_is_added_counts_from_its_first_row() {
    let mut world =
        World::new("CREATE TABLE outbox (id TEXT, aggregatetype TEXT, type TEXT)").await;
    let relay = world.start(world.spec(|_| ()));
    world.sql("INSERT INTO outbox VALUES ('1', 't', 'x')").await;
    world.has("t", &["1"]).await;
    world
        .sql(
            "BEGIN; ALTER TABLE outbox ADD COLUMN aggregateid TEXT; ALTER TABLE outbox ADD COLUMN payload TEXT; \
             INSERT INTO outbox VALUES ('2', 't', 'x', 'k', '{}'); COMMIT",
        )
        .await;
    world.has("t", &["1", "2"]).await;
    let stored = world.topic("t").await;
    assert_eq!(stored[1].event.attribute("partitionkey"), Some("k"));
    assert_eq!(stored[1].event.data().unwrap(), &b"{}"[..]);
    assert!(world.metric("duet_outbox_source_errors_total") < 0.1);
    relay.stop().await;
}

/// The place of a database that the test makes in WAL mode.
async fn with_wal(file: &Path) -> SqliteConnection {
    let url = format!("sqlite:{}?mode=rwc", file.display());
    let mut app = SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(&format!("PRAGMA journal_mode = WAL; {TABLE}")).execute(&mut app).await.unwrap();
    app
}

#[tokio::test]
async fn the_log_of_a_file_is_not_written_over_the_next_one() {
    let mut world = World::new("PRAGMA journal_mode = WAL; CREATE TABLE other (id TEXT)").await;
    world.sql(TABLE).await;
    world.sql("INSERT INTO outbox VALUES ('1', 't', 'k', 'x', NULL, NULL)").await;
    let relay = world.start(world.spec(|_| ()));
    world.has("t", &["1"]).await;
    world.waits_for("duet_outbox_source_relayed_rows_total", 1.0).await;
    // The application stops. The log stays, as the sidecar has the database open.
    let file = world.folder.path().join("app.db");
    let new = world.folder.path().join("new.db");
    let mut made = with_wal(&new).await;
    let insert = "INSERT INTO outbox VALUES ('2', 't', 'k', 'x', NULL, NULL)";
    sqlx::raw_sql(insert).execute(&mut made).await.unwrap();
    made.close().await.unwrap();
    let memory = SqliteConnection::connect("sqlite::memory:").await.unwrap();
    std::mem::replace(&mut world.app, memory).close().await.unwrap();
    std::fs::rename(&new, &file).unwrap();
    // It says so, and tries again, until somebody removes it.
    let log = |end: &str| world.folder.path().join(format!("app.db-{end}"));
    assert!(log("wal").metadata().unwrap().len() > 0);
    world.waits_for("duet_outbox_source_errors_total", 3.0).await;
    assert_eq!(world.ids("t").await, ["1"]);
    std::fs::remove_file(log("wal")).unwrap();
    std::fs::remove_file(log("shm")).unwrap();
    world.has("t", &["1", "2"]).await;
    relay.stop().await;
}
