//! Traffic policies: which ones apply, and what they come to, field by field.
//!
//! A field is taken from the first of: the route rule's own `timeouts` and `retry`; a policy on the rule
//! (`sectionName`); on the route; on the service's port (`sectionName`); on the service; the default. `retry` as a whole is
//! one field, as is `retryBudget`. Of two policies on the same target the older counts where both say when they were
//! created, else the first by name; the other is reported by [`super::validate`]. Gateway API's own
//! `XBackendTrafficPolicy` comes before the defaults.

use std::time::Duration;

use duet_api::proto;
use duet_api::resource::{
    BackendPolicySpec, GrpcCode, HttpFilter, Located, ObjectKey, Resource, Retry, RetryBudget,
    RouteRetry, RouteTimeouts, SessionPersistence, TrafficPolicy, TrafficPolicySpec,
};

use super::{ServicePort, protect, wire};
use crate::index::{Index, object};

pub(super) const ATTEMPTS: u32 = 2;
pub(super) const BACKOFF: Duration = Duration::from_millis(25);
pub(super) const MAX_BODY_BYTES: u64 = 64 << 10;
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const BUDGET: RetryBudget = RetryBudget { percent: 20, min_per_second: 10 };

/// Policies that apply somewhere, the most specific first.
#[derive(Clone, Debug, Default)]
pub(super) struct Chain<'i> {
    links: Vec<Link<'i>>,
    /// Gateway API's own policy on the service.
    standard: Option<(&'i BackendPolicySpec, &'i Located)>,
}

/// A policy, and where it was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link<'i> {
    pub(super) located: &'i Located,
    pub(super) policy: &'i TrafficPolicy,
}

impl<'i> Chain<'i> {
    /// Those on a service's port and on the service.
    pub(super) fn of_service(index: &'i Index, port: &ServicePort) -> Self {
        let target = port.service.object();
        let named = index.service(&port.service).and_then(|service| {
            service.spec.ports.iter().find(|p| p.port == port.port).map(|p| p.name.as_str())
        });
        Self { links: on_target(index, &target, named), standard: standard(index, &target) }
    }

    /// The same with those on a route's rule and on the route in front.
    pub(super) fn with_route(
        &self,
        index: &'i Index,
        route: &ObjectKey,
        rule: Option<&str>,
    ) -> Self {
        let mut links = on_target(index, route, rule);
        links.extend(&self.links);
        Self { links, ..*self }
    }

    /// The same with those that a rule's filters name in front, and why one of them cannot be used: the rule's requests
    /// are then answered with 500, as a filter must not be skipped (Gateway API, `ExtensionRef`).
    pub(super) fn with_extensions(
        &self,
        index: &'i Index,
        route: &ObjectKey,
        filters: &[HttpFilter],
    ) -> (Self, Option<String>) {
        let (mut links, mut broken) = (Vec::new(), None);
        for named in filters.iter().filter_map(|filter| filter.extension_ref.as_ref()) {
            let key = object("TrafficPolicy", &route.namespace, &named.name);
            let ours = named.group == duet_api::resource::GROUP && named.kind == key.kind;
            let found = index.get(&key).filter(|_| ours).map(|located| &**located);
            if let Some(located) = found
                && let Resource::TrafficPolicy(policy) = &located.resource
            {
                links.push(Link { located, policy });
            } else {
                broken = Some(format!("{route}: there is no {} {:?}", named.kind, named.name));
            }
        }
        links.extend(&self.links);
        (Self { links, ..*self }, broken)
    }

    /// Gateway API's own policy on the service, which comes last.
    pub(super) fn standard(&self) -> Option<(&'i BackendPolicySpec, &'i Located)> {
        self.standard
    }

    /// The same with those of another chain behind.
    pub(super) fn before(mut self, other: &Self) -> Self {
        self.links.extend(&other.links);
        self
    }

