//! Which column means what. A column that the resource names must exist; one with its usual name is used where the
//! table has it.

use crate::spec::{SourceError, SourceSpec};

/// What a column of the table means. `None`: the table has no such column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Columns {
    pub(crate) sequence: String,
    pub(crate) id: String,
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
    pub(crate) data: Option<String>,
    pub(crate) mark: Option<String>,
}

impl Columns {
    /// From what the resource names and what the table has. `sequence` is the usual name of that column and what to do
    /// where it is missing; a database may have one that is no column.
    ///
    /// # Errors
    /// When a column is missing that must be there.
    pub(crate) fn resolve(
        spec: &SourceSpec,
        existing: &[String],
        (sequence, advice, implied): (&str, &str, bool),
    ) -> Result<Self, SourceError> {
        let table_error = |reason| SourceError::Table { table: spec.table.clone(), reason };
        let missing = |name: &str| table_error(format!("it has no column {name:?}"));
        let has = |name: &str| existing.iter().any(|column| column == name);
        let optional = |given: &str, usual: &str| match given {
            "" => Ok(Some(usual).filter(|usual| has(usual)).map(str::to_owned)),
            name if has(name) => Ok(Some(name.to_owned())),
            name => Err(missing(name)),
        };
        let needed = |given: &str, usual: &str| {
            optional(given, usual).and_then(|name| name.ok_or_else(|| missing(usual)))
        };
        let names = &spec.columns;
        let sequence = match names.sequence.as_str() {
            "" if implied || has(sequence) => sequence.to_owned(),
            "" => return Err(table_error(format!("it has no column {sequence:?}: {advice}"))),
            name if has(name) => name.to_owned(),
            name => return Err(missing(name)),
        };
        let event_type = match spec.event_type {
            Some(_) => optional(&names.r#type, "type")?,
            None => Some(needed(&names.r#type, "type")?),
        };
        Ok(Self {
            sequence,
            id: needed(&names.id, "id")?,
            topic: match spec.topic {
                Some(_) => None,
                None => Some(needed(&names.topic, "aggregatetype")?),
            },
            event_type,
            key: optional(&names.partition_key, "aggregateid")?,
            source: optional(&names.source, "source")?,
            subject: optional(&names.subject, "subject")?,
            time: optional(&names.time, "time")?,
            content_type: optional(&names.data_content_type, "datacontenttype")?,
            traceparent: optional(&names.traceparent, "traceparent")?,
            tracestate: optional(&names.tracestate, "tracestate")?,
            attributes: optional(&names.attributes, "attributes")?,
            data: optional(&names.data, "payload")?,
            mark: match &spec.mark {
                Some(name) if !has(name) => return Err(missing(name)),
                mark => mark.clone(),
            },
        })
    }

    /// The texts of a row, in the order in which [`crate::row::Row`] reads them.
    pub(crate) fn texts(&self) -> [Option<&String>; 11] {
        [
            Some(&self.id),
            self.topic.as_ref(),
            self.event_type.as_ref(),
            self.key.as_ref(),
            self.source.as_ref(),
            self.subject.as_ref(),
            self.time.as_ref(),
            self.content_type.as_ref(),
            self.traceparent.as_ref(),
            self.tracestate.as_ref(),
            self.attributes.as_ref(),
        ]
    }
}

/// What is made of each, one after the other.
pub(crate) fn joined<T>(all: &[T], between: &str, of: impl Fn(&T) -> String) -> String {
    all.iter().map(of).collect::<Vec<_>>().join(between)
}

/// A name as SQL takes it, whatever it holds; a schema is quoted by itself.
pub(crate) fn quoted_table(name: &str) -> String {
    name.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

/// A name as SQL takes it, whatever it holds.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use duet_api::proto;

    use super::*;

    fn spec(change: impl FnOnce(&mut proto::OutboxSource)) -> SourceSpec {
        let mut raw = proto::OutboxSource {
            name: "a/b".to_owned(),
            database: Some(proto::outbox_source::Database::Url("sqlite:a".to_owned())),
            table: "outbox".to_owned(),
            bus: "default".to_owned(),
            source: "/a/b".to_owned(),
            columns: Some(proto::OutboxColumns::default()),
            ..proto::OutboxSource::default()
        };
        change(&mut raw);
        raw.try_into().unwrap()
    }

    fn resolve(spec: &SourceSpec, existing: &[&str]) -> Result<Columns, String> {
        let existing: Vec<String> = existing.iter().map(|name| (*name).to_owned()).collect();
        Columns::resolve(spec, &existing, ("seq", "add it", false)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_table_of_debezium_needs_a_sequence_only() {
        let debezium = ["id", "aggregatetype", "aggregateid", "type", "payload"];
        let error = resolve(&spec(|_| ()), &debezium).unwrap_err();
        assert_eq!(error, "table \"outbox\": it has no column \"seq\": add it");
        let columns = resolve(&spec(|_| ()), &[&debezium[..], &["seq"]].concat()).unwrap();
        assert_eq!(columns.topic.as_deref(), Some("aggregatetype"));
        assert_eq!(columns.key.as_deref(), Some("aggregateid"));
        assert_eq!((columns.source, columns.attributes), (None, None));
    }

    #[test]
    fn columns_that_are_named_must_exist() {
        let named = |raw: &mut proto::OutboxSource| {
            raw.topic = "t".to_owned();
            raw.r#type = "x".to_owned();
            raw.columns.get_or_insert_default().subject = "about".to_owned();
        };
        let error = resolve(&spec(named), &["seq", "id"]).unwrap_err();
        assert_eq!(error, "table \"outbox\": it has no column \"about\"");
        let columns = resolve(&spec(named), &["seq", "id", "about"]).unwrap();
        assert_eq!((columns.subject.as_deref(), columns.topic), (Some("about"), None));
        let mark = spec(|raw| raw.mark_column = "done".to_owned());
        let all = ["seq", "id", "aggregatetype", "type"];
        assert!(resolve(&mark, &all).unwrap_err().contains("\"done\""));
        let error = resolve(&spec(|_| ()), &["seq", "id", "aggregatetype"]).unwrap_err();
        assert_eq!(error, "table \"outbox\": it has no column \"type\"");
    }

    #[test]
    fn names_are_quoted() {
        assert_eq!(quoted_table("app.out\"box"), "\"app\".\"out\"\"box\"");
    }
}
