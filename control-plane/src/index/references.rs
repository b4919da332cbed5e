//! What a resource refers to.

use duet_api::resource::{HttpFilter, Metadata, ObjectKey, ParentRef, Resource, TargetKind};

use super::{SERVICE_NAME_LABEL, ServiceKey, object};

/// The service that a route's parent is; none where it is something else, such as a gateway. Gateway API wants the
/// group written out as empty; leaving it out is taken as the same.
#[must_use]
pub fn parent_service(parent: &ParentRef, route: &Metadata) -> Option<ServiceKey> {
    let service = parent.kind.as_deref() == Some("Service");
    let core = matches!(parent.group.as_deref(), None | Some("" | "core"));
    let namespace = parent.namespace.as_ref().unwrap_or(&route.namespace);
    (service && core).then(|| ServiceKey::new(namespace, &parent.name))
}

/// The parents of a route; none for other resources.
#[must_use]
pub fn route_parents(resource: &Resource) -> Option<&[ParentRef]> {
    if let Resource::HttpRoute(route) = resource {
        Some(&route.spec.parent_refs)
    } else if let Resource::GrpcRoute(route) = resource {
        Some(&route.spec.parent_refs)
    } else {
        None
    }
}

/// What a resource refers to, as far as the index follows it backwards.
pub(super) fn references(resource: &Resource) -> Vec<ObjectKey> {
    match resource {
        Resource::HttpRoute(route) => {
            let filters = route.spec.rules.iter().map(|rule| rule.filters.as_slice());
            route_references(&route.spec.parent_refs, &route.metadata, filters)
        }
        Resource::GrpcRoute(route) => {
            let filters = route.spec.rules.iter().map(|rule| rule.filters.as_slice());
            route_references(&route.spec.parent_refs, &route.metadata, filters)
        }
        Resource::TrafficPolicy(policy) => {
            let targets = policy.spec.target_refs.iter();
            let namespace = &policy.metadata.namespace;
            targets.map(|target| target_object(target.kind, namespace, &target.name)).collect()
        }
        Resource::BackendPolicy(policy) => {
            let targets = policy.spec.target_refs.iter();
            let namespace = &policy.metadata.namespace;
            targets.map(|target| object("Service", namespace, &target.name)).collect()
        }
        Resource::EndpointSlice(slice) => {
            let service = slice.metadata.labels.get(SERVICE_NAME_LABEL);
            let namespace = &slice.metadata.namespace;
            service.map(|name| object("Service", namespace, name)).into_iter().collect()
        }
        Resource::Subscription(subscription) => {
            let namespace = &subscription.metadata.namespace;
            vec![object("Service", namespace, &subscription.spec.subscriber.service)]
        }
        Resource::OutboxSource(source) => {
            vec![object("Service", &source.metadata.namespace, &source.spec.service)]
        }
        Resource::AuthorizationPolicy(policy) => {
            // Topics are mesh-wide.
            let targets = policy.spec.target_refs.iter();
            targets.map(|target| object("Topic", "", &target.name)).collect()
        }
        Resource::Service(_)
        | Resource::ReferenceGrant(_)
        | Resource::EventBus(_)
        | Resource::Topic(_) => Vec::new(),
    }
}

/// The services that a route attaches to, and the policies that its filters name.
fn route_references<'r>(
    parents: &[ParentRef],
    metadata: &Metadata,
    filters: impl Iterator<Item = &'r [HttpFilter]>,
) -> Vec<ObjectKey> {
    let services = parents.iter().filter_map(|parent| parent_service(parent, metadata));
    let policies = filters.flatten().filter_map(|filter| filter.extension_ref.as_ref());
    let policies = policies.map(|named| object("TrafficPolicy", &metadata.namespace, &named.name));
    services.map(|service| service.object()).chain(policies).collect()
}

/// What a policy's target is.
#[must_use]
pub fn target_object(kind: TargetKind, namespace: &str, name: &str) -> ObjectKey {
    object(kind.name(), namespace, name)
}
