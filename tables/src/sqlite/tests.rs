use std::path::Path;

use duet_api::proto;
use tempfile::TempDir;

use super::*;

/// What connecting to a database with this table says.
async fn connect(table: &str, mark: &str) -> Result<(SqliteTable, TempDir), String> {
    connect_with(table, |raw| raw.mark_column = mark.to_owned()).await
}

async fn connect_with(
    table: &str,
    change: impl FnOnce(&mut proto::OutboxSource),
) -> Result<(SqliteTable, TempDir), String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let url = format!("sqlite:{}?mode=rwc", file.display());
    let mut app = SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(table).execute(&mut app).await.unwrap();
    let spec = spec(&url, change);
    let connected = SqliteTable::connect(&spec, &url, None).await;
    connected.map(|table| (table, folder)).map_err(|error| error.to_string())
}

fn spec(url: &str, change: impl FnOnce(&mut proto::OutboxSource)) -> SourceSpec {
    let mut raw = proto::OutboxSource {
        name: "shop/orders".to_owned(),
        database: Some(proto::outbox_source::Database::Url(url.to_owned())),
        table: "outbox".to_owned(),
        bus: "default".to_owned(),
        source: "/shop/orders".to_owned(),
        topic: "t".to_owned(),
        ..proto::OutboxSource::default()
    };
    change(&mut raw);
    SourceSpec::try_from(raw).unwrap()
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
        ("CREATE TABLE Outbox (id TEXT, type TEXT)", "other letters"),
        (
            "PRAGMA encoding = 'UTF-16'; CREATE TABLE outbox (id TEXT, type TEXT)",
            "its database is UTF-16le, and only UTF-8 is read",
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
    let rows = table.read(&Excluded::default(), 10).await.unwrap().rows;
    let keys: Vec<RowKey> = rows
        .iter()
        .map(|row| RowKey { sequence: row.sequence, id: row.id.clone().unwrap() })
        .collect();
    assert_eq!(keys[1].id, "0aff");
    let other = RowKey { sequence: 1, id: "b".to_owned() };
    assert_eq!(table.settle(&[other]).await.unwrap().rows, 0);
    assert_eq!(table.settle(&keys).await.unwrap().rows, 2);
    assert_eq!(table.waiting(10).await.unwrap(), 0);
}

#[tokio::test]
async fn a_generated_column_is_one() {
    let table = "CREATE TABLE outbox (id TEXT, type TEXT, n, payload AS (json_object('n', n))); \
        INSERT INTO outbox VALUES ('a', 'x', 7)";
    let (mut table, _folder) = connect(table, "").await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap().rows;
    assert_eq!(rows[0].data.as_deref(), Some(&br#"{"n":7}"#[..]));
}

#[tokio::test]
async fn text_that_is_not_utf8_is_a_bad_row_and_not_a_bad_table() {
    let table = "CREATE TABLE outbox (id TEXT, type TEXT); INSERT INTO outbox VALUES ('a', CAST(x'ff' AS TEXT)), ('b', 'x')";
    let (mut table, _folder) = connect(table, "").await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap().rows;
    assert!(rows[0].unreadable && !rows[1].unreadable);
}

#[tokio::test]
async fn a_read_is_bounded_in_bytes() {
    let table = "CREATE TABLE outbox (id TEXT, type TEXT, aggregateid TEXT, payload); \
        INSERT INTO outbox SELECT 'large' || value, 'x', 'k', zeroblob(1000000) FROM json_each('[1,2,3,4,5]'); \
        INSERT INTO outbox VALUES ('huge', 'x', 'k', zeroblob(5000000)), \
        ('long', hex(zeroblob(35000)), 'k', NULL), ('small', 'x', 'k', 1)";
    let (mut table, _folder) = connect(table, "").await.unwrap();
    let mut read = async |before: i64| {
        let excluded = Excluded { rows: (1..=before).collect(), ..Excluded::default() };
        let read = table.read(&excluded, 100).await.unwrap();
        let ids: Vec<String> = read.rows.iter().map(|row| row.id.clone().unwrap()).collect();
        (ids.join(" "), read)
    };
    let (ids, first) = read(0).await;
    assert_eq!((ids.as_str(), first.more), ("large1 large2 large3", true));
    assert_eq!(first.rows[0].data.as_ref().unwrap().len(), 1_000_000);
    let (ids, second) = read(3).await;
    assert_eq!((ids.as_str(), second.more), ("large4 large5 huge", true));
    let huge = &second.rows[2];
    assert_eq!((huge.cut, &huge.data, huge.key.as_deref()), (true, &None, Some("k")));
    assert!(huge.bytes > 5_000_000);
    let (ids, last) = read(6).await;
    assert_eq!((ids.as_str(), last.more), ("long small", false));
    assert_eq!((last.rows[0].cut, last.rows[1].cut), (true, false));
    assert_eq!(last.rows[1].data.as_deref(), Some(&b"1"[..]));
}

#[tokio::test]
async fn rows_without_a_place_are_left_out_and_named() {
    let table = "CREATE TABLE outbox (n, id TEXT, type TEXT); INSERT INTO outbox VALUES \
        (2, 'b', 'x'), (NULL, 'none', 'x'), ('one', 'text', 'x'), (1.5, 'half', 'x'), (1, 'a', 'x')";
    let sequence = |raw: &mut proto::OutboxSource| {
        raw.columns.get_or_insert_default().sequence = "n".to_owned();
    };
    let (mut table, _folder) = connect_with(table, sequence).await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap().rows;
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_deref().unwrap()).collect();
    assert_eq!(ids, ["a", "b"]);
    assert_eq!(table.unplaced(10).await.unwrap(), ["none", "text", "half"]);
}

#[tokio::test]
async fn a_database_that_cannot_be_written_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let url = format!("sqlite:{}?mode=rwc", file.display());
    let mut app = SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("CREATE TABLE outbox (id TEXT, type TEXT)").execute(&mut app).await.unwrap();
    let url = url.replace("mode=rwc", "mode=ro");
    let error =
        SqliteTable::connect(&spec(&url, |_| ()), &url, None).await.unwrap_err().to_string();
    assert!(error.contains("right to delete") && error.contains("readonly"), "{error}");
}

#[tokio::test]
async fn deleting_a_row_deletes_nothing_else() {
    let table = "CREATE TABLE outbox (id TEXT PRIMARY KEY, type TEXT); \
        CREATE TABLE orders (event TEXT REFERENCES outbox (id) ON DELETE CASCADE); \
        INSERT INTO outbox VALUES ('a', 'x'); INSERT INTO orders VALUES ('a')";
    let (mut table, _folder) = connect(table, "").await.unwrap();
    let row = RowKey { sequence: 1, id: "a".to_owned() };
    assert_eq!(table.settle(&[row]).await.unwrap().rows, 1);
    let orders: i64 = sqlx::query_scalar("SELECT count(*) FROM orders")
        .fetch_one(&mut table.connection)
        .await
        .unwrap();
    assert_eq!(orders, 1);
}

fn documentation() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/outbox.md");
    std::fs::read_to_string(page).unwrap()
}

