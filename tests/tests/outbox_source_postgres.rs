//! An application's own outbox table in PostgreSQL: concurrent transactions, several replicas, connections that break.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::outbox::{resources, stored};
use duet_tests::postgres::Postgres;
use duet_tests::{SOON, eventually, http, metrics};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};

/// As docs/outbox.md has it, but for the id, and what the application writes besides.
const TABLES: &str = "
CREATE TABLE customers (key text PRIMARY KEY, orders bigint NOT NULL);
INSERT INTO customers SELECT 'c' || i, 0 FROM generate_series(0, 7) AS i;
CREATE TABLE outbox (
  seq           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  id            text NOT NULL,
  aggregatetype text NOT NULL,
  aggregateid   text,
  type          text NOT NULL,
  payload       jsonb
)";

async fn ids(control_plane: &ControlPlane, topic: &str) -> Vec<String> {
    stored(control_plane, topic).await.into_iter().map(|(id, _)| id).collect()
}

async fn has(control_plane: &ControlPlane, topic: &str, expected: &[&str]) {
    eventually(&format!("{topic} has {expected:?}"), SOON, || async {
        (ids(control_plane, topic).await == expected).then_some(())
    })
    .await;
}

async fn is_empty(url: &str) -> Option<()> {
    let mut app = PgConnection::connect(url).await.unwrap();
    let count: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox").fetch_one(&mut app).await.unwrap();
    app.close().await.unwrap();
    (count == 0).then_some(())
}

/// A mesh whose service `orders` has this database, its URL in a file, over TLS.
async fn mesh(folder: &Path, postgres: &Postgres, more: &str) -> ControlPlane {
    let file = folder.join("url");
    std::fs::write(&file, postgres.tls_url.replace("app@", "app:secret@")).unwrap();
    let yaml = resources(&format!("database: {{urlFrom: {{file: {}}}}}{more}", file.display()));
    ControlPlane::start(&[("orders.yaml", &yaml)]).await
}

/// Which of the replicas relays, once one of them does.
async fn leader(replicas: &[Sidecar]) -> usize {
    eventually("one replica relays", SOON, || async {
        let mut leaders = Vec::new();
        for (number, replica) in replicas.iter().enumerate() {
            let name = "duet_outbox_source_active_replicas";
            if metrics::sum(replica.ports.metrics, name, &[]).await > 0.0 {
                leaders.push(number);
            }
        }
        assert!(leaders.len() < 2, "two replicas relay");
        leaders.first().copied()
    })
    .await
}

#[tokio::test]
async fn a_transaction_that_commits_late_is_not_passed_over() {
    let Some(postgres) = Postgres::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let (mut first, mut second) = (postgres.connect().await, postgres.connect().await);
    first.execute(TABLES).await.unwrap();
    let control_plane = mesh(folder.path(), &postgres, "").await;
    let _sidecar = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let insert = |id: &str| {
        format!("INSERT INTO outbox (id, aggregatetype, type) VALUES ('{id}', 'orders', 'placed')")
    };
    first.execute("BEGIN").await.unwrap();
    first.execute(insert("early").as_str()).await.unwrap();
    second.execute(insert("late").as_str()).await.unwrap();
    has(&control_plane, "orders", &["late"]).await;
    second.execute("BEGIN").await.unwrap();
    second.execute(insert("never").as_str()).await.unwrap();
    second.execute("ROLLBACK").await.unwrap();
    first.execute("COMMIT").await.unwrap();
    second.execute(insert("last").as_str()).await.unwrap();
    eventually("the table is empty", SOON, || is_empty(&postgres.url)).await;
    assert_eq!(ids(&control_plane, "orders").await, ["late", "early", "last"]);
}

const WRITERS: u64 = 6;

/// Changes customers until it is told to stop, each time with an event that says how many orders that makes. Some are
/// rolled back.
async fn write(url: String, writer: u64, stop: Arc<AtomicBool>) {
    let mut app = PgConnection::connect(&url).await.unwrap();
    for number in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (one, other) = ((writer + number) % 8, (writer * 3 + number) % 8);
        // In one order, so that nobody waits for somebody who waits for him.
        let keys = if one == other { vec![one] } else { vec![one.min(other), one.max(other)] };
        app.execute("BEGIN").await.unwrap();
        for key in keys {
            let sql = "WITH changed AS (UPDATE customers SET orders = orders + 1 WHERE key = $1 RETURNING key, orders) \
                       INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload) \
                       SELECT key || '-' || orders, 'orders', key, 'placed', '{}' FROM changed";
            sqlx::query(sql).bind(format!("c{key}")).execute(&mut app).await.unwrap();
        }
        let end = if number % 7 == 0 { "ROLLBACK" } else { "COMMIT" };
        app.execute(end).await.unwrap();
    }
    app.close().await.unwrap();
}

