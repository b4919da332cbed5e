//! The fields of a policy, as a table: their names, where each counts, and what counts where no policy says anything.
//! For [`super::explain`], which says where values come from, and [`super::validate`]. A new field of
//! [`TrafficPolicySpec`] is one more line in [`fields`]; what it does is compiled elsewhere.

use std::time::Duration;

use duet_api::resource::{
    BackendPolicySpec, CookieLifetime, Fault, Field as Step, HashOn, Hedge, HedgeAfter,
    LoadBalancer, LoadBalancerType, OutlierDetection, RateLimit, RouteRetry, RouteTimeouts,
    SessionPersistence, SessionType, TrafficPolicySpec, ZonePreference,
};
use duet_api::{duration, quantity};
use serde_json::{Value, json};

use super::policy::{ATTEMPTS, BACKOFF, BUDGET, CONNECT_TIMEOUT, MAX_BODY_BYTES, standard_budget};
use super::protect::SESSION_NAME;

/// Which policies are asked for a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Those on the rule and route that match, then those on the dialled service.
    Rule,
    /// Those on the dialled service.
    Service,
    /// Those on the backend's service, then those on the dialled service.
    Backend,
    /// Those on the backend's service: its replicas keep to them themselves, whatever was dialled.
    Replica,
}

/// A field of a policy, or of a part of it.
#[derive(Debug)]
pub(super) struct Field {
    /// Its path below `spec`.
    pub(super) name: &'static str,
    pub(super) scope: Scope,
    /// What counts without a policy. Null: what the sidecar does by itself.
    pub(super) default: Value,
    /// As a person would write it; none where a policy leaves it to another, null where it leaves it to the default.
    pub(super) of: fn(&TrafficPolicySpec) -> Option<Value>,
    /// The same of Gateway API's own policy, which has another name for it, and comes after all others.
    pub(super) standard: Option<Standard>,
}

/// A field of Gateway API's own policy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standard {
    pub(super) name: &'static str,
    pub(super) of: fn(&BackendPolicySpec) -> Option<Value>,
}

/// Every field, in the order of a request's life.
#[rustfmt::skip]
pub(super) fn fields() -> Vec<Field> {
    use Scope::{Backend, Replica, Rule, Service};
    let field = |name, scope, default, of| Field { name, scope, default, of, standard: None };
    vec![
        field("timeouts.request", Rule, Value::Null, |spec| spec.timeouts.request.map(time)),
        field("timeouts.backendRequest", Rule, Value::Null, |spec| spec.timeouts.backend_request.map(time)),
        field("timeouts.idle", Rule, Value::Null, |spec| spec.timeouts.idle.map(time)),
        field("retry.attempts", Rule, json!(ATTEMPTS), |spec| Some(json!(spec.retry.as_ref()?.attempts))),
        field("retry.codes", Rule, json!([]), |spec| Some(json!(spec.retry.as_ref()?.codes))),
        field("retry.grpcCodes", Rule, json!([]), |spec| Some(json!(spec.retry.as_ref()?.grpc_codes))),
        field("retry.backoff", Rule, time(BACKOFF), |spec| Some(json!(spec.retry.as_ref()?.backoff.map(time)))),
        field("retry.maxBodyBytes", Rule, bytes(MAX_BODY_BYTES), |spec| Some(json!(spec.retry.as_ref()?.max_body_bytes.map(bytes)))),
        field("retryBudget", Service, json!(BUDGET), |spec| Some(json!(spec.retry_budget?)))
            .or("retryConstraint", |spec| Some(json!(standard_budget(spec)?))),
        // Of a policy's own there is none.
        field("sessionPersistence", Rule, Value::Null, |_| None)
            .or("sessionPersistence", |spec| spec.session_persistence.as_ref().map(session)),
        field("hedge", Rule, Value::Null, |spec| spec.hedge.map(hedge)),
        field("fault", Rule, Value::Null, |spec| spec.fault.as_ref().map(fault)),
        field("loadBalancer", Backend, json!(LoadBalancerType::PeakEwma), |spec| spec.load_balancer.as_ref().map(balancer)),
        field("outlierDetection", Backend, outliers(OutlierDetection::default()), |spec| spec.outlier_detection.map(outliers)),
        field("timeouts.connect", Backend, time(CONNECT_TIMEOUT), |spec| spec.timeouts.connect.map(time)),
        field("rateLimit", Replica, Value::Null, |spec| spec.rate_limit.map(rate_limit)),
        field("concurrency", Replica, Value::Null, |spec| spec.concurrency.map(|c| given(&[("adaptive", json!(c.adaptive)), ("max", json!(c.max))]))),
        field("connections", Replica, Value::Null, |spec| spec.connections.map(|c| json!({"max": c.max}))),
    ]
}

/// What a rule of a route says itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own<'r> {
    pub(super) timeouts: Option<&'r RouteTimeouts>,
    pub(super) retry: Option<&'r RouteRetry>,
    pub(super) session: Option<&'r SessionPersistence>,
}

impl Own<'_> {
    /// Of a policy's field; there the rule has the same name for it.
    pub(super) fn of(&self, name: &str) -> Option<Value> {
        let Self { timeouts, retry, session: own_session } = *self;
        match name {
            "timeouts.request" => timeouts?.request.map(time),
            "timeouts.backendRequest" => timeouts?.backend_request.map(time),
            "retry.attempts" => retry?.attempts.map(|attempts| json!(attempts)),
            "retry.codes" => {
                Some(&retry?.codes).filter(|codes| !codes.is_empty()).map(|codes| json!(codes))
            }
            "retry.backoff" => retry?.backoff.map(time),
            "sessionPersistence" => own_session.map(session),
            _ => None,
        }
    }
}

