//! An application's own outbox table in SQLite: what is committed is published, whatever dies meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use duet_tests::app::{App, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::outbox::{check_order, resources, stored};
use duet_tests::{SOON, eventually, http, metrics};
use sqlx::{Connection as _, Executor as _, SqliteConnection};
use tokio::sync::Mutex;

/// As docs/outbox.md has it, but for the id: numbers, which say whether the order is that of the commits.
const TABLE: &str = "PRAGMA journal_mode = WAL;
CREATE TABLE outbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  aggregatetype TEXT NOT NULL,
  aggregateid TEXT,
  type TEXT NOT NULL,
  payload TEXT
);";

async fn database(file: &Path) -> SqliteConnection {
    let url = format!("sqlite:{}?mode=rwc", file.display());
    SqliteConnection::connect(&url).await.unwrap()
}

async fn waiting(app: &mut SqliteConnection) -> u64 {
    let count: i64 =
        sqlx::query_scalar("SELECT count(*) FROM outbox").fetch_one(app).await.unwrap();
    count.try_into().unwrap()
}

/// A mesh whose service `orders` has this database.
async fn mesh(folder: &Path, more: &str) -> (ControlPlane, Sidecar, SqliteConnection) {
    let file = folder.join("orders.db");
    let mut app = database(&file).await;
    app.execute(TABLE).await.unwrap();
    let yaml = resources(&format!("database: {{url: 'sqlite:{}'}}", file.display()));
    let control_plane = ControlPlane::start(&[("orders.yaml", &format!("{yaml}{more}"))]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("orders")).await;
    (control_plane, sidecar, app)
}

const KILLS: u64 = 20;
/// Rows between two kills; each transaction has a twentieth of them.
const ROWS: u64 = 5000;
const TRANSACTION: u64 = 250;

/// Commits rows, and rolls back others in between.
async fn write(app: Arc<Mutex<SqliteConnection>>, committed: Arc<AtomicU64>) {
    for number in 0..ROWS / TRANSACTION {
        let mut app = app.lock().await;
        let insert = |count: u64| {
            format!(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) \
                 INSERT INTO outbox (aggregatetype, aggregateid, type, payload) \
                 SELECT 'orders', 'c' || (i % 16), 'placed', json_object('n', i) FROM n"
            )
        };
        if number % 4 == 0 {
            app.execute("BEGIN").await.unwrap();
            app.execute(insert(100).replace("'orders'", "'gone'").as_str()).await.unwrap();
            app.execute("ROLLBACK").await.unwrap();
        }
        app.execute("BEGIN").await.unwrap();
        app.execute(insert(TRANSACTION - 1).as_str()).await.unwrap();
        app.execute(insert(1).as_str()).await.unwrap();
        app.execute("COMMIT").await.unwrap();
        committed.fetch_add(TRANSACTION, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn every_committed_row_is_published_and_no_other_while_the_sidecar_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (control_plane, mut sidecar, app) = mesh(folder.path(), "").await;
    let mut watch = database(&folder.path().join("orders.db")).await;
    let app = Arc::new(Mutex::new(app));
    let committed = Arc::new(AtomicU64::new(0));
    let mut killed_in_the_middle = 0;
    for kill in 0..KILLS {
        let writer = tokio::spawn(write(Arc::clone(&app), Arc::clone(&committed)));
        // A different place of each round.
        let until = kill * ROWS + 100 + kill * 211 % (ROWS - 200);
        let started = Instant::now();
        loop {
            // Counted before: a row that is gone was committed.
            let rows = committed.load(Ordering::Relaxed);
            let left = waiting(&mut watch).await;
            if rows.saturating_sub(left) >= until {
                killed_in_the_middle += u32::from(left > 0);
                break;
            }
            assert!(started.elapsed() < SOON, "{left} of {rows} rows wait");
        }
        sidecar.restart().await;
        writer.await.unwrap();
    }
    let watch = Arc::new(Mutex::new(watch));
    eventually("every row is relayed", SOON, || {
        let watch = Arc::clone(&watch);
        async move { (waiting(&mut *watch.lock().await).await == 0).then_some(()) }
    })
    .await;
    assert_eq!(committed.load(Ordering::Relaxed), KILLS * ROWS);
    let found = stored(&control_plane, "orders").await;
    // Ids are the table's own, in the order of commits; a rolled-back one is used again by the next row.
    assert_eq!(found.len() as u64, KILLS * ROWS);
    check_order(&found);
    assert!(stored(&control_plane, "gone").await.is_empty(), "a rolled-back row was published");
    assert!(killed_in_the_middle >= 10, "{killed_in_the_middle} kills only while rows waited");
}

#[tokio::test]
async fn a_row_reaches_the_subscriber_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let arrived = Arc::new(std::sync::Mutex::new(Vec::new()));
    let reader = App::replying({
        let arrived = Arc::clone(&arrived);
        move |asked| {
            if asked.path == "/orders" {
                arrived.lock().unwrap().push((asked.json()["id"].clone(), Instant::now()));
            }
            Reply::new(if asked.path == "/dapr/subscribe" { 404 } else { 200 }, "")
        }
    })
    .await;
    let more = "---\napiVersion: v1\nkind: Service\nmetadata: {name: reader}\nspec: {ports: [{port: 80, targetPort: http}]}\n\
                ---\napiVersion: duet.dev/v1alpha1\nkind: Subscription\nmetadata: {name: read}\n\
                spec: {topic: orders, subscriber: {service: reader, path: /orders}}\n";
    let (control_plane, _sidecar, mut app) = mesh(folder.path(), more).await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", reader.port())).await;
    let mut latencies = Vec::new();
    for number in 1..=20 {
        let sql = "INSERT INTO outbox (aggregatetype, aggregateid, type, payload) VALUES ('orders', 'c', 'placed', '{}')";
        app.execute(sql).await.unwrap();
        let committed = Instant::now();
        let at = eventually("the event arrives", SOON, || async {
            let arrived = arrived.lock().unwrap();
            let found = arrived.iter().find(|(id, _)| id == &number.to_string());
            found.map(|(_, at)| *at)
        })
        .await;
        latencies.push(at.saturating_duration_since(committed));
    }
    latencies.sort();
    let median = latencies[latencies.len() / 2];
    eprintln!("from commit to application: median {median:?}, worst {:?}", latencies.last());
    // It is some 40 ms; the bound is for machines that do ten other things.
    assert!(median < Duration::from_secs(1), "{latencies:?}");
}

