//! A table in PostgreSQL.
//!
//! A sequence is not the order of commits: of two transactions that run at once, the one that inserted first may commit
//! last. So no position is kept; every read takes whatever is there by then, in the order of the sequence. A row that
//! was inserted after another one was committed has a larger sequence, and whoever sees it sees the other one too: it
//! always follows.

mod sql;

use std::str::FromStr as _;

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{ConnectOptions as _, Connection as _, Executor as _, PgConnection, Row as _};

use self::sql::Sql;
use crate::columns::quoted_table;
use crate::excluded::Excluded;
use crate::row::{Read, Row, RowKey, Settled, utf8};
use crate::spec::{SourceError, SourceSpec};

/// A row that the application has locked must not hold up the others for ever; and a server should notice soon that
/// the machine of whoever relays is gone, since it holds the lock for that connection. Probes tell it of an idle
/// connection, the last setting of one that has not taken an answer; only PostgreSQL 12 and later know that one. Each
/// statement is a transaction: a stricter isolation would give it nothing, and let it and the application's fail.
const SESSION: &str = "SET lock_timeout = '1s'; SET statement_timeout = '25s'; \
    SET default_transaction_isolation = 'read committed'; \
    SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3; \
    SELECT set_config(name, '11s', false) FROM pg_settings WHERE name = 'tcp_user_timeout'";
/// For telling locked rows from others: a thousand of them are to be told within the time that an answer may take.
const IMPATIENT: &str = "SET lock_timeout = '5ms'";
const PATIENT: &str = "SET lock_timeout = '1s'";
const SETTLING: &str = "settling rows";

#[derive(Debug)]
pub(crate) struct PostgresTable {
    connection: PgConnection,
    spec: SourceSpec,
    table: String,
    leads: bool,
    sql: Sql,
}

impl PostgresTable {
    pub(crate) async fn connect(spec: &SourceSpec, url: &str) -> Result<Self, SourceError> {
        let (url, unknown) = known_parameters(url);
        let options = PgConnectOptions::from_str(&url)
            .map_err(|error| SourceError::Settings(format!("the database's URL: {error}")))?
            .application_name(&format!("duet {}", spec.name))
            .disable_statement_logging();
        let mut connection = PgConnection::connect_with(&options)
            .await
            .map_err(SourceError::database("connecting"))?;
        if !unknown.is_empty() {
            let (source, unknown) = (&spec.name, unknown.join(", "));
            tracing::warn!(source, unknown, "parameters of the database's URL mean nothing here");
        }
        connection.execute(SESSION).await.map_err(SourceError::database("setting timeouts"))?;
        let sql = Sql::new(spec, &mut connection).await?;
        let table = quoted_table(&spec.table);
        // What is wrong with the table shows here, and not at the first row.
        read(&mut connection, &sql, &Excluded::default(), 0).await?;
        let mut table = Self { connection, spec: spec.clone(), table, leads: false, sql };
        // Rights show where there is nothing to settle, too: missing ones, and a server that only reads.
        table.settle_at_once(&[], "checking the right to delete or mark rows").await?;
        Ok(table)
    }