#[tokio::test]
async fn replicas_take_over_from_each_other_and_keep_each_keys_order() {
    let Some(postgres) = Postgres::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut app = postgres.connect().await;
    app.execute(TABLES).await.unwrap();
    let control_plane = mesh(folder.path(), &postgres, "").await;
    let mut replicas = Vec::new();
    for instance in ["orders-1", "orders-2"] {
        let options = Options::client("orders").instance(instance);
        replicas.push(Sidecar::ready(&control_plane, options).await);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let write = |writer| tokio::spawn(write(postgres.url.clone(), writer, Arc::clone(&stop)));
    let writers: Vec<_> = (0..WRITERS).map(write).collect();
    for _ in 0..3 {
        let first = leader(&replicas).await;
        replicas[first].process.kill();
        let second = 1 - first;
        assert_eq!(leader(&replicas[second..=second]).await, 0, "the other one takes over");
        replicas[first].restart().await;
        replicas[first].wait_ready().await;
    }
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'duet %'";
    let cut: i64 = sqlx::query_scalar(sql).fetch_one(&mut app).await.unwrap();
    assert!(cut >= 1, "nobody was connected");
    leader(&replicas).await;
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    eventually("the table is empty", SOON, || is_empty(&postgres.url)).await;
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    for (id, key) in stored(&control_plane, "orders").await {
        let number: u64 = id.rsplit('-').next().unwrap().parse().unwrap();
        let before = seen.insert(key.clone(), number).unwrap_or(0);
        assert_eq!(number, before + 1, "of {key}");
    }
    let customers: Vec<(String, i64)> =
        sqlx::query_as("SELECT key, orders FROM customers ORDER BY key")
            .fetch_all(&mut app)
            .await
            .unwrap();
    let expected = customers.into_iter().map(|(key, orders)| (key, orders.try_into().unwrap()));
    assert_eq!(seen, expected.collect(), "every committed change has its event");
    eprintln!("{} events", seen.values().sum::<u64>());
}

#[tokio::test]
async fn a_table_of_any_types_is_marked() {
    let Some(postgres) = Postgres::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut app = postgres.connect().await;
    let table = "CREATE SCHEMA \"Shop\";
        CREATE TABLE \"Shop\".events (seq serial PRIMARY KEY, id uuid, body bytea, happened timestamptz,
            subject varchar(10), attributes jsonb, done timestamptz);
        INSERT INTO \"Shop\".events (id, body, happened, subject, attributes) VALUES
            ('0190c0de-0000-7000-8000-000000000001', '\\x00ff', '2026-01-31T12:00:00+02', 'a', '{\"tenant\": \"t\"}'),
            (NULL, NULL, NULL, NULL, NULL),
            ('0190c0de-0000-7000-8000-000000000003', 'x', NULL, NULL, '{\"tenant\": 3}')";
    app.execute(table).await.unwrap();
    let more = ", table: Shop.events, topic: things, type: happened, dataContentType: text/plain, \
                columns: {data: body, time: happened}, afterRelay: {mark: done}";
    let control_plane = mesh(folder.path(), &postgres, more).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let id = |number: u32| format!("0190c0de-0000-7000-8000-{number:012}");
    has(&control_plane, "things", &[&id(1), &id(3)]).await;
    app.execute(format!("INSERT INTO \"Shop\".events (id) VALUES ('{}')", id(4)).as_str())
        .await
        .unwrap();
    has(&control_plane, "things", &[&id(1), &id(3), &id(4)]).await;
    let sql = "SELECT count(*) FROM \"Shop\".events WHERE done > now() - interval '1 hour'";
    eventually("three rows are marked", SOON, || async {
        let mut app = postgres.connect().await;
        let marked: i64 = sqlx::query_scalar(sql).fetch_one(&mut app).await.unwrap();
        (marked == 3).then_some(())
    })
    .await;
    let bad = metrics::sum(sidecar.ports.metrics, "duet_outbox_source_bad_rows", &[]).await;
    assert!((bad - 1.0).abs() < 0.1, "the row without an id: {bad}");
    let url = format!(
        "http://{}/v1/events?bus=default&topic=things&from=0&limit=1",
        control_plane.operator
    );
    let answer = http::client().get(url).header("duet-operator", "test").send().await.unwrap();
    let answer: Value = answer.json().await.unwrap();
    let event = &answer["events"][0]["event"];
    assert_eq!(event["source"], "/default/orders");
    assert_eq!(event["time"], "2026-01-31T10:00:00.000000Z");
    assert_eq!((&event["subject"], &event["tenant"]), (&json!("a"), &json!("t")));
    assert_eq!((&event["type"], &event["data_base64"]), (&json!("happened"), &json!("AP8=")));
}

