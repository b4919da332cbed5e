//! Parts of a traffic policy → the sidecar's form: balancing, outlier detection, faults, hedges, sessions, and what protects
//! a service from its callers. [`super::policy`] says which policy counts.

use duet_api::proto;
use duet_api::proto::{hash_on, hedge::After};
use duet_api::resource::{
    Concurrency, Connections, CookieLifetime, Fault, HashOn, Hedge, HedgeAfter, LoadBalancer,
    LoadBalancerType, OutlierDetection, Rate, RateLimit, SessionPersistence, SessionType,
    ZonePreference,
};

use super::matches;
use super::policy::grpc_code;
use super::wire;

/// Name of a session's cookie or header where the route names none.
pub(super) const SESSION_NAME: &str = "duet-session";

pub(super) fn session(session: &SessionPersistence) -> proto::SessionPersistence {
    let name = session.session_name.as_deref().unwrap_or(SESSION_NAME);
    let header = session.kind == SessionType::Header;
    proto::SessionPersistence {
        name: if header { name.to_ascii_lowercase() } else { name.to_owned() },
        header,
        absolute_timeout: session.absolute_timeout.and_then(wire),
        permanent: session.cookie_config.lifetime_type == CookieLifetime::Permanent,
    }
}

pub(super) fn fault(fault: &Fault) -> proto::Fault {
    let (delay, abort) = (fault.delay, fault.abort);
    proto::Fault {
        delay_ppm: delay.map_or(0, |delay| delay.percent),
        delay: delay.and_then(|delay| wire(delay.duration)),
        abort_ppm: abort.map_or(0, |abort| abort.percent),
        abort_status: abort.map_or(0, |abort| abort.status.into()),
        abort_grpc_status: abort.and_then(|abort| abort.grpc_status).map_or(0, grpc_code),
        headers: matches::headers(&fault.headers),
    }
}

pub(super) fn hedge(hedge: Hedge) -> proto::Hedge {
    let after = match hedge.after {
        HedgeAfter::Percentile(percentile) => Some(After::Percentile(percentile.into())),
        HedgeAfter::Delay(delay) => wire(delay).map(After::Delay),
    };
    proto::Hedge { after, max_percent: hedge.max_percent }
}

/// A backend without name, protocol and connect timeout.
pub(super) fn balancing(
    balancer: Option<&LoadBalancer>,
    outlier: OutlierDetection,
) -> proto::Backend {
    let kind = match balancer.map(|balancer| balancer.kind).unwrap_or_default() {
        LoadBalancerType::PeakEwma => proto::LoadBalancer::PeakEwma,
        LoadBalancerType::LeastRequest => proto::LoadBalancer::LeastRequest,
        LoadBalancerType::RoundRobin => proto::LoadBalancer::RoundRobin,
        LoadBalancerType::Random => proto::LoadBalancer::Random,
        LoadBalancerType::Maglev => proto::LoadBalancer::Maglev,
    };
    let hash_on = balancer.and_then(|balancer| balancer.hash_on.as_ref()).map(|on| match on {
        HashOn::Header(name) => hash_on::Kind::Header(name.to_ascii_lowercase()),
        HashOn::Cookie(name) => hash_on::Kind::Cookie(name.clone()),
        HashOn::Source(yes) => hash_on::Kind::Source(*yes),
    });
    proto::Backend {
        load_balancer: kind.into(),
        hash_on: hash_on.map(|kind| proto::HashOn { kind: Some(kind) }),
        slow_start: balancer.and_then(|balancer| balancer.slow_start).and_then(wire),
        prefer_zone: balancer.is_some_and(|balancer| balancer.zone == ZonePreference::Prefer),
        outlier_detection: Some(proto::OutlierDetection {
            consecutive_failures: outlier.consecutive_failures,
            min_success_percent: outlier.min_success_percent,
            min_requests: outlier.min_requests,
            min_ejection: wire(outlier.min_ejection),
            max_ejection: wire(outlier.max_ejection.max(outlier.min_ejection)),
            max_ejection_percent: outlier.max_ejection_percent,
        }),
        ..proto::Backend::default()
    }
}

/// Without service and ports. `None` where nothing limits anything.
pub(super) fn inbound(
    rate: Option<RateLimit>,
    concurrency: Option<Concurrency>,
    connections: Option<Connections>,
) -> Option<proto::InboundPolicy> {
    if rate.is_none() && concurrency.is_none() && connections.is_none() {
        return None;
    }
    let total = rate.map(|rate| limit(rate.requests, rate.per, rate.burst));
    let caller = rate.and_then(|rate| rate.per_caller);
    Some(proto::InboundPolicy {
        rate_limit: total,
        caller_rate_limit: caller.map(|Rate { requests, per, burst }| limit(requests, per, burst)),
        concurrency: concurrency.map(|limits| proto::Concurrency {
            adaptive: limits.adaptive,
            max: limits.max.unwrap_or(0),
        }),
        max_connections: connections.map_or(0, |connections| connections.max),
        ..proto::InboundPolicy::default()
    })
}

fn limit(requests: u32, per: std::time::Duration, burst: Option<u32>) -> proto::RateLimit {
    proto::RateLimit { requests, per: wire(per), burst: burst.unwrap_or(requests) }
}
