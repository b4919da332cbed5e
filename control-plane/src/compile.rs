//! From the index to what one sidecar needs: pure functions, no locks, no clock. [`destination`] answers a `Subscribe`,
//! [`workload`] a `Node`; [`validate`] finds what is wrong with references, and [`lint`] what is wrong inside one
//! resource; [`explain`] says which resource each part of a destination comes from. Imports [`crate::index`].
//!
//! # From a name to rules
//!
//! 1. [`authority`]: what was dialled, as seen from the caller's namespace → one port of one service.
//! 2. `routes`: the routes attached there → rules in order of precedence, with `filters` and `policy` filled in;
//!    without any route one rule that matches everything.
//! 3. `endpoints`: each backend that the rules name → the addresses behind it.

pub mod access;
pub mod authority;
mod authorize;
mod clusters;
mod endpoints;
mod events;
pub mod explain;
mod fields;
mod filters;
mod inbound;
pub mod lint;
mod matches;
mod outbox_source;
mod policy;
mod protect;
mod routes;
mod shadow;
pub mod validate;

use std::collections::{BTreeMap, BTreeSet};

use duet_api::proto;

use crate::index::{Index, ServiceKey};

pub use authorize::{Decision, authorize};
pub use clusters::cluster_taken;
pub use events::{
    Consumable, bus_backend, bus_names, consumable, declares_subscription, knows_bus, subscription,
    takes_topic, workload,
};

/// Endpoints of one backend, by address.
pub type Endpoints = BTreeMap<String, proto::Endpoint>;

/// One port of one service: what a backend is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// The service.
    pub service: ServiceKey,
    /// The port that callers dial.
    pub port: u16,
}

impl std::fmt::Display for ServicePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// A destination, compiled for callers of one namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct Compiled {
    /// How to use it, or why it is not known.
    pub outcome: Result<proto::Destination, String>,
    /// What is behind each backend of the destination.
    pub endpoints: BTreeMap<String, Endpoints>,
    /// Every service that was looked at, known or not: when one of them changes, compile again.
    pub depends_on: BTreeSet<ServiceKey>,
}

/// Compiles what `authority` means to a caller in `namespace`.
#[must_use]
pub fn destination(index: &Index, namespace: &str, authority: &str) -> Compiled {
    let parsed = match authority::parse(authority, namespace) {
        Ok(parsed) => parsed,
        Err(why) => return not_found(why, BTreeSet::new()),
    };
    let mut depends_on = BTreeSet::from([parsed.service.clone()]);
    if let Err(why) = authority::resolve(index, &parsed) {
        return not_found(why, depends_on);
    }
    let rules = routes::rules(index, namespace, &parsed);
    depends_on.extend(rules.backends.iter().map(|backend| backend.service.clone()));
    depends_on.extend(rules.missing);
    let mut endpoints = BTreeMap::new();
    let mut backends = Vec::new();
    for backend in &rules.backends {
        let (proto, behind) = endpoints::backend(index, backend, &parsed);
        endpoints.insert(proto.name.clone(), behind);
        backends.push(proto);
    }
    let outcome = Ok(proto::Destination {
        service: parsed.to_string(),
        rules: rules.rules,
        backends,
        retry_budget: Some(policy::retry_budget(index, &parsed)),
    });
    Compiled { outcome, endpoints, depends_on }
}

fn not_found(why: String, depends_on: BTreeSet<ServiceKey>) -> Compiled {
    Compiled { outcome: Err(why), endpoints: BTreeMap::new(), depends_on }
}

/// A duration for the wire; the resources' durations always fit.
fn wire(duration: std::time::Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

#[cfg(test)]
mod precedence_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
