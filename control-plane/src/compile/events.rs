//! A sidecar's own configuration: which subscriptions it delivers, which buses there are, and what protects its
//! application.

use std::collections::BTreeSet;

use duet_api::proto;
use duet_api::resource::{EventBus, Resource, Start, Subscription};
use duet_api::spiffe::SpiffeId;

use super::{access, inbound, wire};
use crate::index::{Index, ServiceKey, object};

/// What a node gets for itself, without a version. Subscriptions of services that the node names but may not serve
/// are left out.
#[must_use]
pub fn workload(
    index: &Index,
    who: &SpiffeId,
    instance: &str,
    services: &BTreeSet<String>,
) -> proto::Workload {
    let allowed = |service: &String| {
        access::may_serve(index, who, &ServiceKey::new(who.namespace(), service)).is_ok()
    };
    let services = services.iter().filter(|service| allowed(service));
    let inbound = inbound::policies(index, who, instance, services.clone());
    let mut subscriptions: Vec<proto::Subscription> = services
        .flat_map(|service| index.referrers(&ServiceKey::new(who.namespace(), service).object()))
        .filter_map(|located| {
            if let Resource::Subscription(resource) = &located.resource {
                Some(subscription(resource))
            } else {
                None
            }
        })
        .collect();
    subscriptions.sort_by(|a, b| a.name.cmp(&b.name));
    proto::Workload { version: 0, subscriptions, buses: buses(index), inbound }
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
        ..proto::Subscription::default()
    }
}

fn buses(index: &Index) -> Vec<proto::Bus> {
    let declared = index.of_kind("EventBus").filter_map(|located| {
        if let Resource::EventBus(resource) = &located.resource {
            Some(bus(index, resource))
        } else {
            None
        }
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
fn declared_topics(index: &Index, bus: &str) -> BTreeSet<String> {
    let topics = index.of_kind("Topic").filter_map(|located| {
        let Resource::Topic(topic) = &located.resource else {
            return None;
        };
        (topic.spec.bus == bus).then(|| topic.metadata.name.clone())
    });
    topics.collect()
}

/// Whether a bus exists: declared, or the default one.
#[must_use]
pub fn knows_bus(index: &Index, name: &str) -> bool {
    name == duet_api::DEFAULT_BUS || event_bus(index, name).is_some()
}

fn event_bus<'i>(index: &'i Index, name: &str) -> Option<&'i EventBus> {
    if let Resource::EventBus(bus) = &index.get(&object("EventBus", "", name))?.resource {
        Some(bus)
    } else {
        None
    }
}

/// Checks that a bus takes publishes to a topic.
///
/// # Errors
/// Why not, for the publisher to read.
pub fn takes_topic(index: &Index, bus: &str, topic: &str) -> Result<(), String> {
    if !declared_only(index, bus) {
        return Ok(());
    }
    let located = index.get(&object("Topic", "", topic));
    let declared = located.is_some_and(
        |located| matches!(&located.resource, Resource::Topic(topic) if topic.spec.bus == bus),
    );
    match declared {
        true => Ok(()),
        false => Err(format!("bus {bus:?} takes declared topics only, and {topic:?} is not one")),
    }
}

/// Whether a bus refuses topics that no resource declares.
fn declared_only(index: &Index, bus: &str) -> bool {
    event_bus(index, bus).is_some_and(|bus| bus.spec.declared_topics_only)
}

/// Checks that a workload may consume a subscription, and returns it as it counts: as declared, where a resource
/// declares it. Others belong to the sidecars of their namespace, by their name `<namespace>/<name>`.
///
/// # Errors
/// Why not, for the consumer to read.
pub fn consumable(
    index: &Index,
    who: &SpiffeId,
    wanted: proto::Subscription,
) -> Result<proto::Subscription, String> {
    let Some((namespace, name)) = wanted.name.split_once('/') else {
        return Err(format!("subscription {:?} is not called <namespace>/<name>", wanted.name));
    };
    if namespace != who.namespace() {
        return Err(format!("{who} cannot consume subscription {:?}", wanted.name));
    }
    let located = index.get(&object("Subscription", namespace, name));
    let Some(Resource::Subscription(declared)) = located.map(|located| &located.resource) else {
        takes_topic(index, &wanted.bus, &wanted.topic)?;
        return Ok(wanted);
    };
    let service = ServiceKey::new(namespace, &declared.spec.subscriber.service);
    access::may_serve(index, who, &service)?;
    Ok(subscription(declared))
}
