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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use duet_api::spiffe::SpiffeId;

    use super::super::testing::index;
    use super::super::workload;
    use super::*;

    #[test]
    fn a_node_gets_the_tables_of_the_services_that_it_may_serve() {
        let index = index(
            "{apiVersion: duet.dev/v1alpha1, kind: OutboxSource, metadata: {name: o, namespace: shop}, spec: {service: orders, database: {urlFrom: {env: URL}}, afterRelay: {mark: done}, columns: {data: body}}}\n---\n\
             {apiVersion: duet.dev/v1alpha1, kind: OutboxSource, metadata: {name: p, namespace: shop}, spec: {service: payments, database: {url: 'sqlite:a'}}}\n---\n\
             {apiVersion: duet.dev/v1alpha1, kind: OutboxSource, metadata: {name: o, namespace: other}, spec: {service: orders, database: {url: 'sqlite:a'}}}",
        );
        let who = SpiffeId::new("duet.local", "shop", "orders").unwrap();
        let services = BTreeSet::from(["orders".to_owned(), "payments".to_owned()]);
        let sources = workload(&index, &who, "none", &services).outbox_sources;
        let [source] = sources.as_slice() else { panic!("{sources:?}") };
        assert_eq!((source.name.as_str(), source.source.as_str()), ("shop/o", "/shop/o"));
        assert_eq!((source.table.as_str(), source.bus.as_str()), ("outbox", "default"));
        assert_eq!(source.database, Some(proto::outbox_source::Database::UrlEnv("URL".to_owned())));
        assert_eq!((source.mark_column.as_str(), source.topic.as_str()), ("done", ""));
        assert_eq!(source.data_content_type, "application/json");
        assert_eq!(source.columns.as_ref().unwrap().data, "body");
        assert_eq!(source.poll.as_ref().unwrap().nanos, 50_000_000);
    }
}
