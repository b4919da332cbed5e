//! The statements for a table in PostgreSQL.

use std::collections::BTreeSet;

use sqlx::PgConnection;

use crate::columns::{Columns, joined, quoted, quoted_table};
use crate::row::{MAX_EVENT_BYTES, MAX_TEXT_BYTES, READ_BYTES};
use crate::spec::{SourceError, SourceSpec};

/// What to do about a table without a sequence. It is `UNIQUE` for the index: the table is read in this order.
const ADVICE: &str =
    "ALTER TABLE … ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE adds one";

/// A number for what a table is and which columns it has, `NULL` where there is none; and who answers.
const SHAPE: &str = "SELECT hashtextextended(string_agg(\
    format('%s %s %s %s', attrelid, attname, atttypid, attnotnull), ' ' ORDER BY attnum), 0), \
    pg_backend_pid() FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped";

/// What is wrong where each transaction has another server process.
const POOLED: &str = "the database's URL leads to a pooler, such as PgBouncer in transaction mode, which gives each \
    transaction another connection, so there is no lock and replicas get in each other's way: give the URL of the \
    database itself";

/// The statements for one table.
#[derive(Debug)]
pub(super) struct Sql {
    /// [`SHAPE`] of the table that these are about.
    shape: (Option<i64>, i32),
    /// Takes the limit.
    pub(super) read: String,
    /// Takes the limit, and arrays of sequences, keys and topics that are left out.
    pub(super) read_others: String,
    /// Takes arrays of sequences and ids.
    pub(super) settle: String,
    /// Takes the bound.
    pub(super) waiting: String,
}

impl Sql {
    pub(super) async fn new(
        spec: &SourceSpec,
        connection: &mut PgConnection,
    ) -> Result<Self, SourceError> {
        // First: what changes while this reads the columns is noticed later.
        let shape = shape(connection, &quoted_table(&spec.table)).await?;
        // What a view says of NULL says nothing of the table behind it.
        // A domain is what it is made of.
        let sql = "SELECT attname::text, format_type(coalesce(nullif(typbasetype, 0), atttypid), NULL), \
                   attnotnull OR relkind = 'v' \
                   FROM pg_attribute JOIN pg_class AS c ON c.oid = attrelid JOIN pg_type AS y ON y.oid = atttypid \
                   WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped";
        let existing: Vec<(String, String, bool)> = sqlx::query_as(sql)
            .bind(quoted_table(&spec.table))
            .fetch_all(&mut *connection)
            .await
            .map_err(SourceError::database("reading the table's columns"))?;
        let table_error = |reason| SourceError::Table { table: spec.table.clone(), reason };
        if existing.is_empty() {
            return Err(table_error("there is no such table".to_owned()));
        }
        let names: Vec<String> = existing.iter().map(|(name, ..)| name.clone()).collect();
        let columns = Columns::resolve(spec, &names, ("seq", ADVICE, false))?;
        let found = |name: &String| existing.iter().find(|(column, ..)| column == name);
        let kind = |name: &String| found(name).map_or("", |(_, kind, _)| kind.as_str());
        let name = &columns.sequence;
        if !matches!(kind(name), "bigint" | "integer" | "smallint") {
            let reason = format!("{name:?} is {}, not bigint: {ADVICE}", kind(name));
            return Err(table_error(reason));
        }
        if !found(name).is_some_and(|(_, _, filled)| *filled) {
            let reason = format!(
                "{name:?} may be NULL, and such a row has no place in the order: \
                 ALTER TABLE … ALTER COLUMN {} SET NOT NULL mends it",
                quoted(name)
            );
            return Err(table_error(reason));
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
        let selected = Selected::of(&columns, kind, encoding(connection).await?);
        let sql = Self::of(&spec.table, &columns, &selected, mark.as_ref());
        Ok(Self { shape, ..sql })
    }

    /// Whether the table still has the columns that these statements are about.
    ///
    /// # Errors
    /// Also when the connection is not the same any more, to the server: then there is no lock.
    pub(super) async fn is_current(
        &self,
        connection: &mut PgConnection,
        table: &str,
    ) -> Result<bool, SourceError> {
        let shape = shape(connection, table).await?;
        match shape.1 == self.shape.1 {
            true => Ok(shape == self.shape),
            false => Err(SourceError::Settings(POOLED.to_owned())),
        }
    }

    fn of(
        table: &str,
        columns: &Columns,
        selected: &Selected,
        mark: Option<&(String, bool)>,
    ) -> Self {
        let (table, sequence) = (quoted_table(table), quoted(&columns.sequence));
        let pending = match mark {
            None => "true".to_owned(),
            Some((column, true)) => format!("{column} IS NOT TRUE"),
            Some((column, false)) => format!("{column} IS NULL"),
        };
        // Every parameter has a use, whichever columns there are.
        let but = |column: Option<&String>, list: &str| match column {
            None => format!("AND {list}::text[] IS NOT NULL"),
            Some(name) => {
                let name = quoted(name);
                format!("AND ({name} IS NULL OR {name}::text <> ALL({list}::text[]))")
            }
        };
        let others = format!(
            "{pending} AND {sequence} <> ALL($2::bigint[]) {} {}",
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
            shape: (None, 0),
            read: selected.read(&table, &sequence, &pending),
            read_others: selected.read(&table, &sequence, &others),
            settle,
            waiting: format!(
                "SELECT count(*) FROM (SELECT 1 FROM {table} WHERE {pending} LIMIT $1) AS w"
            ),
        }
    }
}

async fn shape(
    connection: &mut PgConnection,
    table: &str,
) -> Result<(Option<i64>, i32), SourceError> {
    sqlx::query_as(SHAPE)
        .bind(table)
        .fetch_one(connection)
        .await
        .map_err(SourceError::database("reading the table's columns"))
}

/// The encoding to ask texts in. A database in `SQL_ASCII` knows of none and takes any bytes: it fails a whole answer in UTF-8
/// over one text that is not, so such a database is asked for the bytes as they are.
async fn encoding(connection: &mut PgConnection) -> Result<&'static str, SourceError> {
    let encoding: String = sqlx::query_scalar("SELECT getdatabaseencoding()::text")
        .fetch_one(connection)
        .await
        .map_err(SourceError::database("reading the database's encoding"))?;
    Ok(if encoding == "SQL_ASCII" { "SQL_ASCII" } else { "UTF8" })
}

