//! Event buses that would be kept in the same place. Each removes there what none of its own resources declares: two of
//! them would remove each other's topics and subscriptions. One counts, the default bus or else the first by name.
//! Imports [`crate::index`].

use std::collections::BTreeSet;

use duet_api::DEFAULT_BUS;
use duet_api::resource::{BusBackend, EventBus, Located, NatsBackend, Resource};

use crate::index::{Index, object};

/// The bus, if any, that is kept where this one would be, and counts.
pub(super) fn rival<'i>(index: &'i Index, bus: &EventBus) -> Option<&'i Located> {
    let rank = |name: &str| (name != DEFAULT_BUS, name.to_owned());
    let BusBackend::Nats(own) = &bus.spec.backend else { return None };
    let counts = |located: &&'i Located| {
        let Resource::EventBus(other) = &located.resource else { return false };
        let BusBackend::Nats(there) = &other.spec.backend else { return false };
        rank(&other.metadata.name) < rank(&bus.metadata.name) && overlap(own, there)
    };
    let others = index.of_kind("EventBus").map(AsRef::as_ref).filter(counts);
    others.min_by_key(|located| rank(&located.resource.metadata().name))
}

/// Why a bus cannot be opened where its resource has it.
#[must_use]
pub fn cluster_taken(index: &Index, name: &str) -> Option<String> {
    let Resource::EventBus(bus) = &index.get(&object("EventBus", "", name))?.resource else {
        return None;
    };
    rival(index, bus).map(|rival| taken(&rival.resource.metadata().name))
}

pub(super) fn taken(rival: &str) -> String {
    format!(
        "EventBus {rival:?} is kept on the same servers with the same streamPrefix: they would remove each other's topics \
         and subscriptions; give this one a streamPrefix of its own"
    )
}

fn overlap(one: &NatsBackend, other: &NatsBackend) -> bool {
    let hosts = |backend: &NatsBackend| -> BTreeSet<String> {
        let host = |url: &String| url.split_once("://").map(|(_, host)| host.to_ascii_lowercase());
        backend.servers.iter().filter_map(host).collect()
    };
    one.stream_prefix == other.stream_prefix && !hosts(one).is_disjoint(&hosts(other))
}
