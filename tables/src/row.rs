//! A row, and the event that it is.

use duet_events::Event;
use duet_events::cloudevent::{EnvelopeError, PARTITION_KEY};
use serde_json::Value;

use crate::spec::SourceSpec;

/// Largest event; as large as one that an application publishes by itself.
pub(crate) const MAX_EVENT_BYTES: usize = 4 << 20;
/// Longest text that is loaded, but for the attributes, which are an event's like the data.
pub(crate) const MAX_TEXT_BYTES: usize = 64 << 10;
/// A read ends with the row that brings it over this: it holds so much, and one row.
pub(crate) const READ_BYTES: usize = 2 << 20;
/// Longest name of a topic, as on the bus.
const MAX_TOPIC_BYTES: usize = 255;

/// Names one row: its place, and its id so that a place that was used again is not mistaken for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowKey {
    pub(crate) sequence: i64,
    pub(crate) id: String,
}

/// What became of rows that were to be deleted or marked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    /// How many there still were, and are settled.
    pub(crate) rows: u64,
    /// Those that the application has locked.
    pub(crate) locked: Vec<RowKey>,
}

/// The first rows that wait, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) rows: Vec<Row>,
    /// There may be more: so many rows were asked for, or they have so many bytes.
    pub(crate) more: bool,
}

impl Read {
    pub(crate) fn new(rows: Vec<Row>, limit: u32) -> Self {
        let full = u32::try_from(rows.len()).is_ok_and(|count| count >= limit);
        let bytes: usize = rows.iter().map(|row| row.bytes).sum();
        Self { more: full || bytes >= READ_BYTES, rows }
    }
}

/// What a table says of one event, as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) sequence: i64,
    pub(crate) id: Option<String>,
    pub(crate) topic: Option<String>,
    pub(crate) event_type: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) source: Option<String>,
    pub(crate) subject: Option<String>,
    pub(crate) time: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) traceparent: Option<String>,
    pub(crate) tracestate: Option<String>,
    pub(crate) attributes: Option<String>,
    pub(crate) data: Option<Vec<u8>>,
    /// A column that is no text.
    pub(crate) unreadable: bool,
    /// Of all its columns, in the table.
    pub(crate) bytes: usize,
    /// A column is too large to be loaded, and stands here as absent.
    pub(crate) cut: bool,
}

impl Row {
    /// From texts in the order of [`crate::columns::Columns::texts`]; `Err` is one that is not UTF-8.
    pub(crate) fn new(
        sequence: i64,
        texts: [Result<Option<String>, ()>; 11],
        data: Option<Vec<u8>>,
        (bytes, cut): (i64, bool),
    ) -> Self {
        let unreadable = texts.iter().any(Result::is_err);
        let [
            id,
            topic,
            event_type,
            key,
            source,
            subject,
            time,
            content_type,
            traceparent,
            tracestate,
            attributes,
        ] = texts.map(Result::unwrap_or_default);
        Self {
            sequence,
            id,
            topic,
            event_type,
            key,
            source,
            subject,
            time,
            content_type,
            traceparent,
            tracestate,
            attributes,
            data,
            unreadable,
            bytes: usize::try_from(bytes).unwrap_or_default(),
            cut,
        }
    }

    /// Whether it is the row of this key.
    pub(crate) fn is(&self, sequence: i64, id: &str) -> bool {
        self.sequence == sequence && self.id.as_deref() == Some(id)
    }

