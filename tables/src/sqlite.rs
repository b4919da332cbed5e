//! A table in a file of this machine.
//!
//! SQLite has one writer at a time, and a transaction that inserts has the write lock from its first insert to its commit:
//! the order of `rowid` is the order of commits.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;
use std::time::Duration;

use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection};

use crate::columns::{Columns, quoted, quoted_table};
use crate::excluded::Excluded;
use crate::row::{Row, RowKey};
use crate::spec::{SourceError, SourceSpec};

/// How long the application may hold the write lock.
const BUSY: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct SqliteTable {
    connection: SqliteConnection,
    file: PathBuf,
    /// Which file it was: one of the same name may take its place.
    inode: u64,
    lock: PathBuf,
    held: Option<File>,
    /// `PRAGMA data_version` as last seen.
    version: Option<i64>,
    sql: Sql,
}

impl SqliteTable {
    pub(crate) async fn connect(spec: &SourceSpec, url: &str) -> Result<Self, SourceError> {
        let options = SqliteConnectOptions::from_str(url)
            .map_err(|error| SourceError::Settings(format!("the database's URL: {error}")))?
            .busy_timeout(BUSY)
            .create_if_missing(false)
            .disable_statement_logging();
        let file = options.get_filename().to_owned();
        let inode = inode(&file)?;
        let mut connection = SqliteConnection::connect_with(&options)
            .await
            .map_err(SourceError::database("connecting"))?;
        let sql = Sql::new(spec, &mut connection).await?;
        let lock = format!("{}-duet-{}.lock", file.display(), spec.table.replace('/', "_"));
        let mut table =
            Self { connection, file, inode, lock: lock.into(), held: None, version: None, sql };
        // What is wrong with the table shows here, and not at the first row.
        table.read(&Excluded::default(), 0).await?;
        Ok(table)
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
        if inode(&self.file)? != self.inode {
            let reason = format!("another file took the place of {}", self.file.display());
            return Err(SourceError::Settings(reason));
        }
        let version = sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&mut self.connection)
            .await
            .map_err(SourceError::database("looking for changes"))?;
        let changed = self.version != Some(version);
        self.version = Some(version);
        Ok(changed)
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
            let lists = [json!(excluded.rows), json!(excluded.keys), json!(excluded.topics)];
            for list in lists {
                query = query.bind(list.to_string());
            }
        }
        let rows = query.fetch_all(&mut self.connection).await;
        let rows = rows.map_err(SourceError::database("reading rows"))?;
        rows.iter().map(row).collect()
    }

    pub(crate) async fn settle(&mut self, rows: &[RowKey]) -> Result<u64, SourceError> {
        let rows: Vec<_> = rows.iter().map(|row| json!([row.sequence, row.id])).collect();
        let settled = sqlx::query(&self.sql.settle)
            .bind(json!(rows).to_string())
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
        // The lock goes after the connection.
        let Self { connection, held, .. } = self;
        connection.close().await.unwrap_or_default();
        drop(held);
    }
}

fn inode(file: &Path) -> Result<u64, SourceError> {
    let metadata = std::fs::metadata(file)
        .map_err(|error| SourceError::Settings(format!("{}: {error}", file.display())))?;
    Ok(metadata.ino())
}

/// A text is read as bytes, because SQLite does not promise that it is UTF-8.
fn row(raw: &SqliteRow) -> Result<Row, SourceError> {
    let failed = SourceError::database("reading a row");
    let sequence = raw.try_get(0).map_err(&failed)?;
    let mut texts = [const { Ok(None) }; 11];
    for (number, text) in texts.iter_mut().enumerate() {
        let bytes: Option<Vec<u8>> = raw.try_get(number + 1).map_err(&failed)?;
        *text = bytes.map(|bytes| String::from_utf8(bytes).map_err(drop)).transpose();
    }
    let data = raw.try_get(12).map_err(&failed)?;
    Ok(Row::new(sequence, texts, data))
}

/// The statements for one table.
#[derive(Debug)]
struct Sql {
    /// Takes the limit.
    read: String,
    /// Takes the limit, and JSON lists of sequences, keys and topics that are left out.
    read_others: String,
    /// Takes a JSON list of sequences and ids.
    settle: String,
    /// Takes the bound.
    waiting: String,
}

