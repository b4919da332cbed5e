use duet_api::proto;
use tempfile::TempDir;

use super::*;

/// What connecting to a database with this table says.
async fn connect(table: &str, mark: &str) -> Result<(SqliteTable, TempDir), String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let url = format!("sqlite:{}?mode=rwc", file.display());
    let mut app = SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(table).execute(&mut app).await.unwrap();
    let raw = proto::OutboxSource {
        name: "shop/orders".to_owned(),
        database: Some(proto::outbox_source::Database::Url(url.clone())),
        table: "outbox".to_owned(),
        bus: "default".to_owned(),
        source: "/shop/orders".to_owned(),
        topic: "t".to_owned(),
        mark_column: mark.to_owned(),
        ..proto::OutboxSource::default()
    };
    let spec = SourceSpec::try_from(raw).unwrap();
    let connected = SqliteTable::connect(&spec, &url).await;
    connected.map(|table| (table, folder)).map_err(|error| error.to_string())
}

#[tokio::test]
async fn tables_that_cannot_be_relayed_are_refused() {
    for (table, expected) in [
        ("CREATE TABLE other (id TEXT)", "there is no such table"),
        ("CREATE TABLE outbox (type TEXT)", "it has no column \"id\""),
        (
            "CREATE TABLE outbox (id INTEGER PRIMARY KEY, type TEXT)",
            "INTEGER PRIMARY KEY AUTOINCREMENT",
        ),
        (
            "CREATE TABLE outbox (id TEXT PRIMARY KEY, type TEXT) WITHOUT ROWID",
            "no such column: rowid",
        ),
    ] {
        let error = connect(table, "").await.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let table = "CREATE TABLE outbox (id TEXT, type TEXT)";
    assert!(connect(table, "done").await.unwrap_err().contains("no column \"done\""));
    assert!(connect(table, "").await.is_ok());
    let counted = "CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT)";
    assert!(connect(counted, "").await.is_ok());
}

#[tokio::test]
async fn a_row_in_the_place_of_another_is_not_settled() {
    let table =
        "CREATE TABLE outbox (id, type TEXT); INSERT INTO outbox VALUES ('a', 'x'), (x'0aff', 'x')";
    let (mut table, _folder) = connect(table, "").await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap();
    let keys: Vec<RowKey> = rows
        .iter()
        .map(|row| RowKey { sequence: row.sequence, id: row.id.clone().unwrap() })
        .collect();
    assert_eq!(keys[1].id, "0aff");
    let other = RowKey { sequence: 1, id: "b".to_owned() };
    assert_eq!(table.settle(&[other]).await.unwrap(), 0);
    assert_eq!(table.settle(&keys).await.unwrap(), 2);
    assert_eq!(table.waiting(10).await.unwrap(), 0);
}

#[tokio::test]
async fn text_that_is_not_utf8_is_a_bad_row_and_not_a_bad_table() {
    let table = "CREATE TABLE outbox (id TEXT, type TEXT); INSERT INTO outbox VALUES ('a', CAST(x'ff' AS TEXT)), ('b', 'x')";
    let (mut table, _folder) = connect(table, "").await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap();
    assert!(rows[0].unreadable && !rows[1].unreadable);
}
