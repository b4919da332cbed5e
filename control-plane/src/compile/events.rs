//! The event half of a sidecar's configuration: which subscriptions it delivers and which buses there are.

use std::collections::BTreeSet;

use duet_api::proto;
use duet_api::resource::{EventBus, Resource, Start, Subscription};
use duet_api::spiffe::SpiffeId;

use super::{access, wire};
use crate::index::{Index, ServiceKey};

/// What a node gets for itself, without a version. Subscriptions of services that the node names but may not serve
/// are left out.
#[must_use]
pub fn workload(index: &Index, who: &SpiffeId, services: &BTreeSet<String>) -> proto::Workload {
    let allowed = |service: &String| {
        access::may_serve(index, who, &ServiceKey::new(who.namespace(), service)).is_ok()
    };
    let services = services.iter().filter(|service| allowed(service));
    let mut subscriptions: Vec<proto::Subscription> = services
        .flat_map(|service| index.referrers(&ServiceKey::new(who.namespace(), service).object()))
        .filter_map(|located| match &located.resource {
            Resource::Subscription(resource) => Some(subscription(resource)),
            _ => None,
        })
        .collect();
    subscriptions.sort_by(|a, b| a.name.cmp(&b.name));
    proto::Workload { version: 0, subscriptions, buses: buses(index) }
}

/// A subscription resource as the wire and the bus know it.
#[must_use]
pub fn subscription(resource: &Subscription) -> proto::Subscription {
    let (metadata, spec) = (&resource.metadata, &resource.spec);
    let start = match spec.start {
        Start::Latest => proto::Start::Latest,
        Start::Earliest => proto::Start::Earliest,
    };
    let dead_letter = spec.dead_letter_topic.clone();
    proto::Subscription {
        name: format!("{}/{}", metadata.namespace, metadata.name),
        bus: spec.bus.clone(),
        topic: spec.topic.clone(),
        path: spec.subscriber.path.clone(),
        max_in_flight: spec.delivery.max_in_flight,
        ack_timeout: wire(spec.delivery.ack_timeout),
        max_attempts: spec.retry.max_attempts,
        backoff: wire(spec.retry.backoff),
        max_backoff: wire(spec.retry.max_backoff),
        dead_letter_topic: dead_letter.unwrap_or_else(|| format!("{}.dead-letter", spec.topic)),
        start: start.into(),
        raw_payload: false,
    }
}

fn buses(index: &Index) -> Vec<proto::Bus> {
    let declared = index.of_kind("EventBus").filter_map(|located| match &located.resource {
        Resource::EventBus(resource) => Some(bus(index, resource)),
        _ => None,
    });
    let mut buses: Vec<proto::Bus> = declared.collect();
    if !buses.iter().any(|bus| bus.name == duet_api::DEFAULT_BUS) {
        buses.push(embedded(duet_api::DEFAULT_BUS));
    }
    buses.sort_by(|a, b| a.name.cmp(&b.name));
    buses
}

fn bus(index: &Index, resource: &EventBus) -> proto::Bus {
    let name = &resource.metadata.name;
    let mut bus = embedded(name);
    bus.declared_topics_only = resource.spec.declared_topics_only;
    if bus.declared_topics_only {
        bus.topics = declared_topics(index, name).into_iter().collect();
    }
    bus
}

fn embedded(name: &str) -> proto::Bus {
    proto::Bus {
        name: name.to_owned(),
        backend: Some(proto::bus::Backend::Embedded(proto::EmbeddedBus {})),
        ..proto::Bus::default()
    }
}

/// Names of the topics that resources declare on a bus.
#[must_use]
pub fn declared_topics(index: &Index, bus: &str) -> BTreeSet<String> {
    let topics = index.of_kind("Topic").filter_map(|located| match &located.resource {
        Resource::Topic(topic) if topic.spec.bus == bus => Some(topic.metadata.name.clone()),
        _ => None,
    });
    topics.collect()
}