    fn first<T>(&self, field: impl Fn(&'i TrafficPolicySpec) -> Option<T>) -> Option<T> {
        self.first_located(field).map(|(value, _)| value)
    }

    /// What keeps a client at one endpoint.
    pub(super) fn session(
        &self,
        own: Option<&SessionPersistence>,
    ) -> Option<proto::SessionPersistence> {
        let standard = self.standard.and_then(|(spec, _)| spec.session_persistence.as_ref());
        own.or(standard).map(protect::session)
    }

    /// Failures made on purpose.
    pub(super) fn fault(&self) -> Option<proto::Fault> {
        self.first(|spec| spec.fault.as_ref()).map(protect::fault)
    }

    /// When a second try is sent beside the first.
    pub(super) fn hedge(&self) -> Option<proto::Hedge> {
        self.first(|spec| spec.hedge).map(protect::hedge)
    }

    /// A field's value, and the resource that gives it.
    pub(super) fn first_located<T>(
        &self,
        field: impl Fn(&'i TrafficPolicySpec) -> Option<T>,
    ) -> Option<(T, &'i Located)> {
        self.links.iter().find_map(|link| Some((field(&link.policy.spec)?, link.located)))
    }

    /// Bounds on waiting. What nobody set stays absent: the sidecar's default is not a plain number.
    pub(super) fn timeouts(&self, own: Option<&RouteTimeouts>) -> proto::Timeouts {
        let request = own.and_then(|own| own.request);
        let backend = own.and_then(|own| own.backend_request);
        let field = |own: Option<Duration>, get: fn(&TrafficPolicySpec) -> Option<Duration>| {
            own.or_else(|| self.first(get)).and_then(wire)
        };
        proto::Timeouts {
            request: field(request, |spec| spec.timeouts.request),
            backend_request: field(backend, |spec| spec.timeouts.backend_request),
            idle: field(None, |spec| spec.timeouts.idle),
        }
    }

    /// When to try again.
    pub(super) fn retry(&self, own: Option<&RouteRetry>) -> proto::Retry {
        let policy = self.first(|spec| spec.retry.as_ref());
        let mut retry = from_policy(policy);
        if let Some(own) = own {
            retry.attempts = own.attempts.unwrap_or(retry.attempts);
            retry.backoff = own.backoff.and_then(wire).or(retry.backoff);
            if !own.codes.is_empty() {
                retry.codes = own.codes.iter().copied().map(u32::from).collect();
            }
        }
        retry
    }
}

fn from_policy(policy: Option<&Retry>) -> proto::Retry {
    let codes = policy.map(|policy| policy.codes.as_slice()).unwrap_or_default();
    let grpc_codes = policy.map(|policy| policy.grpc_codes.as_slice()).unwrap_or_default();
    proto::Retry {
        attempts: policy.map_or(ATTEMPTS, |policy| policy.attempts),
        codes: codes.iter().copied().map(u32::from).collect(),
        grpc_codes: grpc_codes.iter().copied().map(grpc_code).collect(),
        backoff: wire(policy.and_then(|policy| policy.backoff).unwrap_or(BACKOFF)),
        max_body_bytes: policy.and_then(|policy| policy.max_body_bytes).unwrap_or(MAX_BODY_BYTES),
    }
}

/// The discriminants of [`GrpcCode`] are gRPC's own numbers.
pub(super) fn grpc_code(code: GrpcCode) -> u32 {
    code as u32
}

/// The bound on all retries of calls to a service.
pub(super) fn retry_budget(index: &Index, port: &ServicePort) -> proto::RetryBudget {
    let chain = Chain::of_service(index, port);
    let standard = chain.standard.and_then(|(spec, _)| standard_budget(spec));
    let budget = chain.first(|spec| spec.retry_budget).or(standard).unwrap_or(BUDGET);
    proto::RetryBudget { percent: budget.percent, min_per_second: budget.min_per_second }
}

/// What Gateway API's own policy says of it.
pub(super) fn standard_budget(spec: &BackendPolicySpec) -> Option<RetryBudget> {
    spec.retry_constraint.map(|limit| RetryBudget {
        percent: limit.budget.percent,
        min_per_second: limit.min_retry_rate.per_second(),
    })
}

/// The bound on making a connection to a backend: as its own service says, else as the dialled service says.
pub(super) fn connect_timeout(
    index: &Index,
    backend: &ServicePort,
    dialled: &ServicePort,
) -> Option<prost_types::Duration> {
    let of = |port| Chain::of_service(index, port).first(|spec| spec.timeouts.connect);
    wire(of(backend).or_else(|| of(dialled)).unwrap_or(CONNECT_TIMEOUT))
}

/// A backend with how its endpoints are chosen and left alone: as its own service says, else as the dialled service
/// says.
pub(super) fn balancing(
    index: &Index,
    backend: &ServicePort,
    dialled: &ServicePort,
) -> proto::Backend {
    let (own, other) = (Chain::of_service(index, backend), Chain::of_service(index, dialled));
    let balancer = own.first(|spec| spec.load_balancer.as_ref());
    let balancer = balancer.or_else(|| other.first(|spec| spec.load_balancer.as_ref()));
    let outlier = own.first(|spec| spec.outlier_detection);
    let outlier = outlier.or_else(|| other.first(|spec| spec.outlier_detection));
    protect::balancing(balancer, outlier.unwrap_or_default())
}

/// What protects the replicas of a service's port from their callers; without ports. `None`: nothing does.
pub(super) fn protection(index: &Index, port: &ServicePort) -> Option<proto::InboundPolicy> {
    let chain = Chain::of_service(index, port);
    let rate = chain.first(|spec| spec.rate_limit);
    let concurrency = chain.first(|spec| spec.concurrency);
    let connections = chain.first(|spec| spec.connections);
    protect::inbound(rate, concurrency, connections)
}

/// The first policy on a section of a target, then the first on the whole target.
fn on_target<'i>(index: &'i Index, target: &ObjectKey, section: Option<&str>) -> Vec<Link<'i>> {
    let section = section.filter(|section| !section.is_empty());
    let on_section = section.and_then(|section| first_policy(index, target, Some(section)));
    let on_whole = first_policy(index, target, None);
    on_section.into_iter().chain(on_whole).collect()
}