#[tokio::test]
async fn a_topic_that_is_denied_holds_up_its_own_rows_only() {
    let folder = tempfile::tempdir().unwrap();
    let (control_plane, mut sidecar, app) = mesh(folder.path(), "").await;
    let policy = "apiVersion: duet.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: secret}\n\
                  spec: {targetRefs: [{kind: Topic, name: secret}], action: Deny, rules: [{}]}\n";
    control_plane.write("policy.yaml", policy);
    let denied =
        |text: &str| text.contains("duet_config_resources{kind=\"AuthorizationPolicy\"} 1");
    eventually("the policy applies", SOON, || async {
        denied(&http::text(control_plane.admin, "/metrics").await).then_some(())
    })
    .await;
    let app = Arc::new(Mutex::new(app));
    let insert = |topic: &'static str| {
        let app = Arc::clone(&app);
        async move {
            let sql =
                "INSERT INTO outbox (aggregatetype, aggregateid, type) VALUES ($1, 'c', 'placed')";
            sqlx::query(sql).bind(topic).execute(&mut *app.lock().await).await.unwrap();
        }
    };
    let left = |rows: u64| {
        let app = Arc::clone(&app);
        async move { (waiting(&mut *app.lock().await).await == rows).then_some(()) }
    };
    for topic in ["open", "secret", "open"] {
        insert(topic).await;
    }
    eventually("the open topic has its rows", SOON, || left(1)).await;
    assert_eq!(stored(&control_plane, "open").await.len(), 2);
    // A rolling update lets go of the table, and takes it up again.
    sidecar.leave();
    sidecar.gone().await;
    sidecar.restart().await;
    insert("open").await;
    eventually("rows of the open topic go on", SOON, || left(1)).await;
    assert!(
        sidecar.process.log().contains("rows wait for their topic"),
        "{}",
        sidecar.process.log()
    );
    std::fs::remove_file(control_plane.folder.path().join("config/policy.yaml")).unwrap();
    eventually("the row follows once it may", SOON, || left(0)).await;
    assert_eq!(stored(&control_plane, "secret").await.len(), 1);
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let page = std::fs::read_to_string(page).unwrap();
    let text = http::text(sidecar.ports.metrics, "/metrics").await;
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE duet_outbox_source_"));
    let names: Vec<&str> = families.filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(names.len(), 6, "{names:?}");
    for name in names {
        assert!(
            page.contains(&format!("`duet_outbox_source_{name}`")),
            "{name} is not in the page"
        );
    }
}

#[tokio::test]
async fn rows_wait_while_the_bus_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let (mut control_plane, sidecar, mut app) = mesh(folder.path(), "").await;
    let insert =
        "INSERT INTO outbox (aggregatetype, aggregateid, type) VALUES ('orders', 'c', 'placed')";
    app.execute(insert).await.unwrap();
    let app = Arc::new(Mutex::new(app));
    let empty = || {
        let app = Arc::clone(&app);
        async move { (waiting(&mut *app.lock().await).await == 0).then_some(()) }
    };
    eventually("the first row is relayed", SOON, empty).await;
    control_plane.kill();
    for _ in 0..3 {
        app.lock().await.execute(insert).await.unwrap();
    }
    let metrics_address = sidecar.ports.metrics;
    eventually("the sidecar says that the bus is away", SOON, || async move {
        let errors =
            metrics::sum(metrics_address, "duet_outbox_source_errors_total", &[("reason", "bus")]);
        (errors.await > 0.0).then_some(())
    })
    .await;
    assert_eq!(waiting(&mut *app.lock().await).await, 3, "the table keeps them, not the sidecar");
    control_plane.restart().await;
    eventually("the others follow", SOON, empty).await;
    let found = stored(&control_plane, "orders").await;
    assert_eq!(found.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["1", "2", "3", "4"]);
}
