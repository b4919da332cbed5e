use std::fs::{Permissions, set_permissions};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use duet_api::proto;
use tempfile::TempDir;

use super::*;

const TABLE: &str = "CREATE TABLE outbox (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id text NOT NULL, \
    type text, aggregateid text, payload jsonb, attributes text)";

/// A server of the test's own; ended when dropped.
struct Server {
    folder: TempDir,
    account: Option<(u32, u32)>,
    port: u16,
}

impl Server {
    /// `None` where there is no PostgreSQL: the test is skipped.
    fn start() -> Option<Self> {
        Self::start_in("UTF8")
    }

    /// The same in another encoding.
    fn start_in(encoding: &str) -> Option<Self> {
        if program("initdb").is_none() {
            eprintln!("SKIPPED: no PostgreSQL");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        // The server refuses to be root, so the folder is its user's.
        let root = folder.path().metadata().unwrap().uid() == 0;
        let account = root.then(account);
        if let Some((user, group)) = account {
            set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
            chown(folder.path(), Some(user), Some(group)).unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Self { folder, account, port };
        let encoding = format!("--encoding={encoding}");
        server.run("initdb", &["--auth=trust", "--username=app", &encoding, "--no-sync"]);
        let options = format!(
            "-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        );
        server.run("pg_ctl", &["start", "--wait", "--log=log", "--options", &options]);
        Some(server)
    }

    fn run(&self, name: &str, arguments: &[&str]) {
        let mut command = Command::new(program(name).unwrap());
        command.args(arguments).arg("--pgdata=data").current_dir(self.folder.path());
        if let Some((user, group)) = self.account {
            command.uid(user).gid(group);
        }
        // A pipe would be inherited by the server, and stay open.
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{name}: {status}");
    }

    fn url(&self, user: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/postgres", self.port)
    }

    async fn app(&self) -> PgConnection {
        PgConnection::connect(&self.url("app")).await.unwrap()
    }

    async fn table(&self, user: &str) -> Result<PostgresTable, String> {
        let url = self.url(user);
        let raw = proto::OutboxSource {
            name: "shop/orders".to_owned(),
            database: Some(proto::outbox_source::Database::Url(url.clone())),
            table: "outbox".to_owned(),
            bus: "default".to_owned(),
            source: "/shop/orders".to_owned(),
            topic: "t".to_owned(),
            ..proto::OutboxSource::default()
        };
        let spec = SourceSpec::try_from(raw).unwrap();
        PostgresTable::connect(&spec, &url).await.map_err(|error| error.to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.run("pg_ctl", &["stop", "--mode=immediate"]);
    }
}

/// Of the newest version that Debian has installed, or of the path.
fn program(name: &str) -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let debian = versions.map(|version| version.path().join("bin").join(name));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = std::env::split_paths(&path).map(|folder| folder.join(name)).collect();
    debian.filter(|file| file.is_file()).max().or(path.into_iter().find(|file| file.is_file()))
}

/// Somebody to be instead of root.
fn account() -> (u32, u32) {
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let of = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2).map(|id| id.parse().unwrap());
        Some((ids.next()?, ids.next()?))
    };
    of("postgres").or_else(|| of("nobody")).unwrap()
}

fn keys(rows: &[Row]) -> Vec<RowKey> {
    rows.iter().map(|row| RowKey { sequence: row.sequence, id: row.id.clone().unwrap() }).collect()
}

fn ids(rows: &[Row]) -> Vec<&str> {
    rows.iter().map(|row| row.id.as_deref().unwrap()).collect()
}

#[tokio::test]
async fn what_could_never_be_settled_is_refused_before_anything_is_published() {
    let Some(server) = Server::start() else { return };
    let mut app = server.app().await;
    app.execute("CREATE ROLE reader LOGIN; CREATE ROLE writer LOGIN").await.unwrap();
    app.execute("CREATE TABLE outbox (seq bigint, id text, type text)").await.unwrap();
    let error = server.table("app").await.unwrap_err();
    assert!(error.contains("ALTER COLUMN \"seq\" SET NOT NULL"), "{error}");
    app.execute("ALTER TABLE outbox ALTER COLUMN seq SET NOT NULL").await.unwrap();
    app.execute("GRANT SELECT ON outbox TO reader").await.unwrap();
    let error = server.table("reader").await.unwrap_err();
    assert!(error.contains("right to delete") && error.contains("permission denied"), "{error}");
    app.execute("GRANT SELECT (seq, id, type), DELETE ON outbox TO writer").await.unwrap();
    app.execute("ALTER TABLE outbox ADD COLUMN secret text").await.unwrap();
    let mut table = server.table("writer").await.unwrap();
    let setting = "SELECT current_setting('tcp_user_timeout')";
    let timeout: String =
        sqlx::query_scalar(setting).fetch_one(&mut table.connection).await.unwrap();
    assert_eq!(timeout, "11000", "of the socket itself");
    app.execute("ALTER ROLE writer SET default_transaction_read_only = on").await.unwrap();
    let error = server.table("writer").await.unwrap_err();
    assert!(error.contains("read-only transaction"), "{error}");
}

#[tokio::test]
async fn a_read_is_bounded_in_bytes() {
    let Some(server) = Server::start() else { return };
    let mut app = server.app().await;
    app.execute(TABLE).await.unwrap();
    app.execute(
        "INSERT INTO outbox (id, type, aggregateid, payload, attributes) \
         SELECT 'large' || i, 'x', 'k', to_jsonb(repeat('x', 1000000)), NULL FROM generate_series(1, 5) AS i; \
         INSERT INTO outbox (id, type, aggregateid, payload, attributes) VALUES \
         ('huge', 'x', 'k', to_jsonb(repeat('x', 5000000)), '{}'), \
         ('long', repeat('x', 70000), 'k', NULL, NULL), ('small', 'x', 'k', '1', NULL)",
    )
    .await
    .unwrap();
    let mut table = server.table("app").await.unwrap();
    let first = table.read(&Excluded::default(), 100).await.unwrap();
    assert!(first.more);
    assert_eq!(ids(&first.rows), ["large1", "large2", "large3"]);
    assert_eq!(first.rows[0].data.as_ref().unwrap().len(), 1_000_002);
    table.settle(&keys(&first.rows)).await.unwrap();
    let second = table.read(&Excluded::default(), 100).await.unwrap();
    assert_eq!(ids(&second.rows), ["large4", "large5", "huge"]);
    let huge = &second.rows[2];
    assert_eq!((huge.cut, &huge.data, huge.key.as_deref()), (true, &None, Some("k")));
    assert!(huge.bytes > 5_000_000);
    table.settle(&keys(&second.rows)).await.unwrap();
    let last = table.read(&Excluded::default(), 100).await.unwrap();
    assert_eq!(ids(&last.rows), ["long", "small"]);
    assert_eq!((last.rows[0].cut, last.rows[1].cut, last.more), (true, false, false));
    assert_eq!(last.rows[1].data.as_deref(), Some(&b"1"[..]));
}

#[tokio::test]
async fn a_column_of_a_domain_is_what_the_domain_is_made_of() {
    let Some(server) = Server::start() else { return };
    let mut app = server.app().await;
    app.execute(
        "CREATE DOMAIN place AS bigint NOT NULL; CREATE DOMAIN body AS bytea; CREATE DOMAIN moment AS timestamptz; \
         CREATE TABLE outbox (seq place NOT NULL UNIQUE, id text, type text, payload body, time moment); \
         INSERT INTO outbox VALUES (1, 'a', 'x', '\\x00ff', '2026-01-01 00:00:00+02')",
    )
    .await
    .unwrap();
    let mut table = server.table("app").await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap().rows;
    assert_eq!(rows[0].data.as_deref(), Some(&[0, 255][..]));
    assert_eq!(rows[0].time.as_deref(), Some("2025-12-31T22:00:00.000000Z"));
    assert_eq!(table.settle(&keys(&rows)).await.unwrap().rows, 1);
}

#[tokio::test]
async fn a_locked_row_holds_up_no_other() {
    let Some(server) = Server::start() else { return };
    let (mut app, mut other) = (server.app().await, server.app().await);
    app.execute(TABLE).await.unwrap();
    let insert = "INSERT INTO outbox (id, type) SELECT i, 'x' FROM generate_series(1, 20) AS i";
    app.execute(insert).await.unwrap();
    other
        .execute("BEGIN; SELECT FROM outbox WHERE id IN ('3', '4', '17') FOR UPDATE")
        .await
        .unwrap();
    let mut table = server.table("app").await.unwrap();
    let rows = keys(&table.read(&Excluded::default(), 100).await.unwrap().rows);
    let settled = table.settle(&rows).await.unwrap();
    let locked: Vec<&str> = settled.locked.iter().map(|row| row.id.as_str()).collect();
    assert_eq!((settled.rows, &locked[..]), (17, &["3", "4", "17"][..]));
    let excluded = Excluded {
        locked: settled.locked.iter().map(|row| row.sequence).collect(),
        ..Excluded::default()
    };
    assert!(table.read(&excluded, 100).await.unwrap().rows.is_empty());
    other.execute("ROLLBACK").await.unwrap();
    assert_eq!(table.settle(&settled.locked).await.unwrap().rows, 3);
    // What keeps a row without an error shows in the number only.
    app.execute(
        "INSERT INTO outbox (id, type) VALUES ('kept', 'x'); \
         CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
         CREATE TRIGGER keep BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION keep()",
    )
    .await
    .unwrap();
    let rows = keys(&table.read(&Excluded::default(), 100).await.unwrap().rows);
    assert_eq!(table.settle(&rows).await.unwrap(), Settled::default());
}

#[tokio::test]
async fn rows_are_found_by_the_order_and_not_sorted() {
    let Some(server) = Server::start() else { return };
    let mut app = server.app().await;
    app.execute(TABLE).await.unwrap();
    app.execute(
        "INSERT INTO outbox (id, type) SELECT i, 'x' FROM generate_series(1, 20000) AS i; ANALYZE outbox",
    )
    .await
    .unwrap();
    let mut table = server.table("app").await.unwrap();
    let plan = format!("EXPLAIN {}", table.sql.read.replace("$1", "64"));
    let plan: Vec<String> =
        sqlx::query_scalar(&plan).fetch_all(&mut table.connection).await.unwrap();
    let plan = plan.join("\n");
    assert!(plan.contains("Index Scan") && !plan.contains("Sort"), "{plan}");
}

#[test]
fn parameters_that_mean_nothing_are_named_without_their_values() {
    let url = "postgres://app:pw@db/app?sslmode=require&sslpassword=secret&options[a]=b&pgbouncer";
    let (known, unknown) = known_parameters(url);
    assert_eq!(known, "postgres://app:pw@db/app?sslmode=require&options[a]=b");
    assert_eq!(unknown, ["sslpassword", "pgbouncer"]);
    assert_eq!(known_parameters("postgres://db?"), ("postgres://db?".to_owned(), Vec::new()));
}

#[tokio::test]
async fn a_table_that_is_made_anew_has_one_leader_and_its_own_columns() {
    let Some(server) = Server::start() else { return };
    let mut app = server.app().await;
    app.execute("CREATE TABLE outbox (seq bigint NOT NULL, id text, type text)").await.unwrap();
    let (mut first, mut second) =
        (server.table("app").await.unwrap(), server.table("app").await.unwrap());
    assert!(first.lead().await.unwrap() && !second.lead().await.unwrap());
    app.execute(
        "ALTER TABLE outbox RENAME TO outbox_before; \
         CREATE TABLE outbox (seq bigint NOT NULL, id text, type text, aggregateid text); \
         INSERT INTO outbox VALUES (1, 'a', 'x', 'k')",
    )
    .await
    .unwrap();
    assert!(!second.lead().await.unwrap(), "the first one relays the new table, too");
    let rows = first.read(&Excluded::default(), 10).await.unwrap().rows;
    assert_eq!(rows[0].key.as_deref(), Some("k"));
    app.execute("ALTER TABLE outbox ADD COLUMN subject text; UPDATE outbox SET subject = 's'")
        .await
        .unwrap();
    let rows = first.read(&Excluded::default(), 10).await.unwrap().rows;
    assert_eq!(rows[0].subject.as_deref(), Some("s"));
    assert_eq!(first.settle(&keys(&rows)).await.unwrap().rows, 1);
}

#[tokio::test]
async fn a_pooler_that_takes_another_connection_is_found_before_anything_is_published() {
    let Some(server) = Server::start() else { return };
    let mut app = server.app().await;
    app.execute(TABLE).await.unwrap();
    let mut table = server.table("app").await.unwrap();
    assert!(table.lead().await.unwrap());
    assert!(table.read(&Excluded::default(), 10).await.unwrap().rows.is_empty());
    app.execute("INSERT INTO outbox (id, type) VALUES ('a', 'x')").await.unwrap();
    // As it does between two transactions.
    table.connection = server.app().await;
    let error = table.read(&Excluded::default(), 10).await.unwrap_err().to_string();
    assert!(error.contains("PgBouncer in transaction mode"), "{error}");
}

#[tokio::test]
async fn a_strict_isolation_of_the_database_is_not_the_relays() {
    let Some(server) = Server::start() else { return };
    let mut app = server.app().await;
    app.execute(TABLE).await.unwrap();
    app.execute("ALTER ROLE app SET default_transaction_isolation = 'serializable'").await.unwrap();
    let mut table = server.table("app").await.unwrap();
    app.execute("INSERT INTO outbox (id, type) VALUES ('a', 'x')").await.unwrap();
    let rows = keys(&table.read(&Excluded::default(), 10).await.unwrap().rows);
    // The application has the row in hand, and leaves it changed while the relay waits for it.
    app.execute("BEGIN; UPDATE outbox SET payload = '1'").await.unwrap();
    let (settled, ()) = tokio::join!(table.settle(&rows), async {
        let mut other = server.app().await;
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        while sqlx::query_scalar::<_, i64>(waits).fetch_one(&mut other).await.unwrap() == 0 {}
        app.execute("COMMIT").await.unwrap();
    });
    assert_eq!(settled.unwrap().rows, 1);
}

#[tokio::test]
async fn text_that_is_not_utf8_is_a_bad_row_and_not_a_bad_table() {
    let Some(server) = Server::start_in("SQL_ASCII") else { return };
    let mut app = server.app().await;
    let table = "CREATE TABLE outbox (seq bigint GENERATED ALWAYS AS IDENTITY, id text, type text, payload text); \
        INSERT INTO outbox (id, type, payload) VALUES ('a', E'\\xff', ''), ('b', 'x', E'\\xff'), ('c', 'ü', 'ü')";
    app.execute(table).await.unwrap();
    let mut table = server.table("app").await.unwrap();
    let rows = table.read(&Excluded::default(), 10).await.unwrap().rows;
    assert_eq!(ids(&rows), ["a", "b", "c"]);
    assert!(rows[0].unreadable && !rows[1].unreadable && !rows[2].unreadable);
    // Data may be any bytes.
    assert_eq!(rows[1].data.as_deref(), Some(&[0xff][..]));
    assert_eq!(rows[2].event_type.as_deref(), Some("ü"));
    assert_eq!(table.settle(&keys(&rows[1..])).await.unwrap().rows, 2);
    assert_eq!(table.waiting(10).await.unwrap(), 1);
}
