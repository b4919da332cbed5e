mod altered;
mod settling;
mod topics;

use std::path::Path;
use std::sync::Arc;

use duet_api::proto;
use duet_events::bus::{ManagedBus, StoredEvent};
use duet_events::embedded::EmbeddedBus;
use duet_events::log::LogOptions;
use prometheus::Registry;
use sqlx::{Connection as _, SqliteConnection};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;

const TABLE: &str = "CREATE TABLE outbox (id TEXT PRIMARY KEY, aggregatetype TEXT, aggregateid TEXT, \
    type TEXT, payload TEXT, attributes TEXT)";

/// A database with a table, and a bus.
struct World {
    folder: TempDir,
    app: SqliteConnection,
    bus: Arc<EmbeddedBus>,
    registry: Registry,
    metrics: SourceMetrics,
}

impl World {
    async fn new(table: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}?mode=rwc", folder.path().join("app.db").display());
        let mut app = SqliteConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(table).execute(&mut app).await.unwrap();
        let registry = Registry::new();
        let options = LogOptions::default();
        let place = folder.path().join("bus");
        let bus = EmbeddedBus::open("default", &place, options, &registry).await.unwrap();
        let bus = Arc::new(bus);
        let metrics = SourceMetrics::register(&registry).unwrap();
        Self { folder, app, bus, registry, metrics }
    }

    async fn sql(&mut self, sql: &str) {
        sqlx::raw_sql(sql).execute(&mut self.app).await.unwrap();
    }

    async fn count(&mut self, sql: &str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&mut self.app).await.unwrap()
    }

    fn spec(&self, change: impl FnOnce(&mut proto::OutboxSource)) -> SourceSpec {
        spec(&self.folder.path().join("app.db"), change)
    }

    fn start(&self, spec: SourceSpec) -> Running {
        self.start_with(spec, Arc::<EmbeddedBus>::clone(&self.bus))
    }

    fn start_with(&self, spec: SourceSpec, bus: Arc<dyn EventBus>) -> Running {
        let stop = CancellationToken::new();
        let relay = Relay::new(spec, bus, self.metrics.clone(), stop.clone());
        Running { task: tokio::spawn(relay.run()), stop }
    }

    async fn topic(&self, topic: &str) -> Vec<StoredEvent> {
        self.bus.read(topic, 1, 100_000).await.unwrap_or_default()
    }

    async fn ids(&self, topic: &str) -> Vec<String> {
        self.topic(topic).await.iter().map(|stored| stored.event.id().to_owned()).collect()
    }

    /// Waits until a topic holds these ids, in this order.
    async fn has(&self, topic: &str, ids: &[&str]) {
        for _ in 0..1000 {
            if self.ids(topic).await == ids {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{topic} has {:?}, not {ids:?}", self.ids(topic).await);
    }

    /// A metric of the source.
    fn metric(&self, name: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name);
        let values = family.into_iter().flat_map(|family| family.get_metric());
        values.map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value()).sum()
    }

    async fn waits_for(&self, name: &str, value: f64) {
        for _ in 0..1000 {
            if (self.metric(name) - value).abs() < 0.1 {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{name} is {}, not {value}", self.metric(name));
    }
}

fn spec(file: &Path, change: impl FnOnce(&mut proto::OutboxSource)) -> SourceSpec {
    let mut raw = proto::OutboxSource {
        name: "shop/orders".to_owned(),
        database: Some(proto::outbox_source::Database::Url(format!("sqlite:{}", file.display()))),
        table: "outbox".to_owned(),
        bus: "default".to_owned(),
        source: "/shop/orders".to_owned(),
        data_content_type: "application/json".to_owned(),
        ..proto::OutboxSource::default()
    };
    change(&mut raw);
    raw.try_into().unwrap()
}

struct Running {
    task: JoinHandle<()>,
    stop: CancellationToken,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

#[tokio::test]
async fn committed_rows_are_published_in_order_and_deleted() {
    let mut world = World::new(TABLE).await;
    let relay = world.start(world.spec(|_| ()));
    world
        .sql("BEGIN; INSERT INTO outbox VALUES ('gone', 'orders', 'k', 'placed', '{}', NULL)")
        .await;
    world.sql("ROLLBACK").await;
    world.sql("BEGIN; INSERT INTO outbox VALUES ('z', 'orders', 'k', 'placed', '{\"n\":1}', '{\"tenant\":\"a\"}')").await;
    world.sql("INSERT INTO outbox VALUES ('a', 'orders', 'k', 'placed', NULL, NULL)").await;
    assert_eq!(world.ids("orders").await, [""; 0], "nothing before the commit");
    world.sql("COMMIT").await;
    world.sql("INSERT INTO outbox VALUES ('m', 'orders', NULL, 'placed', x'00ff', NULL)").await;
    world.has("orders", &["z", "a", "m"]).await;
    let stored = world.topic("orders").await;
    let event = &stored[0].event;
    assert_eq!((event.source(), event.attribute("partitionkey")), ("/shop/orders", Some("k")));
    assert_eq!(
        (event.attribute("tenant"), event.data_content_type()),
        (Some("a"), Some("application/json"))
    );
    assert_eq!(event.data().unwrap(), &b"{\"n\":1}"[..]);
    assert_eq!(stored[1].event.data(), None);
    assert_eq!(stored[2].event.data().unwrap(), &[0, 255][..]);
    world.waits_for("duet_outbox_source_relayed_rows_total", 3.0).await;
    assert_eq!(world.count("SELECT count(*) FROM outbox").await, 0);
    relay.stop().await;
}

#[tokio::test]
async fn rows_are_marked_where_the_resource_says_so() {
    for (kind, done) in [("TEXT", "relayed > '2020'"), ("BOOLEAN NOT NULL DEFAULT 0", "relayed")] {
        let mut world = World::new(&TABLE.replace(")", &format!(", relayed {kind})"))).await;
        world.sql("INSERT INTO outbox (id, aggregatetype, type) VALUES ('1', 't', 'x'), ('2', 't', 'x')").await;
        let relay = world.start(world.spec(|raw| raw.mark_column = "relayed".to_owned()));
        world.has("t", &["1", "2"]).await;
        world.sql("INSERT INTO outbox (id, aggregatetype, type) VALUES ('3', 't', 'x')").await;
        world.has("t", &["1", "2", "3"]).await;
        world.waits_for("duet_outbox_source_relayed_rows_total", 3.0).await;
        assert_eq!(world.count(&format!("SELECT count(*) FROM outbox WHERE {done}")).await, 3);
        relay.stop().await;
    }
}

#[tokio::test]
async fn a_bad_row_stays_and_holds_back_its_own_key_only() {
    let mut world = World::new(TABLE).await;
    world.sql("INSERT INTO outbox VALUES \
        ('1', 't', 'k', 'x', NULL, NULL), ('2', 't', 'k', 'x', NULL, '[1]'), ('3', 't', 'k', 'x', NULL, NULL), \
        ('4', 't', 'other', 'x', NULL, NULL), ('5', 'no no', NULL, 'x', NULL, NULL), ('6', 't', NULL, 'x', NULL, NULL)").await;
    let relay = world.start(world.spec(|_| ()));
    world.has("t", &["1", "4", "6"]).await;
    world.waits_for("duet_outbox_source_bad_rows", 2.0).await;
    world.sql("INSERT INTO outbox VALUES ('7', 't', 'k', 'x', NULL, NULL), ('8', 't', NULL, 'x', NULL, NULL)").await;
    world.has("t", &["1", "4", "6", "8"]).await;
    assert_eq!(world.count("SELECT count(*) FROM outbox").await, 4);
    let errors = world.metric("duet_outbox_source_errors_total");
    assert!((errors - 2.0).abs() < 0.1, "each is counted once: {errors}");
    // Mended, it is published, and what waited for it follows.
    world.sql("UPDATE outbox SET attributes = NULL WHERE id = '2'").await;
    world.has("t", &["1", "4", "6", "8", "2", "3", "7"]).await;
    world.waits_for("duet_outbox_source_bad_rows", 1.0).await;
    relay.stop().await;
}

#[tokio::test]
async fn one_replica_relays_and_the_next_one_takes_over() {
    let mut world = World::new(TABLE).await;
    let first = world.start(world.spec(|_| ()));
    world.sql("INSERT INTO outbox VALUES ('1', 't', 'k', 'x', NULL, NULL)").await;
    world.has("t", &["1"]).await;
    world.waits_for("duet_outbox_source_active_replicas", 1.0).await;
    let metrics = SourceMetrics::register(&Registry::new()).unwrap();
    let stop = CancellationToken::new();
    let bus: Arc<dyn EventBus> = Arc::<EmbeddedBus>::clone(&world.bus);
    let second = Relay::new(world.spec(|_| ()), bus, metrics.clone(), stop.clone());
    let second = Running { task: tokio::spawn(second.run()), stop };
    world.sql("INSERT INTO outbox VALUES ('2', 't', 'k', 'x', NULL, NULL)").await;
    world.has("t", &["1", "2"]).await;
    let relayed =
        |metrics: &SourceMetrics| metrics.relayed.with_label_values(&["shop/orders"]).get();
    assert_eq!(relayed(&metrics), 0);
    first.stop().await;
    world.sql("INSERT INTO outbox VALUES ('3', 't', 'k', 'x', NULL, NULL)").await;
    world.has("t", &["1", "2", "3"]).await;
    while relayed(&metrics) != 1 {
        sleep(Duration::from_millis(10)).await;
    }
    second.stop().await;
}

#[tokio::test]
async fn a_database_that_comes_later_or_is_made_anew_is_found() {
    let mut world = World::new("CREATE TABLE other (id TEXT)").await;
    let relay = world.start(world.spec(|_| ()));
    world.waits_for("duet_outbox_source_errors_total", 1.0).await;
    world.sql(TABLE).await;
    world.sql("INSERT INTO outbox VALUES ('1', 't', 'k', 'x', NULL, NULL)").await;
    world.has("t", &["1"]).await;
    // As when a developer starts anew: nobody writes to the old file any more.
    world.waits_for("duet_outbox_source_relayed_rows_total", 1.0).await;
    let file = world.folder.path().join("app.db");
    let url = format!("sqlite:{}?mode=rwc", file.display());
    std::fs::rename(&file, world.folder.path().join("old.db")).unwrap();
    let new = SqliteConnection::connect(&url).await.unwrap();
    std::mem::replace(&mut world.app, new).close().await.unwrap();
    world.sql(TABLE).await;
    world.sql("INSERT INTO outbox VALUES ('2', 't', 'k', 'x', NULL, NULL)").await;
    world.has("t", &["1", "2"]).await;
    relay.stop().await;
}

#[tokio::test]
async fn what_was_published_before_is_stored_once() {
    let mut world = World::new(TABLE).await;
    world.sql("INSERT INTO outbox VALUES ('1', 't', 'k', 'x', NULL, NULL), ('2', 't', 'k', 'x', NULL, NULL)").await;
    // As a sidecar that died before it could delete the row.
    let event = duet_events::Event::new("1", "/shop/orders", "x").unwrap();
    world.bus.publish("t", vec![event]).await.unwrap();
    let relay = world.start(world.spec(|_| ()));
    world.has("t", &["1", "2"]).await;
    world.waits_for("duet_outbox_source_relayed_rows_total", 2.0).await;
    world.waits_for("duet_outbox_source_duplicate_rows_total", 1.0).await;
    relay.stop().await;
}

#[tokio::test]
async fn many_rows_go_in_order() {
    let mut world = World::new(TABLE).await;
    world
        .sql(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) \
        INSERT INTO outbox SELECT i, 't' || (i % 2), 'k', 'x', '{}', NULL FROM n",
        )
        .await;
    let relay = world.start(world.spec(|_| ()));
    world.waits_for("duet_outbox_source_relayed_rows_total", 5000.0).await;
    for (topic, first) in [("t0", 2), ("t1", 1)] {
        let expected: Vec<String> = (first..=5000).step_by(2).map(|i: i32| i.to_string()).collect();
        assert!(world.ids(topic).await == expected, "{topic}");
    }
    relay.stop().await;
}
