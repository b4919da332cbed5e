//! What is relayed, and why it is not.

use std::fmt;
use std::time::Duration;

use duet_api::proto::{self, outbox_source::Database};
use duet_api::resource::is_database_url;

/// Looks for new rows this often, unless told.
const DEFAULT_POLL: Duration = Duration::from_millis(50);

/// A table whose rows are events to publish.
#[derive(Clone, PartialEq)]
pub struct SourceSpec {
    /// `<namespace>/<name>` of the resource.
    pub name: String,
    /// Where the database's URL is.
    database: Database,
    /// `<table>` or `<schema>.<table>`.
    pub table: String,
    /// The bus.
    pub bus: String,
    /// The topic of every row; `None`: each row says it.
    pub topic: Option<String>,
    /// `source` of rows that say none.
    pub source: String,
    /// `type` of rows that say none.
    pub event_type: Option<String>,
    /// `datacontenttype` of rows that say none.
    pub data_content_type: String,
    /// Columns, by what they mean; empty names stand for the usual ones.
    pub columns: proto::OutboxColumns,
    /// The column that says that a row was published; `None`: such rows are deleted.
    pub mark: Option<String>,
    /// Time between two looks at the table.
    pub poll: Duration,
}

// By hand: a URL can hold a password.
impl fmt::Debug for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceSpec")
            .field("name", &self.name)
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

impl TryFrom<proto::OutboxSource> for SourceSpec {
    type Error = SourceError;

    fn try_from(raw: proto::OutboxSource) -> Result<Self, SourceError> {
        let filled = |text: String| Some(text).filter(|text| !text.is_empty());
        let needed = |text: &str, what: &'static str| match text.is_empty() {
            true => Err(SourceError::Settings(format!("{what} is missing"))),
            false => Ok(()),
        };
        needed(&raw.name, "the name")?;
        needed(&raw.table, "the table")?;
        needed(&raw.bus, "the bus")?;
        needed(&raw.source, "the source")?;
        let Some(database) = raw.database else {
            return Err(SourceError::Settings("the database is missing".to_owned()));
        };
        let poll = raw.poll.and_then(|poll| Duration::try_from(poll).ok());
        Ok(Self {
            name: raw.name,
            database,
            table: raw.table,
            bus: raw.bus,
            topic: filled(raw.topic),
            source: raw.source,
            event_type: filled(raw.r#type),
            data_content_type: raw.data_content_type,
            columns: raw.columns.unwrap_or_default(),
            mark: filled(raw.mark_column),
            poll: poll.filter(|poll| !poll.is_zero()).unwrap_or(DEFAULT_POLL),
        })
    }
}

impl SourceSpec {
    /// The database's URL, read anew from where it is: a secret may have been changed.
    ///
    /// # Errors
    /// When it is not there, or is not one of a database that can be read.
    pub(crate) fn url(&self) -> Result<String, SourceError> {
        let (url, place) = match &self.database {
            Database::Url(url) => (url.clone(), "url".to_owned()),
            Database::UrlEnv(name) => {
                let url = std::env::var(name).map_err(|error| {
                    SourceError::Settings(format!("environment variable {name}: {error}"))
                })?;
                (url, format!("environment variable {name}"))
            }
            Database::UrlFile(path) => {
                let url = std::fs::read_to_string(path)
                    .map_err(|error| SourceError::Settings(format!("{path}: {error}")))?;
                (url.trim().to_owned(), path.clone())
            }
        };
        match is_database_url(&url) {
            true => Ok(url),
            // The URL itself may be a secret.
            false => Err(SourceError::Settings(format!(
                "{place}: the URL does not start with sqlite: or postgres://"
            ))),
        }
    }
}

/// Why a table cannot be relayed now.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The resource, or what it refers to, must be mended.
    #[error("{0}")]
    Settings(String),
    /// The table is not as it must be.
    #[error("table {table:?}: {reason}")]
    Table {
        /// As in the resource.
        table: String,
        /// What to do about it.
        reason: String,
    },
    /// The database cannot be reached, or refused something.
    #[error("{doing}: {error}")]
    Database {
        /// What was tried.
        doing: &'static str,
        /// What it said.
        error: sqlx::Error,
    },
    /// The database did not answer.
    #[error("{doing}: no answer within {} s", .after.as_secs())]
    Silent {
        /// What was tried.
        doing: &'static str,
        /// How long.
        after: Duration,
    },
}

impl SourceError {
    pub(crate) fn database(doing: &'static str) -> impl Fn(sqlx::Error) -> Self {
        move |error| Self::Database { doing, error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(database: Database) -> proto::OutboxSource {
        proto::OutboxSource {
            name: "shop/orders".to_owned(),
            database: Some(database),
            table: "outbox".to_owned(),
            bus: "default".to_owned(),
            source: "/shop/orders".to_owned(),
            ..proto::OutboxSource::default()
        }
    }

    #[test]
    fn a_url_comes_from_a_file_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("url");
        let spec =
            SourceSpec::try_from(raw(Database::UrlFile(file.display().to_string()))).unwrap();
        assert!(spec.url().unwrap_err().to_string().contains("url: No such file"));
        std::fs::write(&file, "mysql://app:secret@db/app").unwrap();
        let error = spec.url().unwrap_err().to_string();
        assert!(error.contains("does not start with") && !error.contains("secret"), "{error}");
        std::fs::write(&file, "postgres://app:secret@db/app\n").unwrap();
        assert_eq!(spec.url().unwrap(), "postgres://app:secret@db/app");
        let spec = SourceSpec::try_from(raw(Database::Url("sqlite:a".to_owned()))).unwrap();
        assert_eq!((spec.poll, spec.topic.as_deref()), (DEFAULT_POLL, None));
        assert!(!format!("{spec:?}").contains("sqlite"));
    }

    #[test]
    fn an_absent_variable_is_named() {
        let spec =
            SourceSpec::try_from(raw(Database::UrlEnv("DUET_NO_SUCH_URL".to_owned()))).unwrap();
        let error = spec.url().unwrap_err().to_string();
        assert!(error.contains("environment variable DUET_NO_SUCH_URL"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let spec = proto::OutboxSource { database: None, ..raw(Database::Url(String::new())) };
        assert_eq!(SourceSpec::try_from(spec).unwrap_err().to_string(), "the database is missing");
    }
}
