//! A table in PostgreSQL.
//!
//! A sequence is not the order of commits: of two transactions that run at once, the one that inserted first may commit
//! last. So no position is kept; every read takes whatever is there by then, in the order of the sequence. A row that
//! was inserted after another one was committed has a larger sequence, and whoever sees it sees the other one too: it
//! always follows.

use std::str::FromStr as _;

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{ConnectOptions as _, Connection as _, Executor as _, PgConnection, Row as _};

use crate::columns::{Columns, quoted, quoted_table};
use crate::excluded::Excluded;
use crate::row::{Row, RowKey};
use crate::spec::{SourceError, SourceSpec};

/// What to do about a table without a sequence.
const ADVICE: &str = "ALTER TABLE … ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY adds one";
/// A row that the application has locked must not hold up the others for ever; and a server should notice soon that
/// the machine of whoever relays is gone, since it holds the lock for that connection.
const SESSION: &str = "SET lock_timeout = '5s'; SET statement_timeout = '25s'; \
    SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3";

#[derive(Debug)]
pub(crate) struct PostgresTable {
    connection: PgConnection,
    table: String,
    leads: bool,
    sql: Sql,
}

impl PostgresTable {
    pub(crate) async fn connect(spec: &SourceSpec, url: &str) -> Result<Self, SourceError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|error| SourceError::Settings(format!("the database's URL: {error}")))?
            .application_name(&format!("duet {}", spec.name))
            .disable_statement_logging();
        let mut connection = PgConnection::connect_with(&options)
            .await
            .map_err(SourceError::database("connecting"))?;
        connection.execute(SESSION).await.map_err(SourceError::database("setting timeouts"))?;
        let sql = Sql::new(spec, &mut connection).await?;
        let table = quoted_table(&spec.table);
        let mut table = Self { connection, table, leads: false, sql };
        // What is wrong with the table shows here, and not at the first row.
        table.read(&Excluded::default(), 0).await?;
        Ok(table)
    }

    /// A lock of the connection: it goes with it, however that ends.
    pub(crate) async fn lead(&mut self) -> Result<bool, SourceError> {
        if !self.leads {
            let sql = "SELECT pg_try_advisory_lock(\
                       hashtextextended('duet outbox ' || $1::text::regclass::oid, 0))";
            let lead = sqlx::query_scalar(sql).bind(&self.table);
            let lead = lead.fetch_one(&mut self.connection).await;
            self.leads = lead.map_err(SourceError::database("taking the lock"))?;
        }
        Ok(self.leads)
    }

    pub(crate) async fn read(
        &mut self,
        excluded: &Excluded,
        limit: u32,
    ) -> Result<Vec<Row>, SourceError> {
        let sql = match excluded.is_empty() {
            true => &self.sql.read,
            false => &self.sql.read_others,
        };
        let mut query = sqlx::query(sql).bind(i64::from(limit));
        if !excluded.is_empty() {
            query = query.bind(excluded.rows.iter().copied().collect::<Vec<i64>>());
            for list in [&excluded.keys, &excluded.topics] {
                query = query.bind(list.iter().cloned().collect::<Vec<String>>());
            }
        }
        let rows = query.fetch_all(&mut self.connection).await;
        let rows = rows.map_err(SourceError::database("reading rows"))?;
        rows.iter().map(row).collect()
    }

    pub(crate) async fn settle(&mut self, rows: &[RowKey]) -> Result<u64, SourceError> {
        let sequences: Vec<i64> = rows.iter().map(|row| row.sequence).collect();
        let ids: Vec<String> = rows.iter().map(|row| row.id.clone()).collect();
        let settled = sqlx::query(&self.sql.settle)
            .bind(sequences)
            .bind(ids)
            .execute(&mut self.connection)
            .await
            .map_err(SourceError::database("settling rows"))?;
        Ok(settled.rows_affected())
    }

    pub(crate) async fn waiting(&mut self, bound: u32) -> Result<i64, SourceError> {
        let count = sqlx::query_scalar(&self.sql.waiting).bind(i64::from(bound));
        let count = count.fetch_one(&mut self.connection).await;
        count.map_err(SourceError::database("counting rows"))
    }

    pub(crate) async fn close(self) {
        self.connection.close().await.unwrap_or_default();
    }
}

fn row(raw: &PgRow) -> Result<Row, SourceError> {
    let failed = SourceError::database("reading a row");
    let sequence = raw.try_get(0).map_err(&failed)?;
    let mut texts = [const { Ok(None) }; 11];
    for (number, text) in texts.iter_mut().enumerate() {
        *text = Ok(raw.try_get(number + 1).map_err(&failed)?);
    }
    let data = raw.try_get(12).map_err(&failed)?;
    Ok(Row::new(sequence, texts, data))
}

