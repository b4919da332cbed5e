//! A sidecar's own configuration: which subscriptions it delivers, which tables it relays, which buses there are, and what
//! protects its application.

use std::collections::BTreeSet;
use std::time::Duration;

use duet_api::proto;
use duet_api::resource::{
    BusBackend, EmbeddedBackend, EventBus, Operation, Resource, Start, Subscription,
};
use duet_api::spiffe::SpiffeId;

use super::outbox_source::outbox_source;
use super::{access, authorize, inbound, wire};
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
    let mut subscriptions = Vec::new();
    let mut outbox_sources = Vec::new();
    for located in services
        .flat_map(|service| index.referrers(&ServiceKey::new(who.namespace(), service).object()))
    {
        if let Resource::Subscription(resource) = &located.resource {
            subscriptions.push(subscription(resource));
        } else if let Resource::OutboxSource(resource) = &located.resource {
            outbox_sources.push(outbox_source(resource));
        }
    }
    subscriptions.sort_by(|a, b| a.name.cmp(&b.name));
    outbox_sources.sort_by(|a, b| a.name.cmp(&b.name));
    let buses = buses(index, who);
    // The stream knows its version, and who was shut out.
    proto::Workload { subscriptions, buses, inbound, outbox_sources, ..Default::default() }
}

/// A subscription resource as the wire and the bus know it.
#[must_use]
pub fn subscription(resource: &Subscription) -> proto::Subscription {
    let (metadata, spec) = (&resource.metadata, &resource.spec);
    let dead_letter = spec.dead_letter_topic.clone();
    let routes = spec.routes.iter().map(|route| proto::EventRoute {
        r#match: route.matches.clone(),
        path: route.path.clone(),
    });
    let (start, start_time, start_position) = start(spec.start);
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
        raw_payload: spec.raw_payload,
        start_time,
        start_position,
        ordered: spec.delivery.ordered,
        filter: spec.filter.clone().unwrap_or_default(),
        routes: routes.collect(),
        broadcast: spec.broadcast,
        once: spec.delivery.once,
        bulk_max: spec.bulk.map_or(0, |bulk| bulk.max),
        bulk_wait: spec.bulk.and_then(|bulk| wire(bulk.wait)),
        // The resource keeps it; replicas' own subscriptions of a broadcast go some time after their replica.
        idle_expiry: None,
    }
}

fn start(start: Start) -> (proto::Start, Option<prost_types::Timestamp>, u64) {
    match start {
        Start::Latest => (proto::Start::Latest, None, 0),
        Start::Earliest => (proto::Start::Earliest, None, 0),
        Start::Position(position) => (proto::Start::Position, None, position),
        Start::Time(time) => {
            let nanos = time.subsec_nanosecond();
            let time = prost_types::Timestamp { seconds: time.as_second(), nanos };
            (proto::Start::Time, Some(time), 0)
        }
    }
}

