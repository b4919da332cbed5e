//! The statements for a table in SQLite.

use sqlx::SqliteConnection;

use crate::columns::{Columns, joined, quoted, quoted_table};
use crate::row::{MAX_EVENT_BYTES, MAX_TEXT_BYTES, READ_BYTES};
use crate::spec::{SourceError, SourceSpec};

/// The statements for one table.
#[derive(Debug)]
pub(super) struct Sql {
    /// `PRAGMA schema_version` of the columns that these are about.
    schema: i64,
    /// Takes the limit.
    pub(super) read: String,
    /// Takes the limit, and JSON lists of sequences, keys and topics that are left out.
    pub(super) read_others: String,
    /// Takes a JSON list of sequences and ids.
    pub(super) settle: String,
    /// Takes a bound. `None`: every row has a place.
    pub(super) unplaced: Option<String>,
    /// Takes the bound.
    pub(super) waiting: String,
}

impl Sql {
    pub(super) async fn new(
        spec: &SourceSpec,
        connection: &mut SqliteConnection,
    ) -> Result<Self, SourceError> {
        let (schema, table) = spec.table.split_once('.').unwrap_or(("main", &spec.table));
        // First: what changes while this reads the columns is noticed later.
        let version = schema_version(connection).await?;
        let existing: Vec<(String, String, i64)> =
            // All but hidden ones of virtual tables; the shorter list leaves out generated columns.
            sqlx::query_as(
                "SELECT name, upper(type), pk FROM pragma_table_xinfo(?1, ?2) WHERE hidden <> 1",
            )
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
        let encoding: String = sqlx::query_scalar("PRAGMA encoding")
            .fetch_one(&mut *connection)
            .await
            .map_err(SourceError::database("reading the database's encoding"))?;
        if encoding != "UTF-8" {
            let reason = format!("its database is {encoding}, and only UTF-8 is read");
            return Err(table_error(&reason));
        }
        let names: Vec<String> = existing.iter().map(|(name, ..)| name.clone()).collect();
        let columns = Columns::resolve(spec, &names, ("rowid", "", true))?;
        let sql =
            "SELECT sql FROM ".to_owned() + &quoted(schema) + ".sqlite_master WHERE name = ?1";
        let created: Option<String> = sqlx::query_scalar(&sql)
            .bind(table)
            .fetch_optional(connection)
            .await
            .map_err(SourceError::database("reading the table's definition"))?
            // SQLite finds it by another case too, but its lock has the name that is given.
            .ok_or_else(|| table_error("there is no such table: its name has other letters"))?;
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
        Ok(Self::of(version, &spec.table, &columns, mark.as_ref()))
    }

    /// Whether the table still has the columns that these statements are about.
    pub(super) async fn is_current(
        &self,
        connection: &mut SqliteConnection,
    ) -> Result<bool, SourceError> {
        Ok(schema_version(connection).await? == self.schema)
    }