#[tokio::test]
async fn the_table_of_the_documentation_gives_ids_of_its_own() {
    let page = documentation();
    let table = page.split("In SQLite:").nth(1).and_then(|rest| rest.split("```").nth(1)).unwrap();
    let insert = "INSERT INTO outbox (aggregatetype, type) VALUES ('t', 'x'), ('t', 'x')";
    let sql = format!("{}{insert}", table.strip_prefix("sql").unwrap());
    let (mut table, _folder) = connect(&sql, "").await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap().rows;
    let [first, second] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!((first.sequence, second.sequence), (1, 2));
    assert!(first.id.as_ref().unwrap().len() == 32 && first.id != second.id, "{rows:?}");
}

#[tokio::test]
async fn the_indexes_of_the_documentation_are_used() {
    let page = documentation();
    for (index, column) in [
        ("(relayed_at) WHERE relayed_at IS NULL", "relayed_at TEXT"),
        ("(coalesce(done, 0)) WHERE coalesce(done, 0) = 0", "done BOOLEAN"),
    ] {
        let index = format!("CREATE INDEX waiting ON outbox {index}");
        assert!(page.contains(&format!("`{index}`")), "{index}");
        let table = format!("CREATE TABLE outbox (id TEXT, type TEXT, {column}); {index}");
        let mark = column.split(' ').next().unwrap();
        let (mut table, _folder) = connect(&table, mark).await.unwrap();
        let plan = format!("EXPLAIN QUERY PLAN {}", table.sql.read);
        let plan = sqlx::query(&plan).bind(1).fetch_all(&mut table.connection).await.unwrap();
        let steps: Vec<String> = plan.iter().map(|step| step.get("detail")).collect();
        let used = steps.iter().filter(|step| step.contains("INDEX waiting")).count();
        assert_eq!(used, 2, "{steps:?}");
        let sorts = steps.iter().filter(|step| step.contains("B-TREE")).count();
        assert_eq!(sorts, 1, "the sizes of one read: {steps:?}");
    }
}
