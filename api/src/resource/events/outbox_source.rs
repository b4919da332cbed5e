//! `OutboxSource`: a table of the application's own database, whose rows are events to publish.

use std::fmt;
use std::time::Duration;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::default_bus;
use crate::duration;
use crate::resource::core::IgnoredEq;
use crate::resource::meta::{Metadata, label};

/// Longest name of a table or column: that of PostgreSQL.
const MAX_NAME_BYTES: usize = 63;

/// Rows of a table, to a topic.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutboxSource {
    #[serde(rename = "apiVersion")]
    _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    _kind: IgnoredEq,
    /// Name and namespace.
    pub metadata: Metadata,
    /// The source.
    pub spec: OutboxSourceSpec,
    #[serde(default, rename = "status")]
    _status: IgnoredEq,
}

/// Spec of an [`OutboxSource`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutboxSourceSpec {
    /// Name of a service in the same namespace: one of its replicas' sidecars relays the table.
    #[serde(deserialize_with = "label")]
    pub service: String,
    /// Where the table is.
    pub database: Database,
    /// Its name, with or without a schema. Default: `outbox`.
    #[serde(default = "default_table", deserialize_with = "table")]
    pub table: String,
    /// The bus. Default: `default`.
    #[serde(default = "default_bus")]
    pub bus: String,
    /// The topic of every row. Default: each row says it.
    #[serde(default, deserialize_with = "filled")]
    pub topic: Option<String>,
    /// `source` of rows that say none. Default: `/<namespace>/<name>` of this resource.
    #[serde(default, deserialize_with = "filled")]
    pub source: Option<String>,
    /// `type` of rows that say none.
    #[serde(default, rename = "type", deserialize_with = "filled")]
    pub event_type: Option<String>,
    /// `datacontenttype` of rows that say none. Default: `application/json`.
    #[serde(default, deserialize_with = "filled")]
    pub data_content_type: Option<String>,
    /// The table's columns, where they are not called as they usually are.
    #[serde(default)]
    pub columns: OutboxColumns,
    /// What becomes of a row that was published. Default: `delete`.
    #[serde(default)]
    pub after_relay: AfterRelay,
    /// How often the sidecar looks for new rows: 10 ms to 1 min. Default: 50 ms.
    #[serde(default = "default_poll", deserialize_with = "poll")]
    pub poll: Duration,
}