/// What is read of a row.
struct Selected {
    /// The columns, each once: a user may have no right to others.
    columns: String,
    /// Values as bytes, each NULL where it is too large.
    values: String,
    /// The bytes of all values.
    bytes: String,
    /// Whether one is too large.
    cut: String,
}

impl Selected {
    fn of<'a>(columns: &'a Columns, kind: impl Fn(&'a String) -> &'a str, encoding: &str) -> Self {
        let bytes = |text: &str| format!("convert_to({text}, '{encoding}')");
        let texts = columns.texts();
        let used = texts.iter().flatten().copied().chain(&columns.data).chain([&columns.sequence]);
        let used: BTreeSet<String> = used.map(|name| quoted(name)).collect();
        let mut values = Vec::new();
        let mut sizes = Vec::new();
        for name in texts {
            let Some(name) = name else {
                values.push("NULL::bytea".to_owned());
                continue;
            };
            let value = text(name, kind(name));
            let attributes = columns.attributes.as_ref() == Some(name);
            let most = if attributes { MAX_EVENT_BYTES } else { MAX_TEXT_BYTES };
            // The size of a large text is known without reading it.
            let size = format!("octet_length({value})");
            values.push(bounded(&bytes(&value), &size, most));
            sizes.push((size, most));
        }
        values.push(match &columns.data {
            None => "NULL::bytea".to_owned(),
            Some(name) => {
                let name_quoted = quoted(name);
                let (size, value) = match kind(name) {
                    "bytea" => (format!("octet_length({name_quoted})"), name_quoted),
                    _ => (
                        format!("octet_length({name_quoted}::text)"),
                        bytes(&format!("{name_quoted}::text")),
                    ),
                };
                let value = bounded(&value, &size, MAX_EVENT_BYTES);
                sizes.push((size, MAX_EVENT_BYTES));
                value
            }
        });
        Self {
            columns: used.into_iter().collect::<Vec<_>>().join(", "),
            values: values.join(", "),
            bytes: joined(&sizes, " + ", |(size, _)| format!("coalesce({size}, 0)::bigint")),
            cut: format!(
                "duet_bytes > {MAX_TEXT_BYTES} AND ({})",
                joined(&sizes, " OR ", |(size, most)| format!("coalesce({size} > {most}, false)"))
            ),
        }
    }

    /// Sums up sizes before it loads values, so that neither side ever holds more than it may.
    fn read(&self, table: &str, sequence: &str, wanted: &str) -> String {
        let Self { columns, values, bytes, cut } = self;
        format!(
            "SELECT {sequence}::bigint, {values}, duet_bytes, {cut} FROM (\
             SELECT *, sum(duet_bytes) OVER (ORDER BY {sequence} ROWS UNBOUNDED PRECEDING) \
             - duet_bytes AS duet_before FROM (\
             SELECT {columns}, {bytes} AS duet_bytes FROM {table} WHERE {wanted} \
             ORDER BY {sequence} LIMIT $1) AS r) AS s \
             WHERE duet_before < {READ_BYTES} ORDER BY {sequence}"
        )
    }
}

/// A value unless it is too large. First asked is the size of the whole row, which is known by then.
fn bounded(value: &str, size: &str, most: usize) -> String {
    format!("CASE WHEN duet_bytes <= {most} OR {size} <= {most} THEN {value} END")
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
