//! Traffic policies: which ones apply, and what they come to, field by field.
//!
//! A field is taken from the first of: the route rule's own `timeouts` and `retry`; a policy on the rule
//! (`sectionName`); on the route; on the service's port (`sectionName`); on the service; the default. `retry` as a whole is
//! one field, as is `retryBudget`. Of two policies on the same target the older counts where both say when they were
//! created, else the first by name; the other is reported by [`super::validate`].

use std::time::Duration;

use duet_api::proto;
use duet_api::resource::{
    GrpcCode, Located, ObjectKey, Resource, Retry, RetryBudget, RouteRetry, RouteTimeouts,
    TrafficPolicy, TrafficPolicySpec,
};

use super::{ServicePort, wire};
use crate::index::Index;

pub(super) const ATTEMPTS: u32 = 2;
pub(super) const BACKOFF: Duration = Duration::from_millis(25);
pub(super) const MAX_BODY_BYTES: u64 = 64 << 10;
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const BUDGET: RetryBudget = RetryBudget { percent: 20, min_per_second: 10 };

/// Policies that apply somewhere, the most specific first.
#[derive(Clone, Debug, Default)]
pub(super) struct Chain<'i>(Vec<Link<'i>>);

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
        Self(on_target(index, &target, named))
    }

    /// The same with those on a route's rule and on the route in front.
    pub(super) fn with_route(
        &self,
        index: &'i Index,
        route: &ObjectKey,
        rule: Option<&str>,
    ) -> Self {
        let mut chain = on_target(index, route, rule);
        chain.extend(&self.0);
        Self(chain)
    }

    /// The same with those of another chain behind.
    pub(super) fn before(mut self, other: &Self) -> Self {
        self.0.extend(&other.0);
        self
    }

    fn first<T>(&self, field: impl Fn(&'i TrafficPolicySpec) -> Option<T>) -> Option<T> {
        self.first_located(field).map(|(value, _)| value)
    }

    /// A field's value, and the resource that gives it.
    pub(super) fn first_located<T>(
        &self,
        field: impl Fn(&'i TrafficPolicySpec) -> Option<T>,
    ) -> Option<(T, &'i Located)> {
        self.0.iter().find_map(|link| Some((field(&link.policy.spec)?, link.located)))
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
fn grpc_code(code: GrpcCode) -> u32 {
    code as u32
}

/// The bound on all retries of calls to a service.
pub(super) fn retry_budget(index: &Index, port: &ServicePort) -> proto::RetryBudget {
    let budget = Chain::of_service(index, port).first(|spec| spec.retry_budget).unwrap_or(BUDGET);
    proto::RetryBudget { percent: budget.percent, min_per_second: budget.min_per_second }
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

/// The first policy on a section of a target, then the first on the whole target.
fn on_target<'i>(index: &'i Index, target: &ObjectKey, section: Option<&str>) -> Vec<Link<'i>> {
    let section = section.filter(|section| !section.is_empty());
    let on_section = section.and_then(|section| first_policy(index, target, Some(section)));
    let on_whole = first_policy(index, target, None);
    on_section.into_iter().chain(on_whole).collect()
}

/// The policy that counts on a target, of those that name exactly it. They come by name; one that was created earlier
/// takes the place of the one before (Gateway API's rule), where both say when.
pub(super) fn first_policy<'i>(
    index: &'i Index,
    target: &ObjectKey,
    section: Option<&str>,
) -> Option<Link<'i>> {
    let created = |link: &Link<'_>| link.policy.metadata.creation_timestamp;
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
    named.reduce(|first, next| match (created(&first), created(&next)) {
        (Some(first_at), Some(next_at)) if next_at < first_at => next,
        _ => first,
    })
}