#[tokio::test]
async fn what_is_wrong_with_a_table_is_said_once_and_mended_at_run_time() {
    let Some(postgres) = Postgres::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut app = postgres.connect().await;
    app.execute("CREATE TABLE outbox (id text, aggregatetype text, type text)").await.unwrap();
    app.execute("INSERT INTO outbox VALUES ('1', 'orders', 'placed')").await.unwrap();
    let control_plane = mesh(folder.path(), &postgres, "").await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let errors = || async {
        let (name, labels) = ("duet_outbox_source_errors_total", [("reason", "database")]);
        (metrics::sum(sidecar.ports.metrics, name, &labels).await >= 3.0).then_some(())
    };
    eventually("it was tried three times", SOON, errors).await;
    let log = sidecar.process.log();
    let said: Vec<&str> =
        log.lines().filter(|line| line.contains("has no column \"seq\"")).collect();
    assert!(said.len() == 1 && said[0].contains("GENERATED ALWAYS AS IDENTITY UNIQUE"), "{log}");
    assert!(!log.contains("secret"), "{log}");
    app.execute("ALTER TABLE outbox ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE")
        .await
        .unwrap();
    has(&control_plane, "orders", &["1"]).await;
}

#[tokio::test]
async fn rows_that_cannot_be_deleted_yet_are_published_once_and_hold_up_no_other() {
    let Some(postgres) = Postgres::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let (mut app, mut other) = (postgres.connect().await, postgres.connect().await);
    app.execute(TABLES).await.unwrap();
    let insert = "INSERT INTO outbox (id, aggregatetype, type) VALUES ";
    let rows = format!("{insert} ('a', 'orders', 'placed'), ('b', 'orders', 'placed')");
    app.execute(rows.as_str()).await.unwrap();
    other.execute("BEGIN; SELECT FROM outbox WHERE id = 'a' FOR UPDATE").await.unwrap();
    let control_plane = mesh(folder.path(), &postgres, "").await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let metric = async |name: &str| metrics::sum(sidecar.ports.metrics, name, &[]).await;
    let relayed = async |rows: f64| {
        eventually(&format!("{rows} rows are relayed"), SOON, async || {
            let relayed = metric("duet_outbox_source_relayed_rows_total").await;
            (relayed >= rows).then_some(())
        })
        .await;
    };
    relayed(1.0).await;
    app.execute(format!("{insert} ('c', 'orders', 'placed')").as_str()).await.unwrap();
    relayed(2.0).await;
    other.execute("ROLLBACK").await.unwrap();
    eventually("the table is empty", SOON, || is_empty(&postgres.url)).await;
    let trigger =
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER keep BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION keep()";
    app.execute(trigger).await.unwrap();
    app.execute(format!("{insert} ('d', 'orders', 'placed')").as_str()).await.unwrap();
    eventually("the sidecar says what may be wrong", SOON, async || {
        sidecar.process.log().contains("row-level security").then_some(())
    })
    .await;
    app.execute("DROP TRIGGER keep ON outbox").await.unwrap();
    eventually("the table is empty", SOON, || is_empty(&postgres.url)).await;
    assert_eq!(ids(&control_plane, "orders").await, ["a", "b", "c", "d"]);
    assert!(metric("duet_outbox_source_duplicate_rows_total").await < 0.1, "published twice");
}