/// The statements for one table.
#[derive(Debug)]
struct Sql {
    /// Takes the limit.
    read: String,
    /// Takes the limit, and arrays of sequences, keys and topics that are left out.
    read_others: String,
    /// Takes arrays of sequences and ids.
    settle: String,
    /// Takes the bound.
    waiting: String,
}

impl Sql {
    async fn new(spec: &SourceSpec, connection: &mut PgConnection) -> Result<Self, SourceError> {
        let sql = "SELECT attname::text, format_type(atttypid, NULL) FROM pg_attribute \
                   WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped";
        let existing: Vec<(String, String)> = sqlx::query_as(sql)
            .bind(quoted_table(&spec.table))
            .fetch_all(connection)
            .await
            .map_err(SourceError::database("reading the table's columns"))?;
        let table_error = |reason| SourceError::Table { table: spec.table.clone(), reason };
        if existing.is_empty() {
            return Err(table_error("there is no such table".to_owned()));
        }
        let names: Vec<String> = existing.iter().map(|(name, _)| name.clone()).collect();
        let columns = Columns::resolve(spec, &names, ("seq", ADVICE, false))?;
        let kind = |name: &String| {
            let found = existing.iter().find(|(column, _)| column == name);
            found.map_or("", |(_, kind)| kind.as_str())
        };
        if !matches!(kind(&columns.sequence), "bigint" | "integer" | "smallint") {
            let (name, kind) = (&columns.sequence, kind(&columns.sequence));
            return Err(table_error(format!("{name:?} is {kind}, not bigint: {ADVICE}")));
        }
        let mark = match &columns.mark {
            None => None,
            Some(name) => match kind(name) {
                "boolean" => Some((quoted(name), true)),
                kind if kind.starts_with("timestamp") => Some((quoted(name), false)),
                kind => {
                    let reason = format!("{name:?} is {kind}, neither boolean nor timestamp");
                    return Err(table_error(reason));
                }
            },
        };
        let text =
            |name: Option<&String>| name.map_or("NULL".to_owned(), |name| text(name, kind(name)));
        let texts = columns.texts().map(text).join(", ");
        let data =
            columns.data.as_ref().map_or("NULL::bytea".to_owned(), |name| match kind(name) {
                "bytea" => quoted(name),
                _ => format!("convert_to({}::text, 'UTF8')", quoted(name)),
            });
        let select = format!("SELECT {}::bigint, {texts}, {data}", quoted(&columns.sequence));
        Ok(Self::of(&spec.table, &columns, &select, mark.as_ref()))
    }

    fn of(table: &str, columns: &Columns, select: &str, mark: Option<&(String, bool)>) -> Self {
        let (table, sequence) = (quoted_table(table), quoted(&columns.sequence));
        let pending = match mark {
            None => "true".to_owned(),
            Some((column, true)) => format!("{column} IS NOT TRUE"),
            Some((column, false)) => format!("{column} IS NULL"),
        };
        let select = format!("{select} FROM {table} WHERE {pending}");
        let order = format!("ORDER BY {sequence} LIMIT $1");
        // Every parameter has a use, whichever columns there are.
        let but = |column: Option<&String>, list: &str| match column {
            None => format!("AND {list}::text[] IS NOT NULL"),
            Some(name) => {
                let name = quoted(name);
                format!("AND ({name} IS NULL OR {name}::text <> ALL({list}::text[]))")
            }
        };
        let others = format!(
            "AND {sequence} <> ALL($2::bigint[]) {} {}",
            but(columns.key.as_ref(), "$3"),
            but(columns.topic.as_ref(), "$4")
        );
        let these = "unnest($1::bigint[], $2::text[]) AS d(place, event)";
        let same = format!("t.{sequence} = d.place AND t.{}::text = d.event", quoted(&columns.id));
        let settle = match mark {
            None => format!("DELETE FROM {table} AS t USING {these} WHERE {same}"),
            Some((column, true)) => {
                format!("UPDATE {table} AS t SET {column} = true FROM {these} WHERE {same}")
            }
            Some((column, false)) => {
                format!("UPDATE {table} AS t SET {column} = now() FROM {these} WHERE {same}")
            }
        };
        Self {
            read: format!("{select} {order}"),
            read_others: format!("{select} {others} {order}"),
            settle,
            waiting: format!(
                "SELECT count(*) FROM (SELECT 1 FROM {table} WHERE {pending} LIMIT $1) AS w"
            ),
        }
    }
}

/// A column as text; a time as RFC 3339 has it, one without a zone taken as UTC.
fn text(name: &str, kind: &str) -> String {
    let name = quoted(name);
    let format = "'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'";
    match kind {
        "timestamp with time zone" => format!("to_char({name} AT TIME ZONE 'UTC', {format})"),
        "timestamp without time zone" => format!("to_char({name}, {format})"),
        _ => format!("{name}::text"),
    }
}
