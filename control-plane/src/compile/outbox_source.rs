//! An `OutboxSource` as the sidecars of its service get it.

use duet_api::proto;
use duet_api::resource::{AfterRelay, Database, OutboxColumns, OutboxSource};

use super::wire;

/// The resource as the wire has it.
pub(super) fn outbox_source(resource: &OutboxSource) -> proto::OutboxSource {
    use proto::outbox_source::Database as Wire;
    let (metadata, spec) = (&resource.metadata, &resource.spec);
    let name = format!("{}/{}", metadata.namespace, metadata.name);
    let database = match spec.database.clone() {
        Database::Url(url) => Wire::Url(url),
        Database::Env(variable) => Wire::UrlEnv(variable),
        Database::File(path) => Wire::UrlFile(path),
    };
    let mark_column = match &spec.after_relay {
        AfterRelay::Delete => String::new(),
        AfterRelay::Mark(column) => column.clone(),
    };
    let content_type = spec.data_content_type.clone();
    proto::OutboxSource {
        database: Some(database),
        table: spec.table.clone(),
        bus: spec.bus.clone(),
        topic: spec.topic.clone().unwrap_or_default(),
        // With the resource's name in it, ids of two tables never meet.
        source: spec.source.clone().unwrap_or_else(|| format!("/{name}")),
        r#type: spec.event_type.clone().unwrap_or_default(),
        data_content_type: content_type.unwrap_or_else(|| "application/json".to_owned()),
        columns: Some(columns(&spec.columns)),
        mark_column,
        poll: wire(spec.poll),
        name,
    }
}

fn columns(columns: &OutboxColumns) -> proto::OutboxColumns {
    let name = |column: &Option<String>| column.clone().unwrap_or_default();
    proto::OutboxColumns {
        sequence: name(&columns.sequence),
        id: name(&columns.id),
        topic: name(&columns.topic),
        r#type: name(&columns.event_type),
        data: name(&columns.data),
        partition_key: name(&columns.partition_key),
        source: name(&columns.source),
        subject: name(&columns.subject),
        time: name(&columns.time),
        data_content_type: name(&columns.data_content_type),
        traceparent: name(&columns.traceparent),
        tracestate: name(&columns.tracestate),
        attributes: name(&columns.attributes),
    }
}
