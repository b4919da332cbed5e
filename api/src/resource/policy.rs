//! `TrafficPolicy`: how a service is called.

mod balance;
mod protect;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use balance::{HashOn, LoadBalancer, LoadBalancerType, OutlierDetection, ZonePreference};
pub use protect::{
    Abort, Concurrency, Connections, Delay, Fault, Hedge, HedgeAfter, Rate, RateLimit,
};

use super::core::IgnoredEq;
use super::meta::Metadata;
use crate::{duration, quantity};

/// How a service, or what a route matches, is called. Values on a route win over those on its service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrafficPolicy {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// Name and namespace; targets are of the same namespace.
    pub metadata: Metadata,
    /// The policy.
    pub spec: Box<TrafficPolicySpec>,
    #[serde(default, rename = "status")]
    pub(super) _status: IgnoredEq,
}

/// Spec of a [`TrafficPolicy`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrafficPolicySpec {
    /// What it applies to. Without any it applies only where a route's `ExtensionRef` names it.
    #[serde(default)]
    pub target_refs: Vec<TargetRef>,
    /// Bounds on waiting.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// When to try again.
    pub retry: Option<Retry>,
    /// Bound on all retries together.
    pub retry_budget: Option<RetryBudget>,
    /// How an endpoint is chosen.
    pub load_balancer: Option<LoadBalancer>,
    /// When an endpoint is left alone for a while.
    pub outlier_detection: Option<OutlierDetection>,
    /// Requests that a replica works on at once; kept by its own sidecar.
    pub concurrency: Option<Concurrency>,
    /// Open connections to a replica; kept by its own sidecar.
    pub connections: Option<Connections>,
    /// Requests in a time to a replica; kept by its own sidecar.
    pub rate_limit: Option<RateLimit>,
    /// A second try beside a slow first one.
    pub hedge: Option<Hedge>,
    /// Failures made on purpose.
    pub fault: Option<Fault>,
}

/// What a policy attaches to (Gateway API GEP-2648).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetRef {
    /// Empty for `Service`, `gateway.networking.k8s.io` for routes; may be left out.
    pub group: Option<String>,
    /// `Service`, `HTTPRoute` or `GRPCRoute`.
    pub kind: TargetKind,
    /// Its name, in the policy's namespace.
    pub name: String,
    /// One port of the service or one named rule of the route; default: all.
    pub section_name: Option<String>,
}

/// Kinds that a [`TrafficPolicy`] attaches to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum TargetKind {
    /// A service.
    Service,
    /// A route.
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    /// A route.
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
}

impl TargetKind {
    /// As in YAML.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
        }
    }
}

/// Bounds on waiting. `0s` disables a bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Timeouts {
    /// The whole exchange, retries included. Default: 15 s until response headers, then none.
    #[serde(default, deserialize_with = "duration::option")]
    pub request: Option<Duration>,
    /// One try. Default: none.
    #[serde(default, deserialize_with = "duration::option")]
    pub backend_request: Option<Duration>,
    /// Longest silence on a stream. Default: 5 min.
    #[serde(default, deserialize_with = "duration::option")]
    pub idle: Option<Duration>,
    /// Making a connection, TLS included. Default: 1 s.
    #[serde(default, deserialize_with = "duration::option")]
    pub connect: Option<Duration>,
}

/// When to try again.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Retry {
    /// Tries after the first. Default: 2.
    #[serde(default = "two", deserialize_with = "attempts")]
    pub attempts: u32,
    /// HTTP statuses to retry where that is safe (idempotent method or `Idempotency-Key`). Default: none.
    #[serde(default, deserialize_with = "codes")]
    pub codes: Vec<u16>,
    /// gRPC statuses to retry, by name, such as `unavailable`. Default: none.
    #[serde(default)]
    pub grpc_codes: Vec<GrpcCode>,
    /// Wait before the first retry; doubles up to ten times this, with jitter. Default: 25 ms.
    #[serde(default, deserialize_with = "duration::option")]
    pub backoff: Option<Duration>,
    /// Bodies up to this size are kept for replay; larger ones stream and are not retried. Default: 64 Ki.
    #[serde(default, deserialize_with = "quantity::option")]
    pub max_body_bytes: Option<u64>,
}

fn two() -> u32 {
    2
}

fn attempts<'de, D: serde::Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    match u32::deserialize(input)? {
        n @ 0..=20 => Ok(n),
        n => Err(serde::de::Error::custom(format!("attempts must be 0 to 20, not {n}"))),
    }
}

pub(super) fn codes<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Vec<u16>, D::Error> {
    let codes = Vec::<u16>::deserialize(input)?;
    match codes.iter().find(|code| !(400..600).contains(*code)) {
        Some(code) => {
            Err(serde::de::Error::custom(format!("{code} is not an HTTP status of 400 to 599")))
        }
        None => Ok(codes),
    }
}

/// gRPC status codes, named as in gRPC's status code document, in kebab case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the names are gRPC's own")]
pub enum GrpcCode {
    Cancelled = 1,
    Unknown = 2,
    DeadlineExceeded = 4,
    ResourceExhausted = 8,
    Aborted = 10,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
}

/// Bound on all retries of calls to a service together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RetryBudget {
    /// Retries per 100 requests, counted over 10 s. Default: 20.
    #[serde(default = "twenty", deserialize_with = "percent")]
    pub percent: u32,
    /// Retries per second that are always allowed. Default: 10.
    #[serde(default = "ten")]
    pub min_per_second: u32,
}

fn twenty() -> u32 {
    20
}

fn ten() -> u32 {
    10
}

fn percent<'de, D: serde::Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    match u32::deserialize(input)? {
        n @ 0..=1000 => Ok(n),
        n => Err(serde::de::Error::custom(format!("percent must be 0 to 1000, not {n}"))),
    }
}
