//! How an endpoint is chosen, and when it is not.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use crate::duration;

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadBalancer {
    /// The algorithm. Default: `PeakEwma`.
    #[serde(default, rename = "type")]
    pub kind: LoadBalancerType,
    /// What `Maglev` hashes; only there, and needed there.
    #[serde(default, deserialize_with = "hash_on")]
    pub hash_on: Option<HashOn>,
    /// A new endpoint gets its full share after this time only. Default: at once.
    #[serde(default, deserialize_with = "duration::option")]
    pub slow_start: Option<Duration>,
    /// Whether endpoints of the caller's own zone come first. Default: no.
    #[serde(default)]
    pub zone: ZonePreference,
}

/// Load balancing algorithms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoadBalancerType {
    /// The better of two random endpoints by peak-sensitive latency average times load.
    #[default]
    PeakEwma,
    /// The less busy of two random endpoints.
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// The same endpoint for the same key, with little change when endpoints come and go (Maglev, NSDI 2016).
    Maglev,
}

/// What requests with the same endpoint have in common; one of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum HashOn {
    /// The value of a header of this name. Requests without it go anywhere.
    Header(String),
    /// The value of a cookie of this name. Requests without it go anywhere.
    Cookie(String),
    /// Where a request comes from: the first address of `X-Forwarded-For`, else the calling workload.
    Source(bool),
}

/// A mapping with one of the names, as everywhere in Kubernetes; YAML's own form for enums is a tag.
fn hash_on<'de, D: Deserializer<'de>>(input: D) -> Result<Option<HashOn>, D::Error> {
    serde_yaml::with::singleton_map::deserialize(input).map(Some)
}

/// Whether endpoints of the caller's own zone come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ZonePreference {
    /// All zones alike.
    #[default]
    Any,
    /// The own zone first; others as far as it has too few usable endpoints.
    Prefer,
}

/// When an endpoint is left alone for a while. One real request probes whether it is well again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutlierDetection {
    /// Failures in a row. Default: 7; 0: not counted.
    pub consecutive_failures: u32,
    /// Least share of good answers over 10 s, in percent. Default: 80; 0: not counted.
    #[serde(deserialize_with = "percent")]
    pub min_success_percent: u32,
    /// Requests in these 10 s before the share counts. Default: 5.
    pub min_requests: u32,
    /// First ejection; doubles with each one in a row. Default: 1 s.
    #[serde(deserialize_with = "duration::required")]
    pub min_ejection: Duration,
    /// Longest ejection. Default: 60 s.
    #[serde(deserialize_with = "duration::required")]
    pub max_ejection: Duration,
    /// Of a service's endpoints, rounded down: a lone endpoint is ejected with 100 only. Default: 50.
    #[serde(deserialize_with = "percent")]
    pub max_ejection_percent: u32,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            consecutive_failures: 7,
            min_success_percent: 80,
            min_requests: 5,
            min_ejection: Duration::from_secs(1),
            max_ejection: Duration::from_secs(60),
            max_ejection_percent: 50,
        }
    }
}

/// 0 to 100.
pub(super) fn percent<'de, D: Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    match u32::deserialize(input)? {
        n @ 0..=100 => Ok(n),
        n => Err(serde::de::Error::custom(format!("{n} is not a percentage of 0 to 100"))),
    }
}