impl Field {
    fn or(mut self, name: &'static str, of: fn(&BackendPolicySpec) -> Option<Value>) -> Self {
        self.standard = Some(Standard { name, of });
        self
    }

    /// The steps of its name.
    pub(super) fn steps(&self) -> impl Iterator<Item = Step> + use<> {
        self.name.split('.').map(Step::Name)
    }
}

/// Without the fields that nobody gave.
fn given(fields: &[(&str, Value)]) -> Value {
    let given = fields.iter().filter(|(_, value)| !value.is_null());
    given.map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
}

fn session(session: &SessionPersistence) -> Value {
    let kind = match session.kind {
        SessionType::Cookie => "Cookie",
        SessionType::Header => "Header",
    };
    let permanent = session.cookie_config.lifetime_type == CookieLifetime::Permanent;
    given(&[
        ("type", json!(kind)),
        ("sessionName", json!(session.session_name.as_deref().unwrap_or(SESSION_NAME))),
        ("absoluteTimeout", json!(session.absolute_timeout.map(time))),
        ("lifetimeType", json!(permanent.then_some("Permanent"))),
    ])
}

fn balancer(balancer: &LoadBalancer) -> Value {
    let hash_on = balancer.hash_on.as_ref().map(|on| match on {
        HashOn::Header(name) => json!({"header": name}),
        HashOn::Cookie(name) => json!({"cookie": name}),
        HashOn::Source(yes) => json!({"source": yes}),
    });
    let zone = (balancer.zone == ZonePreference::Prefer).then(|| json!(balancer.zone));
    if hash_on.is_none() && balancer.slow_start.is_none() && zone.is_none() {
        return json!(balancer.kind);
    }
    let slow_start = balancer.slow_start.map(time);
    given(&[
        ("type", json!(balancer.kind)),
        ("hashOn", json!(hash_on)),
        ("slowStart", json!(slow_start)),
        ("zone", json!(zone)),
    ])
}

fn outliers(limits: OutlierDetection) -> Value {
    json!({
        "consecutiveFailures": limits.consecutive_failures,
        "minSuccessPercent": limits.min_success_percent,
        "minRequests": limits.min_requests,
        "minEjection": time(limits.min_ejection),
        "maxEjection": time(limits.max_ejection),
        "maxEjectionPercent": limits.max_ejection_percent,
    })
}

fn rate_limit(limit: RateLimit) -> Value {
    let rate = |requests: u32, per, burst: Option<u32>, caller: Option<Value>| {
        given(&[
            ("requests", json!(requests)),
            ("per", time(per)),
            ("burst", json!(burst)),
            ("perCaller", json!(caller)),
        ])
    };
    let caller =
        limit.per_caller.map(|caller| rate(caller.requests, caller.per, caller.burst, None));
    rate(limit.requests, limit.per, limit.burst, caller)
}

fn hedge(hedge: Hedge) -> Value {
    let after = match hedge.after {
        HedgeAfter::Percentile(percentile) => format!("p{percentile}").into(),
        HedgeAfter::Delay(delay) => time(delay),
    };
    json!({"after": after, "maxPercent": hedge.max_percent})
}

fn fault(fault: &Fault) -> Value {
    let percent = |ppm: u32| json!(f64::from(ppm) / 10_000.0);
    let delay = fault
        .delay
        .map(|delay| json!({"percent": percent(delay.percent), "duration": time(delay.duration)}));
    let abort = fault.abort.map(|abort| {
        given(&[
            ("percent", percent(abort.percent)),
            ("status", json!(abort.status)),
            ("grpcStatus", json!(abort.grpc_status)),
        ])
    });
    let headers: Vec<Value> = fault
        .headers
        .iter()
        .map(|header| json!({"name": header.name, "value": header.value}))
        .collect();
    given(&[
        ("delay", json!(delay)),
        ("abort", json!(abort)),
        ("headers", json!(Some(headers).filter(|headers| !headers.is_empty()))),
    ])
}

fn time(duration: Duration) -> Value {
    duration::format(duration).into()
}

fn bytes(count: u64) -> Value {
    quantity::format(count).into()
}

#[cfg(test)]
mod tests {
    use duet_api::resource::parse;

    use super::*;

    /// The fields that the schema has somewhere in `spec`, as it lists them for one that it does not know.
    fn known(spec: &str) -> Vec<String> {
        let yaml = format!(
            "{{apiVersion: duet.dev/v1alpha1, kind: TrafficPolicy, metadata: {{name: p}}, spec: {spec}}}"
        );
        let error = parse("a.yaml", &yaml).errors.remove(0).message;
        let (_, list) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
        list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn no_field_of_a_policy_is_missing() {
        let mut names = known("{x: 1}");
        names.retain(|name| !matches!(name.as_str(), "targetRefs" | "timeouts" | "retry"));
        for parent in ["timeouts", "retry"] {
            let inner = known(&format!("{{{parent}: {{x: 1}}}}"));
            names.extend(inner.into_iter().map(|name| format!("{parent}.{name}")));
        }
        assert!(names.len() >= 11, "{names:?}");
        for name in names {
            let field = fields().into_iter().find(|field| field.name == name);
            assert!(field.is_some(), "{name} needs a line in `fields`");
        }
    }
}
