//! What protects a service, and what tries its callers.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::super::gateway::ValueMatch;
use super::GrpcCode;
use super::balance::percent;
use crate::duration;

/// Requests that a replica works on at once. More are answered with 503 and `Retry-After`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concurrency {
    /// Find the limit by measuring latency. Default: no.
    #[serde(default)]
    pub adaptive: bool,
    /// Never more than this. Default: no bound.
    pub max: Option<u32>,
}

/// Open connections to a replica. More are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connections {
    /// At most this many.
    pub max: u32,
}

/// Requests in a time. More are answered with 429 and `Retry-After`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// This many
    #[serde(deserialize_with = "positive")]
    pub requests: u32,
    /// in this time. Default: 1 s.
    #[serde(default = "second", deserialize_with = "time")]
    pub per: Duration,
    /// Requests that may come at once. Default: `requests`.
    #[serde(default, deserialize_with = "positive_option")]
    pub burst: Option<u32>,
    /// The same for each caller's identity.
    pub per_caller: Option<Rate>,
}

/// A rate for each caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rate {
    /// This many
    #[serde(deserialize_with = "positive")]
    pub requests: u32,
    /// in this time. Default: 1 s.
    #[serde(default = "second", deserialize_with = "time")]
    pub per: Duration,
    /// Requests that may come at once. Default: `requests`.
    #[serde(default, deserialize_with = "positive_option")]
    pub burst: Option<u32>,
}

fn second() -> Duration {
    Duration::from_secs(1)
}

fn positive<'de, D: Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    match u32::deserialize(input)? {
        0 => Err(serde::de::Error::custom("must be at least 1")),
        n => Ok(n),
    }
}

fn positive_option<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u32>, D::Error> {
    positive(input).map(Some)
}

fn time<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let time = duration::required(input)?;
    if time.is_zero() {
        return Err(serde::de::Error::custom("must be longer than 0s"));
    }
    Ok(time)
}

/// A second try beside a slow first one, at another endpoint; the first answer counts. Only for requests that are
/// safe to repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hedge {
    /// When: `p95` (a percentile of recent latencies) or a duration. Default: `p95`.
    #[serde(default, deserialize_with = "hedge_after")]
    pub after: HedgeAfter,
    /// Hedges per 100 requests. They count as retries for the retry budget, too. Default: 5.
    #[serde(default = "five", deserialize_with = "percent")]
    pub max_percent: u32,
}

/// When a hedge is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HedgeAfter {
    /// Of recent latencies, 1 to 99.
    Percentile(u8),
    /// A fixed time.
    Delay(Duration),
}

impl Default for HedgeAfter {
    fn default() -> Self {
        Self::Percentile(95)
    }
}

fn five() -> u32 {
    5
}

fn hedge_after<'de, D: Deserializer<'de>>(input: D) -> Result<HedgeAfter, D::Error> {
    let text = String::deserialize(input)?;
    if let Some(number) = text.strip_prefix('p') {
        let percentile = number.parse().ok().filter(|number| (1..100).contains(number));
        let error = || serde::de::Error::custom(format!("{text:?} is not p1 to p99"));
        return percentile.map(HedgeAfter::Percentile).ok_or_else(error);
    }
    duration::parse(&text).map(HedgeAfter::Delay).map_err(serde::de::Error::custom)
}

/// Failures made on purpose, by the caller's sidecar, once for each call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Makes calls wait.
    pub delay: Option<Delay>,
    /// Makes calls fail.
    pub abort: Option<Abort>,
    /// Only for requests with all of these headers. Default: all requests.
    #[serde(default)]
    pub headers: Vec<ValueMatch>,
}

/// Makes calls wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delay {
    /// Share of calls, in parts per million; written in percent. Default: 100.
    #[serde(default = "everything", deserialize_with = "ppm")]
    pub percent: u32,
    /// How long.
    #[serde(deserialize_with = "time")]
    pub duration: Duration,
}

/// Makes calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Abort {
    /// Share of calls, in parts per million; written in percent. Default: 100.
    #[serde(default = "everything", deserialize_with = "ppm")]
    pub percent: u32,
    /// HTTP status, 400 to 599. Default: 503.
    #[serde(default = "unavailable", deserialize_with = "status")]
    pub status: u16,
    /// What gRPC callers get. Default: what the HTTP status maps to.
    pub grpc_status: Option<GrpcCode>,
}

fn everything() -> u32 {
    1_000_000
}

fn unavailable() -> u16 {
    503
}

fn ppm<'de, D: Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    let percent = f64::deserialize(input)?;
    if !(0.0..=100.0).contains(&percent) {
        let text = format!("{percent} is not a percentage of 0 to 100");
        return Err(serde::de::Error::custom(text));
    }
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to 1,000,000 by the check above"
    )]
    Ok((percent * 10_000.0).round() as u32)
}

fn status<'de, D: Deserializer<'de>>(input: D) -> Result<u16, D::Error> {
    match u16::deserialize(input)? {
        code @ 400..600 => Ok(code),
        code => {
            Err(serde::de::Error::custom(format!("{code} is not an HTTP status of 400 to 599")))
        }
    }
}