/// The policy that counts on a target, of those that name exactly it.
pub(super) fn first_policy<'i>(
    index: &'i Index,
    target: &ObjectKey,
    section: Option<&str>,
) -> Option<Link<'i>> {
    let named = index.referrers(target).filter_map(|located| {
        let Resource::TrafficPolicy(policy) = &located.resource else {
            return None;
        };
        let names = policy.spec.target_refs.iter().any(|reference| {
            reference.kind.name() == target.kind
                && reference.name == target.name
                && reference.section_name.as_deref() == section
        });
        names.then_some(Link { located, policy })
    });
    older(named, |link| link.located)
}

/// Gateway API's own policy that counts on a service.
pub(super) fn standard<'i>(
    index: &'i Index,
    target: &ObjectKey,
) -> Option<(&'i BackendPolicySpec, &'i Located)> {
    let policies = index.referrers(target).filter_map(|located| {
        if let Resource::BackendPolicy(policy) = &located.resource {
            Some((&policy.spec, &**located))
        } else {
            None
        }
    });
    older(policies, |(_, located)| located)
}

/// The first, unless one behind it was created earlier (Gateway API's rule) and both say when. Policies come by name.
fn older<'i, T>(policies: impl Iterator<Item = T>, located: fn(&T) -> &'i Located) -> Option<T> {
    let created = |policy: &T| located(policy).resource.metadata().creation_timestamp;
    policies.reduce(|first, next| match (created(&first), created(&next)) {
        (Some(first_at), Some(next_at)) if next_at < first_at => next,
        _ => first,
    })
}