fn buses(index: &Index, who: &SpiffeId) -> Vec<proto::Bus> {
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
    // Policies name topics, on whatever bus.
    let denied = authorize::denied_topics(index, who);
    for bus in &mut buses {
        bus.denied.clone_from(&denied);
    }
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

/// Names of every bus, in order.
#[must_use]
pub fn bus_names(index: &Index) -> Vec<String> {
    let declared = index.of_kind("EventBus").map(|located| &located.resource.metadata().name);
    let default = duet_api::DEFAULT_BUS.to_owned();
    let names: BTreeSet<String> = declared.cloned().chain([default]).collect();
    names.into_iter().collect()
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

/// What keeps the events of a bus; the default bus is embedded unless a resource says otherwise.
#[must_use]
pub fn bus_backend(index: &Index, name: &str) -> BusBackend {
    event_bus(index, name).map_or_else(
        || BusBackend::Embedded(EmbeddedBackend::default()),
        |bus| bus.spec.backend.clone(),
    )
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

/// Whether a resource declares a subscription, by its name on the bus. A replica's own of a broadcast is declared by
/// its replica.
#[must_use]
pub fn declares_subscription(index: &Index, bus: &str, name: &str) -> bool {
    let Some((namespace, name)) = name.split_once('/') else { return false };
    let located = index.get(&object("Subscription", namespace, name));
    located.is_some_and(|located| {
        matches!(&located.resource, Resource::Subscription(resource)
            if resource.spec.bus == bus && !resource.spec.broadcast)
    })
}

/// Whether a bus refuses topics that no resource declares.
fn declared_only(index: &Index, bus: &str) -> bool {
    event_bus(index, bus).is_some_and(|bus| bus.spec.declared_topics_only)
}

/// A replica's own subscription of a broadcast is forgotten this long after its last consumer.
const BROADCAST_IDLE: Duration = Duration::from_secs(600);

/// A subscription as it counts for whoever consumes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Consumable {
    /// The subscription.
    pub subscription: proto::Subscription,
    /// A resource says so; else the consumer.
    pub declared: bool,
}

/// Checks that a workload may consume a subscription, and returns it as it counts: as declared, where a resource
/// declares it. Others are an application's own, as their names say. Every replica consumes a broadcast under a name of
/// its own, `<namespace>/<name>@<replica>`.
///
/// # Errors
/// Why not, for the consumer to read.
pub fn consumable(
    index: &Index,
    who: &SpiffeId,
    wanted: proto::Subscription,
) -> Result<Consumable, String> {
    let Some((namespace, name)) = wanted.name.split_once('/') else {
        return Err(format!("subscription {:?} is not called <namespace>/<name>", wanted.name));
    };
    if namespace != who.namespace() {
        return Err(format!("{who} cannot consume subscription {:?}", wanted.name));
    }
    let (resource, replica) = match name.split_once('@') {
        Some((resource, replica)) => (resource, Some(replica)),
        None => (name, None),
    };
    let located = index.get(&object("Subscription", namespace, resource));
    let Some(Resource::Subscription(declared)) = located.map(|located| &located.resource) else {
        owns(index, who, name, &wanted)?;
        return undeclared(index, who, wanted);
    };
    let service = ServiceKey::new(namespace, &declared.spec.subscriber.service);
    access::may_serve(index, who, &service)?;
    let mut counts = subscription(declared);
    match (counts.broadcast, replica) {
        (false, None) => {}
        (true, Some(replica)) if !replica.is_empty() => {
            // What was published before the replica was there is not for it.
            (counts.start, counts.start_time, counts.start_position) =
                (proto::Start::Latest.into(), None, 0);
            counts.idle_expiry = wire(BROADCAST_IDLE);
            counts.name = wanted.name;
        }
        (true, _) => {
            let name = &counts.name;
            return Err(format!("{name:?} is a broadcast; each replica consumes {name}@<replica>"));
        }
        (false, Some(_)) => {
            return Err(format!(
                "{:?} is no broadcast: it has no part of each replica",
                counts.name
            ));
        }
    }
    Ok(Consumable { subscription: counts, declared: true })
}

/// Whom a sidecar without a service names as the owner of its readers' subscriptions.
const PURE_CLIENT: &str = "client";

/// Checks that a subscription which no resource declares is the workload's own: it would get the events of whoever has
/// it. Sidecars call an application's subscription in code, or by a stream, `<service>.<topic>`, and
/// `<service>.<bus>.<topic>` on another bus than the default one; that of a reader of server-sent events is
/// `<service>.sse.<uuid>`. Services and topics may have dots, so what follows the service is taken off the end.
fn owns(
    index: &Index,
    who: &SpiffeId,
    name: &str,
    wanted: &proto::Subscription,
) -> Result<(), String> {
    let service = if let Some(service) = readers_service(name) {
        if service == PURE_CLIENT {
            return Ok(());
        }
        Some(service)
    } else {
        let bus = Some(&wanted.bus).filter(|bus| *bus != duet_api::DEFAULT_BUS);
        let service = without_end(name, &wanted.topic);
        bus.map_or(service, |bus| without_end(service?, bus))
    };
    let namespace = who.namespace();
    let Some(service) = service.filter(|service| !service.is_empty()) else {
        return Err(format!(
            "no resource declares subscription {:?}, and one that an application makes to topic {:?} of bus {:?} has \
             another name",
            wanted.name, wanted.topic, wanted.bus
        ));
    };
    access::may_serve(index, who, &ServiceKey::new(namespace, service))
        .map_err(|why| format!("{who} cannot consume subscription {:?}: {why}", wanted.name))
}

/// The service of a reader's subscription, if it is one.
fn readers_service(name: &str) -> Option<&str> {
    let (rest, id) = name.rsplit_once('.')?;
    uuid::Uuid::try_parse(id).ok()?;
    without_end(rest, "sse")
}

/// What precedes `.<end>`.
fn without_end<'n>(name: &'n str, end: &str) -> Option<&'n str> {
    name.strip_suffix(end)?.strip_suffix('.')
}

/// A subscription that the application itself asks for.
fn undeclared(
    index: &Index,
    who: &SpiffeId,
    wanted: proto::Subscription,
) -> Result<Consumable, String> {
    takes_topic(index, &wanted.bus, &wanted.topic)?;
    let letters = &wanted.dead_letter_topic;
    let named = !letters.is_empty() && *letters != format!("{}.dead-letter", wanted.topic);
    // Who gives events up publishes them, to wherever it says.
    if named {
        takes_topic(index, &wanted.bus, letters)?;
        if let Some(why) = authorize(index, who, Operation::Publish, letters).denied {
            return Err(why);
        }
    }
    Ok(Consumable { subscription: wanted, declared: false })
}

#[cfg(test)]
mod tests;