impl Sql {
    async fn new(
        spec: &SourceSpec,
        connection: &mut SqliteConnection,
    ) -> Result<Self, SourceError> {
        let (schema, table) = spec.table.split_once('.').unwrap_or(("main", &spec.table));
        let existing: Vec<(String, String, i64)> =
            sqlx::query_as("SELECT name, upper(type), pk FROM pragma_table_info(?1, ?2)")
                .bind(table)
                .bind(schema)
                .fetch_all(&mut *connection)
                .await
                .map_err(SourceError::database("reading the table's columns"))?;
        let table_error = |reason: &str| SourceError::Table {
            table: spec.table.clone(),
            reason: reason.to_owned(),
        };
        if existing.is_empty() {
            return Err(table_error("there is no such table"));
        }
        let names: Vec<String> = existing.iter().map(|(name, ..)| name.clone()).collect();
        let columns = Columns::resolve(spec, &names, ("rowid", "", true))?;
        let sql =
            "SELECT sql FROM ".to_owned() + &quoted(schema) + ".sqlite_master WHERE name = ?1";
        let created: Option<String> = sqlx::query_scalar(&sql)
            .bind(table)
            .fetch_one(connection)
            .await
            .map_err(SourceError::database("reading the table's definition"))?;
        let counted = created.is_some_and(|sql| sql.to_uppercase().contains("AUTOINCREMENT"));
        let is_rowid = |(name, kind, key): &(String, String, i64)| {
            *name == columns.id && kind == "INTEGER" && *key == 1
        };
        if !counted && existing.iter().any(is_rowid) {
            // The bus would take a new event with an old id for the old event.
            return Err(table_error(
                "its id is used again once the last row is deleted; make it INTEGER PRIMARY KEY AUTOINCREMENT, or a UUID",
            ));
        }
        let mark = columns.mark.as_ref().map(|name| {
            let kind = existing.iter().find(|(column, ..)| column == name);
            let flag =
                kind.is_some_and(|(_, kind, _)| kind.contains("BOOL") || kind.contains("INT"));
            (quoted(name), flag)
        });
        Ok(Self::of(&spec.table, &columns, mark.as_ref()))
    }

    fn of(table: &str, columns: &Columns, mark: Option<&(String, bool)>) -> Self {
        let table = quoted_table(table);
        let sequence = match columns.sequence.as_str() {
            "rowid" => "rowid".to_owned(),
            name => quoted(name),
        };
        let text = |name: Option<&String>| {
            name.map_or("NULL".to_owned(), |name| format!("CAST({} AS BLOB)", text(&quoted(name))))
        };
        let texts = columns.texts().map(text).join(", ");
        let data = columns.data.as_ref();
        let data = data.map_or("NULL".to_owned(), |name| format!("CAST({} AS BLOB)", quoted(name)));
        let pending = match mark {
            None => "1".to_owned(),
            Some((column, true)) => format!("coalesce({column}, 0) = 0"),
            Some((column, false)) => format!("{column} IS NULL"),
        };
        let select = format!("SELECT {sequence}, {texts}, {data} FROM {table} WHERE {pending}");
        let order = format!("ORDER BY {sequence} LIMIT ?1");
        let but = |column: Option<&String>, list: &str| {
            column.map_or(String::new(), |name| {
                let other = format!(
                    "{} NOT IN (SELECT value FROM json_each({list}))",
                    self::text(&quoted(name))
                );
                format!(" AND ({} IS NULL OR {other})", quoted(name))
            })
        };
        let others = format!(
            "AND {sequence} NOT IN (SELECT value FROM json_each(?2)){}{}",
            but(columns.key.as_ref(), "?3"),
            but(columns.topic.as_ref(), "?4"),
        );
        // By the place first, which is found at once; the id guards against another row that has its place by now.
        let these = format!(
            "{sequence} IN (SELECT o.{sequence} FROM json_each(?1) AS j CROSS JOIN {table} AS o \
             ON o.{sequence} = json_extract(j.value, '$[0]') AND {} = json_extract(j.value, '$[1]'))",
            self::text(&format!("o.{}", quoted(&columns.id)))
        );
        let settle = match mark {
            None => format!("DELETE FROM {table} WHERE {these}"),
            Some((column, true)) => format!("UPDATE {table} SET {column} = 1 WHERE {these}"),
            Some((column, false)) => {
                format!(
                    "UPDATE {table} SET {column} = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') WHERE {these}"
                )
            }
        };
        Self {
            read: format!("{select} {order}"),
            read_others: format!("{select} {others} {order}"),
            settle,
            waiting: format!(
                "SELECT count(*) FROM (SELECT 1 FROM {table} WHERE {pending} LIMIT ?1)"
            ),
        }
    }
}

/// A column, by its quoted name, as text; bytes, such as those of a UUID, in hex.
fn text(name: &str) -> String {
    format!("CASE typeof({name}) WHEN 'blob' THEN lower(hex({name})) ELSE CAST({name} AS TEXT) END")
}

#[cfg(test)]
mod tests;
