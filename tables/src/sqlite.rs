//! A table in a file of this machine.
//!
//! SQLite has one writer at a time, and a transaction that inserts has the write lock from its first insert to its commit:
//! the order of `rowid` is the order of commits.

mod place;
mod sql;

use std::fs::{File, TryLockError};
use std::path::PathBuf;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection};

pub(crate) use self::place::Place;
use self::sql::Sql;
use crate::excluded::Excluded;
use crate::row::{Read, Row, RowKey, Settled, utf8};
use crate::spec::{SourceError, SourceSpec};

/// How long the application may hold the write lock.
const BUSY: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct SqliteTable {
    connection: SqliteConnection,
    spec: SourceSpec,
    place: Arc<Place>,
    lock: PathBuf,
    held: Option<File>,
    /// `PRAGMA data_version` as last seen.
    version: Option<i64>,
    sql: Sql,
}

impl SqliteTable {
    /// `before` is where the last connection was.
    pub(crate) async fn connect(
        spec: &SourceSpec,
        url: &str,
        before: Option<&Place>,
    ) -> Result<Self, SourceError> {
        let options = SqliteConnectOptions::from_str(url)
            .map_err(|error| SourceError::Settings(format!("the database's URL: {error}")))?
            .busy_timeout(BUSY)
            .create_if_missing(false)
            // What a DELETE does to tables that refer to this one is the application's affair, as in its own
            // connections, which have it off unless told.
            .foreign_keys(false)
            .disable_statement_logging();
        let file = options.get_filename().to_owned();
        let place = Place::find(&file)?;
        before.map_or(Ok(()), |before| before.check_next(&place))?;
        let mut connection = SqliteConnection::connect_with(&options)
            .await
            .map_err(SourceError::database("connecting"))?;
        let sql = Sql::new(spec, &mut connection).await?;
        let lock = format!("{}-duet-{}.lock", file.display(), spec.table.replace('/', "_"));
        // What is wrong with the table shows here, and not at the first row.
        read(&mut connection, &sql, &Excluded::default(), 0).await?;
        place.find_wal();
        let mut table = Self {
            connection,
            spec: spec.clone(),
            place: Arc::new(place),
            lock: lock.into(),
            held: None,
            version: None,
            sql,
        };
        table.check_right().await?;
        Ok(table)
    }

    pub(crate) fn place(&self) -> Arc<Place> {
        Arc::clone(&self.place)
    }

    /// A lock on a file beside the database: one on the database itself would be taken for SQLite's own.
    pub(crate) fn lead(&mut self) -> Result<bool, SourceError> {
        let failed = |error: std::io::Error| {
            SourceError::Settings(format!("lock file {}: {error}", self.lock.display()))
        };
        if self.held.is_none() {
            let mut open = File::options();
            let file = open.create(true).append(true).open(&self.lock).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => self.held = Some(file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
        Ok(self.held.is_some())
    }

    pub(crate) async fn changed(&mut self) -> Result<bool, SourceError> {
        self.place.check()?;
        let version = sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&mut self.connection)
            .await
            .map_err(SourceError::database("looking for changes"))?;
        let changed = self.version != Some(version);
        if changed {
            self.place.find_wal();
        }
        self.version = Some(version);
        Ok(changed)
    }

    pub(crate) async fn read(
        &mut self,
        excluded: &Excluded,
        limit: u32,
    ) -> Result<Read, SourceError> {
        loop {
            let rows = read(&mut self.connection, &self.sql, excluded, limit).await?;
            // Asked after the rows, which are as the table was by then, or before.
            if rows.is_empty() || self.sql.is_current(&mut self.connection).await? {
                return Ok(Read::new(rows, limit));
            }
            self.sql = Sql::new(&self.spec, &mut self.connection).await?;
        }
    }

    /// SQLite locks no rows.
    pub(crate) async fn settle(&mut self, rows: &[RowKey]) -> Result<Settled, SourceError> {
        let rows = self.execute_settle(rows).await;
        let rows = rows.map_err(SourceError::database("settling rows"))?;
        Ok(Settled { rows, locked: Vec::new() })
    }

    /// A file that cannot be written shows where there is nothing to settle, too.
    async fn check_right(&mut self) -> Result<(), SourceError> {
        match self.execute_settle(&[]).await {
            // The application writes, which is no news of what we may.
            Err(error) if is_busy(&error) => Ok(()),
            Err(error) => {
                Err(SourceError::database("checking the right to delete or mark rows")(error))
            }
            Ok(_) => Ok(()),
        }
    }

    async fn execute_settle(&mut self, rows: &[RowKey]) -> sqlx::Result<u64> {
        let rows: Vec<_> = rows.iter().map(|row| json!([row.sequence, row.id])).collect();
        let query = sqlx::query(&self.sql.settle).bind(json!(rows).to_string());
        Ok(query.execute(&mut self.connection).await?.rows_affected())
    }

    pub(crate) async fn unplaced(&mut self, bound: u32) -> Result<Vec<String>, SourceError> {
        let Some(sql) = &self.sql.unplaced else { return Ok(Vec::new()) };
        let ids: Vec<Option<Vec<u8>>> = sqlx::query_scalar(sql)
            .bind(i64::from(bound))
            .fetch_all(&mut self.connection)
            .await
            .map_err(SourceError::database("looking for rows without a sequence"))?;
        let text = |id: Option<Vec<u8>>| {
            id.map_or("NULL".to_owned(), |id| String::from_utf8_lossy(&id).into_owned())
        };
        Ok(ids.into_iter().map(text).collect())
    }

    pub(crate) async fn waiting(&mut self, bound: u32) -> Result<i64, SourceError> {
        let count = sqlx::query_scalar(&self.sql.waiting).bind(i64::from(bound));
        let count = count.fetch_one(&mut self.connection).await;
        count.map_err(SourceError::database("counting rows"))
    }

    pub(crate) async fn close(self) {
        // The lock goes after the connection.
        let Self { connection, held, .. } = self;
        connection.close().await.unwrap_or_default();
        drop(held);
    }
}

async fn read(
    connection: &mut SqliteConnection,
    sql: &Sql,
    excluded: &Excluded,
    limit: u32,
) -> Result<Vec<Row>, SourceError> {
    let text = if excluded.is_empty() { &sql.read } else { &sql.read_others };
    let mut query = sqlx::query(text).bind(i64::from(limit));
    if !excluded.is_empty() {
        for list in [json!(excluded.places()), json!(excluded.keys), json!(excluded.all_topics())] {
            query = query.bind(list.to_string());
        }
    }
    let rows = query.fetch_all(connection).await;
    let rows = rows.map_err(SourceError::database("reading rows"))?;
    rows.iter().map(row).collect()
}

/// A text is read as bytes, because SQLite does not promise that it is UTF-8.
fn row(raw: &SqliteRow) -> Result<Row, SourceError> {
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

/// Whether the application held the write lock for too long.
fn is_busy(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    // The low byte is the code itself, the rest says more of it: 5 is `SQLITE_BUSY`.
    code.and_then(|code| code.parse::<u32>().ok()).is_some_and(|code| code & 0xff == 5)
}

#[cfg(test)]
mod tests;