    /// Its topic and event.
    ///
    /// # Errors
    /// When they are not valid; the row's author has to mend it.
    pub(crate) fn event(self, spec: &SourceSpec) -> Result<(String, Event), RowError> {
        if self.unreadable {
            return Err(RowError::Encoding);
        }
        match self.cut {
            true if self.bytes > MAX_EVENT_BYTES => return Err(RowError::TooLarge(self.bytes)),
            true => return Err(RowError::TooLong),
            false => {}
        }
        let topic = spec.topic.clone().or(self.topic).unwrap_or_default();
        check_topic(&topic)?;
        let id = self.id.ok_or(RowError::Missing("id"))?;
        let event_type = self.event_type.or_else(|| spec.event_type.clone());
        let source = self.source.unwrap_or_else(|| spec.source.clone());
        let mut event = Event::new(id, source, event_type.ok_or(RowError::Missing("type"))?)?;
        if let Some(attributes) = &self.attributes {
            event = with_all(event, attributes)?;
        }
        let time = self.time.map(|time| rfc3339(&time));
        let content_type = self.content_type.unwrap_or_else(|| spec.data_content_type.clone());
        let content_type = Some(content_type).filter(|t| self.data.is_some() && !t.is_empty());
        for (name, value) in [
            (PARTITION_KEY, self.key),
            ("subject", self.subject),
            ("time", time),
            ("datacontenttype", content_type),
            ("traceparent", self.traceparent),
            ("tracestate", self.tracestate),
        ] {
            if let Some(value) = value {
                event = event.with_attribute(name, &value)?;
            }
        }
        event.check_schedule()?;
        let event = match self.data {
            Some(data) => event.with_data(data),
            None => event,
        };
        match event.size() {
            size if size > MAX_EVENT_BYTES => Err(RowError::TooLarge(size)),
            _ => Ok((topic, event)),
        }
    }
}

fn check_topic(topic: &str) -> Result<(), RowError> {
    let odd = |c: char| c.is_control() || c.is_whitespace();
    if topic.is_empty() || topic.len() > MAX_TOPIC_BYTES || topic.contains(odd) {
        return Err(RowError::Topic(topic.chars().take(64).collect()));
    }
    Ok(())
}

/// The attributes of a JSON object. Numbers and booleans stay what they are.
fn with_all(mut event: Event, json: &str) -> Result<Event, RowError> {
    let Ok(Value::Object(attributes)) = serde_json::from_str(json) else {
        return Err(RowError::Attributes);
    };
    for (name, value) in attributes {
        event = match value {
            Value::Null => continue,
            Value::String(text) => event.with_attribute(&name, &text)?,
            Value::Bool(_) | Value::Number(_) => event.with_literal(&name, &value.to_string())?,
            Value::Array(_) | Value::Object(_) => return Err(RowError::Attributes),
        };
    }
    Ok(event)
}

/// What SQLite's `CURRENT_TIMESTAMP` writes is a time in UTC without saying so. Anything else stays as it is, and is
/// checked as an attribute.
fn rfc3339(time: &str) -> String {
    let Some((date, clock)) = time.split_once(' ') else {
        return time.to_owned();
    };
    let utc = if clock.ends_with(['Z', 'z']) || clock.contains(['+', '-']) { "" } else { "Z" };
    format!("{date}T{clock}{utc}")
}

/// A text of a database that does not promise UTF-8; `Err`: it is not.
pub(crate) fn utf8(bytes: Option<Vec<u8>>) -> Result<Option<String>, ()> {
    bytes.map(|bytes| String::from_utf8(bytes).map_err(drop)).transpose()
}

/// Why a row is no event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RowError {
    #[error("a column is not UTF-8")]
    Encoding,
    #[error("{0:?} is not a topic: 1 to 255 bytes, without white space and control characters")]
    Topic(String),
    #[error("its {0} is NULL")]
    Missing(&'static str),
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    #[error("its attributes are not a JSON object of strings, numbers and booleans")]
    Attributes,
    #[error("the event has {0} bytes, over {MAX_EVENT_BYTES}")]
    TooLarge(usize),
    #[error("a text has over {MAX_TEXT_BYTES} bytes; only data and attributes may be that long")]
    TooLong,
    /// By the bus.
    #[error("{0}")]
    Refused(String),
}

#[cfg(test)]
mod tests;