    /// A lock of the connection: it goes with it, however that ends. It is about the table's name, as the statements are:
    /// a table that is dropped and made anew has another number.
    pub(crate) async fn lead(&mut self) -> Result<bool, SourceError> {
        if !self.leads {
            let sql = "SELECT pg_try_advisory_lock(\
                       hashtextextended('duet outbox ' || format('%I.%I', nspname, relname), 0)) \
                       FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace \
                       WHERE c.oid = $1::text::regclass";
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
    ) -> Result<Read, SourceError> {
        loop {
            let rows = read(&mut self.connection, &self.sql, excluded, limit).await?;
            // Asked after the rows, which are as the table was by then, or before.
            if rows.is_empty() || self.sql.is_current(&mut self.connection, &self.table).await? {
                return Ok(Read::new(rows, limit));
            }
            self.sql = Sql::new(&self.spec, &mut self.connection).await?;
        }
    }

    pub(crate) async fn settle(&mut self, rows: &[RowKey]) -> Result<Settled, SourceError> {
        match self.settle_at_once(rows, SETTLING).await {
            Ok(rows) => Ok(Settled { rows, locked: Vec::new() }),
            Err(error) if is_locked(&error) => self.settle_unlocked(rows).await,
            Err(error) => Err(error),
        }
    }

    /// By halves, down to the rows that are locked. `SKIP LOCKED` would tell them at once, but it needs the right to
    /// update, and with row-level security a policy for that: more than deleting takes.
    async fn settle_unlocked(&mut self, rows: &[RowKey]) -> Result<Settled, SourceError> {
        let set = SourceError::database("setting timeouts");
        self.connection.execute(IMPATIENT).await.map_err(&set)?;
        let mut settled = Settled::default();
        let mut left = vec![rows];
        while let Some(rows) = left.pop() {
            match self.settle_at_once(rows, SETTLING).await {
                Ok(count) => settled.rows += count,
                Err(error) if is_locked(&error) => match rows {
                    [] => {}
                    [row] => settled.locked.push(row.clone()),
                    rows => {
                        let (first, second) = rows.split_at(rows.len() / 2);
                        left.extend([second, first]);
                    }
                },
                Err(error) => return Err(error),
            }
        }
        self.connection.execute(PATIENT).await.map_err(&set)?;
        Ok(settled)
    }

    async fn settle_at_once(
        &mut self,
        rows: &[RowKey],
        doing: &'static str,
    ) -> Result<u64, SourceError> {
        let sequences: Vec<i64> = rows.iter().map(|row| row.sequence).collect();
        let ids: Vec<String> = rows.iter().map(|row| row.id.clone()).collect();
        let settled = sqlx::query(&self.sql.settle)
            .bind(sequences)
            .bind(ids)
            .execute(&mut self.connection)
            .await
            .map_err(SourceError::database(doing))?;
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

async fn read(
    connection: &mut PgConnection,
    sql: &Sql,
    excluded: &Excluded,
    limit: u32,
) -> Result<Vec<Row>, SourceError> {
    let text = if excluded.is_empty() { &sql.read } else { &sql.read_others };
    let mut query = sqlx::query(text).bind(i64::from(limit));
    if !excluded.is_empty() {
        let keys: Vec<String> = excluded.keys.iter().cloned().collect();
        query = query.bind(excluded.places()).bind(keys).bind(excluded.all_topics());
    }
    let rows = query.fetch_all(connection).await;
    let rows = rows.map_err(SourceError::database("reading rows"))?;
    rows.iter().map(row).collect()
}

fn row(raw: &PgRow) -> Result<Row, SourceError> {
    let failed = SourceError::database("reading a row");
    let sequence = raw.try_get(0).map_err(&failed)?;
    let mut texts = [const { Ok(None) }; 11];
    for (number, text) in texts.iter_mut().enumerate() {
        *text = utf8(raw.try_get(number + 1).map_err(&failed)?);
    }
    let data = raw.try_get(12).map_err(&failed)?;
    let bytes = raw.try_get(13).map_err(&failed)?;
    let cut = raw.try_get(14).map_err(&failed)?;
    Ok(Row::new(sequence, texts, data, (bytes, cut)))
}

/// The parameters that sqlx knows; `options[NAME]` is one too.
const PARAMETERS: [&str; 18] = [
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "statement-cache-capacity",
    "user",
];

/// A URL without the parameters that sqlx does not know, and their names: it would log them with their values, which may
/// be secrets.
fn known_parameters(url: &str) -> (String, Vec<&str>) {
    let Some((place, query)) = url.split_once('?') else {
        return (url.to_owned(), Vec::new());
    };
    let is_known = |pair: &&str| {
        let name = name(pair);
        PARAMETERS.contains(&name) || name.starts_with("options[")
    };
    let (known, unknown): (Vec<&str>, Vec<&str>) =
        query.split('&').filter(|pair| !pair.is_empty()).partition(is_known);
    (format!("{place}?{}", known.join("&")), unknown.into_iter().map(name).collect())
}

fn name(pair: &str) -> &str {
    pair.split_once('=').map_or(pair, |(name, _value)| name)
}

/// Whether somebody else holds what is needed: not to be had in time, or only by a deadlock.
fn is_locked(error: &SourceError) -> bool {
    let SourceError::Database { error: sqlx::Error::Database(error), .. } = error else {
        return false;
    };
    matches!(error.code().as_deref(), Some("55P03" | "40P01"))
}

#[cfg(test)]
mod tests;