    fn of(schema: i64, table: &str, columns: &Columns, mark: Option<&(String, bool)>) -> Self {
        let table = quoted_table(table);
        let (sequence, counted) = match columns.sequence.as_str() {
            "rowid" => ("rowid".to_owned(), true),
            name => (quoted(name), false),
        };
        let pending = match mark {
            None => "1".to_owned(),
            Some((column, true)) => format!("coalesce({column}, 0) = 0"),
            Some((column, false)) => format!("{column} IS NULL"),
        };
        // Any column but `rowid` may hold anything, whatever the table says.
        let (placed, unplaced) = match counted {
            true => (pending.clone(), None),
            false => {
                let id = text(&quoted(&columns.id));
                let other = format!(
                    "SELECT CAST({id} AS BLOB) FROM {table} \
                     WHERE {pending} AND typeof({sequence}) <> 'integer' LIMIT ?1"
                );
                (format!("{pending} AND typeof({sequence}) = 'integer'"), Some(other))
            }
        };
        let but = |column: Option<&String>, list: &str| {
            column.map_or(String::new(), |name| {
                let other =
                    format!("{} NOT IN (SELECT value FROM json_each({list}))", text(&quoted(name)));
                format!(" AND ({} IS NULL OR {other})", quoted(name))
            })
        };
        let others = format!(
            "{placed} AND {sequence} NOT IN (SELECT value FROM json_each(?2)){}{}",
            but(columns.key.as_ref(), "?3"),
            but(columns.topic.as_ref(), "?4"),
        );
        // By the place first, which is found at once; the id guards against another row that has its place by now.
        let these = format!(
            "{sequence} IN (SELECT o.{sequence} FROM json_each(?1) AS j CROSS JOIN {table} AS o \
             ON o.{sequence} = json_extract(j.value, '$[0]') AND {} = json_extract(j.value, '$[1]'))",
            text(&format!("o.{}", quoted(&columns.id)))
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
        let selected = Selected::of(columns);
        Self {
            schema,
            read: selected.read(&table, &sequence, &placed),
            read_others: selected.read(&table, &sequence, &others),
            settle,
            unplaced,
            waiting: format!(
                "SELECT count(*) FROM (SELECT 1 FROM {table} WHERE {pending} LIMIT ?1)"
            ),
        }
    }
}

/// Another one after every change of a table.
async fn schema_version(connection: &mut SqliteConnection) -> Result<i64, SourceError> {
    sqlx::query_scalar("PRAGMA schema_version")
        .fetch_one(connection)
        .await
        .map_err(SourceError::database("reading the schema's version"))
}

/// What is read of a row.
struct Selected {
    /// Values as bytes, each NULL where it is too large.
    values: String,
    /// The bytes of all values.
    bytes: String,
    /// Whether one is too large.
    cut: String,
}

impl Selected {
    fn of(columns: &Columns) -> Self {
        let mut values = Vec::new();
        let mut sizes = Vec::new();
        let mut value = |name: Option<&String>, of: fn(&str) -> String, most: usize| {
            let Some(name) = name else {
                values.push("NULL".to_owned());
                return;
            };
            let name = quoted(name);
            // The size of a large value is known without reading it.
            let size = format!("octet_length({name})");
            let bytes = of(&name);
            values.push(format!("CASE WHEN {size} <= {most} THEN CAST({bytes} AS BLOB) END"));
            sizes.push((size, most));
        };
        for name in columns.texts() {
            let attributes = name.is_some() && name == columns.attributes.as_ref();
            value(name, text, if attributes { MAX_EVENT_BYTES } else { MAX_TEXT_BYTES });
        }
        value(columns.data.as_ref(), str::to_owned, MAX_EVENT_BYTES);
        Self {
            values: values.join(", "),
            bytes: joined(&sizes, " + ", |(size, _)| format!("coalesce({size}, 0)")),
            cut: joined(&sizes, " OR ", |(size, most)| format!("coalesce({size} > {most}, 0)")),
        }
    }

    /// Sums up sizes before it loads values. They are loaded by themselves, not passed through that sum: SQLite would
    /// keep them all, and it is in this process.
    fn read(&self, table: &str, sequence: &str, wanted: &str) -> String {
        let Self { values, bytes, cut } = self;
        format!(
            "SELECT {sequence}, {values}, {bytes}, {cut} FROM {table} WHERE {wanted} ORDER BY {sequence} \
             LIMIT (SELECT count(*) FROM (\
             SELECT sum(bytes) OVER (ORDER BY place ROWS UNBOUNDED PRECEDING) - bytes AS before FROM (\
             SELECT {sequence} AS place, {bytes} AS bytes FROM {table} WHERE {wanted} \
             ORDER BY {sequence} LIMIT ?1)) WHERE before < {READ_BYTES})"
        )
    }
}

/// A column, by its quoted name, as text; bytes, such as those of a UUID, in hex.
fn text(name: &str) -> String {
    format!("CASE typeof({name}) WHEN 'blob' THEN lower(hex({name})) ELSE CAST({name} AS TEXT) END")
}
