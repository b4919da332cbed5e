//! Gateway API's experimental `XBackendTrafficPolicy`: retry budget (GEP-3388) and session persistence (GEP-1619) of
//! services.

use std::time::Duration;

use serde::Deserialize;

use super::super::core::IgnoredEq;
use super::super::meta::Metadata;
use super::SessionPersistence;
use crate::duration;

/// How services are called, in Gateway API's own words; a `TrafficPolicy` on the same target wins.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct XBackendTrafficPolicy {
    #[serde(rename = "apiVersion")]
    pub(in super::super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(in super::super) _kind: IgnoredEq,
    /// Name and namespace; targets are of the same namespace.
    pub metadata: Metadata,
    /// The policy.
    pub spec: BackendPolicySpec,
    #[serde(default, rename = "status")]
    pub(in super::super) _status: IgnoredEq,
}

/// Spec of an [`XBackendTrafficPolicy`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendPolicySpec {
    /// Services that it applies to.
    pub target_refs: Vec<BackendTarget>,
    /// Bound on all retries together.
    pub retry_constraint: Option<RetryConstraint>,
    /// Keeps a client at the endpoint that it got first.
    pub session_persistence: Option<SessionPersistence>,
}

/// A service of the policy's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendTarget {
    /// Empty for `Service`.
    #[serde(default)]
    pub group: String,
    /// `Service`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// Bound on all retries together (GEP-3388).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RetryConstraint {
    /// Share of requests.
    #[serde(default)]
    pub budget: Budget,
    /// Retries that are always allowed.
    #[serde(default)]
    pub min_retry_rate: RetryRate,
}

/// Retries per 100 requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// 0 to 100. Default: 20.
    pub percent: u32,
    /// Time that requests are counted over. Default: 10 s, which is what the mesh always uses.
    #[serde(deserialize_with = "duration::required")]
    pub interval: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Self { percent: 20, interval: Duration::from_secs(10) }
    }
}

/// A rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryRate {
    /// This many in
    pub count: u32,
    /// this time.
    #[serde(deserialize_with = "duration::required")]
    pub interval: Duration,
}

impl Default for RetryRate {
    fn default() -> Self {
        Self { count: 10, interval: Duration::from_secs(1) }
    }
}

impl RetryRate {
    /// Whole retries per second, at least 1 for any rate above none.
    #[must_use]
    pub fn per_second(self) -> u32 {
        let millis = u32::try_from(self.interval.as_millis()).unwrap_or(u32::MAX).max(1);
        let exact = u64::from(self.count) * 1000;
        u32::try_from(exact.div_ceil(u64::from(millis))).unwrap_or(u32::MAX)
    }
}
