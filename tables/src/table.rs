//! A table of either database.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use crate::excluded::Excluded;
use crate::postgres::PostgresTable;
use crate::row::{Read, RowKey, Settled};
use crate::spec::{SourceError, SourceSpec};
use crate::sqlite::{Place, SqliteTable};

/// A database that does not answer within this time is taken as gone. Longer than it may wait for a lock.
const ANSWER: Duration = Duration::from_secs(30);

/// A connection to the database of an outbox table.
#[derive(Debug)]
pub(crate) enum Table {
    Sqlite(Box<SqliteTable>),
    Postgres(Box<PostgresTable>),
}

impl Table {
    /// Connects, and checks that the table is as it must be and that its rows may be settled. `before` is where the last
    /// connection was.
    pub(crate) fn connect<'a>(spec: &'a SourceSpec, before: Option<&'a Place>) -> Answer<'a, Self> {
        answered("connecting", async move {
            let url = spec.url()?;
            Ok(match url.starts_with("sqlite:") {
                true => Self::Sqlite(Box::new(SqliteTable::connect(spec, &url, before).await?)),
                false => Self::Postgres(Box::new(PostgresTable::connect(spec, &url).await?)),
            })
        })
    }

    /// Which file it is; `None`: it is no file.
    pub(crate) fn place(&self) -> Option<Arc<Place>> {
        match self {
            Self::Sqlite(table) => Some(table.place()),
            Self::Postgres(_) => None,
        }
    }

    /// Tries to become the one that relays; true once it is.
    pub(crate) fn lead(&mut self) -> Answer<'_, bool> {
        answered("taking the lock", async {
            match self {
                Self::Sqlite(table) => table.lead(),
                Self::Postgres(table) => table.lead().await,
            }
        })
    }

    /// Whether anybody else may have written since the last time.
    pub(crate) fn changed(&mut self) -> Answer<'_, bool> {
        answered("looking for changes", async {
            match self {
                Self::Sqlite(table) => table.changed().await,
                // Asking costs as much as reading.
                Self::Postgres(_) => Ok(true),
            }
        })
    }

    /// The first rows that wait, in order: at most so many, and about [`crate::row::READ_BYTES`].
    pub(crate) fn read<'a>(&'a mut self, excluded: &'a Excluded, limit: u32) -> Answer<'a, Read> {
        answered("reading rows", async move {
            match self {
                Self::Sqlite(table) => table.read(excluded, limit).await,
                Self::Postgres(table) => table.read(excluded, limit).await,
            }
        })
    }

    /// Deletes or marks rows.
    pub(crate) fn settle<'a>(&'a mut self, rows: &'a [RowKey]) -> Answer<'a, Settled> {
        answered("settling rows", async {
            match self {
                Self::Sqlite(table) => table.settle(rows).await,
                Self::Postgres(table) => table.settle(rows).await,
            }
        })
    }

    /// Ids of rows that have no place in the order and so are never read, up to a bound.
    pub(crate) fn unplaced(&mut self, bound: u32) -> Answer<'_, Vec<String>> {
        answered("looking for rows without a sequence", async move {
            match self {
                Self::Sqlite(table) => table.unplaced(bound).await,
                // It takes no such table.
                Self::Postgres(_) => Ok(Vec::new()),
            }
        })
    }

    /// Rows that wait, up to a bound.
    pub(crate) fn waiting(&mut self, bound: u32) -> Answer<'_, i64> {
        answered("counting rows", async move {
            match self {
                Self::Sqlite(table) => table.waiting(bound).await,
                Self::Postgres(table) => table.waiting(bound).await,
            }
        })
    }

    /// Says goodbye, so that the next replica can lead at once.
    pub(crate) fn close(self) -> BoxFuture<'static, ()> {
        Box::pin(async {
            let close = async {
                match self {
                    Self::Sqlite(table) => table.close().await,
                    Self::Postgres(table) => table.close().await,
                }
            };
            // One that does not answer is gone anyway.
            tokio::time::timeout(Duration::from_secs(1), close).await.unwrap_or_default();
        })
    }
}

/// Boxed, because the futures of sqlx are large.
type Answer<'a, T> = BoxFuture<'a, Result<T, SourceError>>;

fn answered<'a, T: 'a>(
    doing: &'static str,
    work: impl Future<Output = Result<T, SourceError>> + Send + 'a,
) -> Answer<'a, T> {
    Box::pin(async move {
        let after = ANSWER;
        let answer = tokio::time::timeout(after, work).await;
        answer.unwrap_or(Err(SourceError::Silent { doing, after }))
    })
}
