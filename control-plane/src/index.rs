//! Every resource and every replica, by name, and what refers to what. Pure: [`Index::apply`] takes a change and says
//! which services it touches; nobody here waits, locks or looks at a clock. Imports nothing of this crate.
//!
//! Some kinds of resource refer to others: routes to the services they attach to and to policies, policies to services,
//! routes and topics, endpoint slices, subscriptions and outbox sources to services. The index keeps those references backwards, so that everything
//! that shapes a service is found from its name.

mod references;
mod replica;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use duet_api::resource::{EndpointSlice, Located, Metadata, ObjectKey, Resource, Service};

use references::references;
pub use references::{parent_service, route_parents, target_object};
pub use replica::{Replica, ReplicaKey, ReplicaPort};

/// Annotation of a Service: the accounts that may register replicas of it, comma-separated.
pub const ACCOUNTS_ANNOTATION: &str = "duet.dev/service-accounts";
/// Label of an `EndpointSlice` that names its service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Names a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ServiceKey {
    /// From both parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// As the key of the `Service` resource.
    #[must_use]
    pub fn object(&self) -> ObjectKey {
        object("Service", &self.namespace, &self.name)
    }
}

impl std::fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Key of a resource.
#[must_use]
pub fn object(kind: &'static str, namespace: &str, name: &str) -> ObjectKey {
    ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() }
}

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    /// A resource is new or different.
    Put(Arc<Located>),
    /// A resource is gone.
    Remove(ObjectKey),
    /// A replica is new or different.
    PutReplica(Replica),
    /// A replica is gone.
    RemoveReplica(ReplicaKey),
}

/// What a change touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affected {
    /// Services whose configuration or endpoints may be different now.
    pub services: BTreeSet<ServiceKey>,
    /// Buses, topics or subscriptions may be different now.
    pub events: bool,
}

impl Affected {
    /// Nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.events
    }

    /// Adds what another change touches.
    pub fn merge(&mut self, other: Self) {
        self.services.extend(other.services);
        self.events |= other.events;
    }
}

/// Everything that is known.
#[derive(Clone, Debug, Default)]
pub struct Index {
    resources: BTreeMap<ObjectKey, Arc<Located>>,
    /// What refers to a resource, whether that exists or not.
    referrers: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    replicas: BTreeMap<ReplicaKey, Replica>,
    replicas_of: BTreeMap<ServiceKey, BTreeSet<ReplicaKey>>,
    grants_required: bool,
}

impl Index {
    /// Whether backends of other namespaces need a `ReferenceGrant`; to be said before anything is applied.
    pub fn require_grants(&mut self, required: bool) {
        self.grants_required = required;
    }

    /// Whether a route may refer to a service.
    #[must_use]
    pub fn grants(&self, route: &ObjectKey, service: &ServiceKey) -> bool {
        let lets = |located: &Arc<Located>| {
            let Resource::ReferenceGrant(grant) = &located.resource else {
                return false;
            };
            grant.metadata.namespace == service.namespace
                && grant.lets(route.kind, &route.namespace, &service.name)
        };
        !self.grants_required
            || route.namespace == service.namespace
            || self.of_kind("ReferenceGrant").any(lets)
    }

    /// Takes a change in.
    pub fn apply(&mut self, change: Change) -> Affected {
        match change {
            Change::Put(located) => self.put(located),
            Change::Remove(key) => self.remove(&key),
            Change::PutReplica(replica) => self.put_replica(replica),
            Change::RemoveReplica(key) => self.remove_replica(&key),
        }
    }

    fn put(&mut self, located: Arc<Located>) -> Affected {
        let key = located.resource.key();
        if let Some(old) = self.resources.get_mut(&key)
            && old.resource == located.resource
        {
            // Only its place in a file may be new.
            *old = located;
            return Affected::default();
        }
        let mut affected = self.remove(&key);
        for target in references(&located.resource) {
            self.referrers.entry(target).or_default().insert(key.clone());
        }
        affected.merge(self.touched_by(&located.resource));
        self.resources.insert(key, located);
        affected
    }

    fn remove(&mut self, key: &ObjectKey) -> Affected {
        let Some(old) = self.resources.remove(key) else {
            return Affected::default();
        };
        for target in references(&old.resource) {
            if let Some(referrers) = self.referrers.get_mut(&target) {
                referrers.remove(key);
                if referrers.is_empty() {
                    self.referrers.remove(&target);
                }
            }
        }
        self.touched_by(&old.resource)
    }

    fn touched_by(&self, resource: &Resource) -> Affected {
        let mut affected = Affected::default();
        match resource {
            Resource::Service(service) => {
                affected.services.insert(service_key(&service.metadata));
                // It says who may consume for it.
                let annotations = service.metadata.annotations.keys();
                affected.events |= annotations.into_iter().any(|key| key == ACCOUNTS_ANNOTATION);
            }
            Resource::EventBus(_)
            | Resource::Topic(_)
            | Resource::Subscription(_)
            | Resource::OutboxSource(_)
            | Resource::AuthorizationPolicy(_) => {
                affected.events = true;
            }
            Resource::EndpointSlice(_)
            | Resource::HttpRoute(_)
            | Resource::GrpcRoute(_)
            | Resource::BackendPolicy(_)
            | Resource::TrafficPolicy(_) => {
                // Those that it refers to, and for a policy those of the routes that refer to it.
                let referring = self.referrers.get(&resource.key()).into_iter().flatten().cloned();
                for target in references(resource).into_iter().chain(referring) {
                    self.services_of(&target, &mut affected.services);
                }
            }
            Resource::ReferenceGrant(grant) => {
                for from in &grant.spec.from {
                    let routes = self
                        .resources
                        .keys()
                        .filter(|key| key.kind == from.kind && key.namespace == from.namespace);
                    for route in routes {
                        self.services_of(route, &mut affected.services);
                    }
                }
            }
        }
        affected
    }