/// Where an application's database is: exactly one of the variants is given.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawDatabase")]
pub enum Database {
    /// `sqlite:` or `postgres:`, without a password.
    Url(String),
    /// The environment variable of the sidecar that holds the URL.
    Env(String),
    /// The file beside the sidecar that holds the URL.
    File(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawDatabase {
    #[serde(default, deserialize_with = "public_url")]
    url: Option<String>,
    url_from: Option<RawUrlFrom>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUrlFrom {
    #[serde(default, deserialize_with = "filled")]
    env: Option<String>,
    #[serde(default, deserialize_with = "filled")]
    file: Option<String>,
}

impl TryFrom<RawDatabase> for Database {
    type Error = &'static str;

    fn try_from(raw: RawDatabase) -> Result<Self, Self::Error> {
        match (raw.url, raw.url_from) {
            (Some(url), None) => Ok(Self::Url(url)),
            (None, Some(RawUrlFrom { env: Some(name), file: None })) => Ok(Self::Env(name)),
            (None, Some(RawUrlFrom { env: None, file: Some(path) })) => Ok(Self::File(path)),
            (None, Some(_)) => Err("urlFrom needs one of env and file"),
            (None, None) | (Some(_), Some(_)) => Err("one of url and urlFrom is needed"),
        }
    }
}

/// The `scheme:` of a database's URL is one that Duet can read.
#[must_use]
pub fn is_database_url(url: &str) -> bool {
    ["sqlite:", "postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme))
}

fn public_url<'de, D: Deserializer<'de>>(input: D) -> Result<Option<String>, D::Error> {
    let url = String::deserialize(input)?;
    if !is_database_url(&url) {
        // It is not repeated: it may be a secret in the wrong place.
        return Err(D::Error::custom("the URL starts with sqlite: or postgres://"));
    }
    if has_password(&url) {
        return Err(D::Error::custom(
            "a password does not belong into a resource: give urlFrom: {env: NAME} or {file: PATH}",
        ));
    }
    Ok(Some(url))
}

fn has_password(url: &str) -> bool {
    let rest = url.split_once("://").map_or("", |(_scheme, rest)| rest);
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let user = authority.rsplit_once('@').map_or("", |(user, _host)| user);
    let query = url.split_once('?').map_or("", |(_url, query)| query);
    let named = query.split('&').any(|pair| {
        let name = pair.split('=').next().unwrap_or_default();
        matches!(name, "password" | "sslpassword" | "key")
    });
    user.contains(':') || named
}

/// Names of columns. `None`: the usual name, where the table has such a column.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutboxColumns {
    /// Grows with every insert. Default: `rowid` in SQLite, `seq` in PostgreSQL.
    #[serde(deserialize_with = "column")]
    pub sequence: Option<String>,
    /// The event's `id`. Default: `id`.
    #[serde(deserialize_with = "column")]
    pub id: Option<String>,
    /// The topic, without `topic` in the spec. Default: `aggregatetype`.
    #[serde(deserialize_with = "column")]
    pub topic: Option<String>,
    /// The event's `type`. Default: `type`.
    #[serde(rename = "type", deserialize_with = "column")]
    pub event_type: Option<String>,
    /// The event's data. Default: `payload`.
    #[serde(deserialize_with = "column")]
    pub data: Option<String>,
    /// The partition key. Default: `aggregateid`.
    #[serde(deserialize_with = "column")]
    pub partition_key: Option<String>,
    /// The event's `source`. Default: `source`.
    #[serde(deserialize_with = "column")]
    pub source: Option<String>,
    /// The event's `subject`. Default: `subject`.
    #[serde(deserialize_with = "column")]
    pub subject: Option<String>,
    /// The event's `time`. Default: `time`.
    #[serde(deserialize_with = "column")]
    pub time: Option<String>,
    /// The event's `datacontenttype`. Default: `datacontenttype`.
    #[serde(deserialize_with = "column")]
    pub data_content_type: Option<String>,
    /// The W3C `traceparent`. Default: `traceparent`.
    #[serde(deserialize_with = "column")]
    pub traceparent: Option<String>,
    /// The W3C `tracestate`. Default: `tracestate`.
    #[serde(deserialize_with = "column")]
    pub tracestate: Option<String>,
    /// A JSON object of further attributes. Default: `attributes`.
    #[serde(deserialize_with = "column")]
    pub attributes: Option<String>,
}

/// What becomes of a row that was published: `delete` or `{mark: COLUMN}`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AfterRelay {
    /// It goes.
    #[default]
    Delete,
    /// This column says that, or when, it was published.
    Mark(String),
}

impl<'de> Deserialize<'de> for AfterRelay {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_any(AfterRelayVisitor)
    }
}

struct AfterRelayVisitor;

impl<'de> Visitor<'de> for AfterRelayVisitor {
    type Value = AfterRelay;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("delete or {mark: COLUMN}")
    }

    fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<AfterRelay, E> {
        match word {
            "delete" => Ok(AfterRelay::Delete),
            _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<AfterRelay, A::Error> {
        let mark = match map.next_key::<String>()?.as_deref() {
            Some("mark") => AfterRelay::Mark(name(map.next_value()?)?),
            Some(other) => return Err(A::Error::unknown_field(other, &["mark"])),
            None => return Err(A::Error::custom("the column to mark is missing")),
        };
        match map.next_key::<String>()? {
            None => Ok(mark),
            Some(other) => Err(A::Error::unknown_field(&other, &["mark"])),
        }
    }
}

fn default_table() -> String {
    "outbox".to_owned()
}

fn default_poll() -> Duration {
    Duration::from_millis(50)
}

fn poll<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let poll = duration::required(input)?;
    if (Duration::from_millis(10)..=Duration::from_secs(60)).contains(&poll) {
        return Ok(poll);
    }
    Err(D::Error::custom(format!("poll must be 10ms to 1m, not {}", duration::format(poll))))
}

fn filled<'de, D: Deserializer<'de>>(input: D) -> Result<Option<String>, D::Error> {
    match Option::<String>::deserialize(input)? {
        Some(text) if text.is_empty() => Err(D::Error::custom("is empty")),
        text => Ok(text),
    }
}

fn table<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let text = String::deserialize(input)?;
    if text.split('.').count() > 2 {
        return Err(D::Error::custom(format!("{text:?} is neither TABLE nor SCHEMA.TABLE")));
    }
    for part in text.split('.') {
        name::<D::Error>(part.to_owned())?;
    }
    Ok(text)
}

fn column<'de, D: Deserializer<'de>>(input: D) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(input)?.map(name).transpose()
}

/// What can be the name of a table or column; any characters, as it is always quoted.
fn name<E: serde::de::Error>(text: String) -> Result<String, E> {
    if (1..=MAX_NAME_BYTES).contains(&text.len()) && !text.contains(char::is_control) {
        return Ok(text);
    }
    Err(E::custom(format!("{text:?} is not a name of 1 to {MAX_NAME_BYTES} bytes")))
}