    /// A service itself, or the services that a route attaches to.
    fn services_of(&self, target: &ObjectKey, services: &mut BTreeSet<ServiceKey>) {
        if target.kind == "Service" {
            services.insert(ServiceKey::new(&target.namespace, &target.name));
        } else if let Some(route) = self.resources.get(target)
            && let Some(parents) = route_parents(&route.resource)
        {
            let metadata = route.resource.metadata();
            services.extend(parents.iter().filter_map(|parent| parent_service(parent, metadata)));
        }
    }

    fn put_replica(&mut self, replica: Replica) -> Affected {
        let key = replica.key();
        if self.replicas.get(&key) == Some(&replica) {
            return Affected::default();
        }
        let mut affected = self.remove_replica(&key);
        for service in replica.service_keys() {
            self.replicas_of.entry(service.clone()).or_default().insert(key.clone());
            affected.services.insert(service);
        }
        self.replicas.insert(key, replica);
        affected
    }

    fn remove_replica(&mut self, key: &ReplicaKey) -> Affected {
        let Some(old) = self.replicas.remove(key) else {
            return Affected::default();
        };
        let mut affected = Affected::default();
        for service in old.service_keys() {
            if let Some(replicas) = self.replicas_of.get_mut(&service) {
                replicas.remove(key);
                if replicas.is_empty() {
                    self.replicas_of.remove(&service);
                }
            }
            affected.services.insert(service);
        }
        affected
    }

    /// A resource by its key.
    #[must_use]
    pub fn get(&self, key: &ObjectKey) -> Option<&Arc<Located>> {
        self.resources.get(key)
    }

    /// Every resource, by key.
    pub fn resources(&self) -> impl Iterator<Item = (&ObjectKey, &Arc<Located>)> {
        self.resources.iter()
    }

    /// Every resource of a kind, by key.
    pub fn of_kind(&self, kind: &'static str) -> impl Iterator<Item = &Arc<Located>> {
        let first = object(kind, "", "");
        let ours = move |(key, _): &(&ObjectKey, _)| key.kind == kind;
        self.resources.range(first..).take_while(ours).map(|(_, located)| located)
    }

    /// Everything that refers to a resource, by key.
    pub fn referrers<'i>(
        &'i self,
        target: &ObjectKey,
    ) -> impl Iterator<Item = &'i Arc<Located>> + use<'i> {
        let keys = self.referrers.get(target).into_iter().flatten();
        keys.filter_map(|key| self.resources.get(key))
    }

    /// A `Service` resource.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Service> {
        if let Resource::Service(service) = &self.resources.get(&key.object())?.resource {
            Some(service)
        } else {
            None
        }
    }

    /// The registered replicas of a service, by key.
    pub fn replicas_of<'i>(
        &'i self,
        key: &ServiceKey,
    ) -> impl Iterator<Item = &'i Replica> + use<'i> {
        let keys = self.replicas_of.get(key).into_iter().flatten();
        keys.filter_map(|key| self.replicas.get(key))
    }

    /// The `EndpointSlice`s of a service, by key.
    pub fn slices_of<'i>(
        &'i self,
        key: &ServiceKey,
    ) -> impl Iterator<Item = &'i EndpointSlice> + use<'i> {
        self.referrers(&key.object()).filter_map(|located| {
            if let Resource::EndpointSlice(slice) = &located.resource { Some(slice) } else { None }
        })
    }

    /// Declared, or registered by at least one replica.
    #[must_use]
    pub fn knows_service(&self, key: &ServiceKey) -> bool {
        self.replicas_of.contains_key(key) || self.service(key).is_some()
    }

    /// Namespaces that know a service of this name.
    #[must_use]
    pub fn namespaces_with(&self, name: &str) -> BTreeSet<&str> {
        let declared = self.of_kind("Service").map(|located| located.resource.metadata());
        let declared = declared.filter(|m| m.name == name).map(|m| m.namespace.as_str());
        let registered = self.replicas_of.keys().filter(|key| key.name == name);
        declared.chain(registered.map(|key| key.namespace.as_str())).collect()
    }

    /// A replica by its key.
    #[must_use]
    pub fn replica(&self, key: &ReplicaKey) -> Option<&Replica> {
        self.replicas.get(key)
    }

    /// Every replica, by key.
    pub fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.values()
    }
}

/// The service that metadata of a `Service` names.
#[must_use]
pub fn service_key(metadata: &Metadata) -> ServiceKey {
    ServiceKey::new(&metadata.namespace, &metadata.name)
}

#[cfg(test)]
mod tests;
