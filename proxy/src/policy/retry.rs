//! When a failed try is followed by another one. Pure.
//!
//! Retries never do harm by default: what provably was not processed may be tried again whatever the method;
//! everything else only where repeating is safe (an idempotent method, or an `Idempotency-Key`), and statuses
//! only where a policy names them.

use std::time::Duration;

use duet_api::proto;
use http::{HeaderMap, Method};

use crate::error::Progress;
use crate::http::headers::{grpc_status, is_idempotent};

/// Of a rule, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries after the first.
    pub attempts: u32,
    /// HTTP statuses to retry.
    pub codes: Vec<u16>,
    /// gRPC statuses to retry.
    pub grpc_codes: Vec<u16>,
    /// Before the first retry; doubles up to ten times this.
    pub backoff: Duration,
    /// Bodies kept for replay.
    pub max_body_bytes: usize,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 2,
            codes: Vec::new(),
            grpc_codes: Vec::new(),
            backoff: Duration::from_millis(25),
            max_body_bytes: 64 * 1024,
        }
    }
}

impl RetryPolicy {
    /// From the control plane's form; absent fields have the defaults.
    #[must_use]
    pub fn new(raw: Option<&proto::Retry>) -> Self {
        let Some(raw) = raw else {
            return Self::default();
        };
        let codes =
            |codes: &[u32]| codes.iter().filter_map(|code| u16::try_from(*code).ok()).collect();
        let backoff = raw.backoff.and_then(|backoff| Duration::try_from(backoff).ok());
        Self {
            attempts: raw.attempts,
            codes: codes(&raw.codes),
            grpc_codes: codes(&raw.grpc_codes),
            backoff: backoff.unwrap_or(Self::default().backoff),
            max_body_bytes: usize::try_from(raw.max_body_bytes).unwrap_or(usize::MAX),
        }
    }

    /// Whether a response's status asks for another try.
    #[must_use]
    pub fn wants(&self, status: u16, headers: &HeaderMap) -> bool {
        self.codes.contains(&status)
            || (!self.grpc_codes.is_empty()
                && grpc_status(headers).is_some_and(|code| self.grpc_codes.contains(&code)))
    }

    /// The wait before try number `retry` (1 for the first retry), with `random` of 0 to 1 as jitter.
    #[must_use]
    pub fn wait(&self, retry: u32, random: f64) -> Duration {
        let full = self.backoff.saturating_mul(1 << retry.saturating_sub(1).min(10));
        full.min(self.backoff.saturating_mul(10)).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }
}

/// What an answer says of when, and whether, to ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushback {
    /// Not before.
    After(Duration),
    /// Not at all.
    Never,
}

impl Pushback {
    /// Reads `Retry-After` (seconds; RFC 9110 section 10.2.3) and `grpc-retry-pushback-ms` (gRPC proposal A6: what is not a
    /// number of milliseconds means never).
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        if let Some(value) = headers.get("grpc-retry-pushback-ms") {
            let millis = value.to_str().ok().and_then(|text| text.parse::<u32>().ok());
            let after = |millis: u32| Self::After(Duration::from_millis(millis.into()));
            return Some(millis.map_or(Self::Never, after));
        }
        let value = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?;
        value.parse::<u32>().ok().map(|seconds| Self::After(Duration::from_secs(seconds.into())))
    }

    /// The wait before the next try, given the policy's own; `None`: there is to be none.
    #[must_use]
    pub fn wait(self, own: Duration) -> Option<Duration> {
        match self {
            Self::After(wait) => Some(wait.max(own)),
            Self::Never => None,
        }
    }
}

/// Whether a request may be repeated after a try that came this far.
#[must_use]
pub fn is_safe(progress: Progress, method: &Method, headers: &HeaderMap) -> bool {
    match progress {
        Progress::Unprocessed | Progress::Allowed => true,
        Progress::Unknown => is_idempotent(method, headers),
        Progress::Final => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_post_is_repeated_only_when_unprocessed_or_keyed() {
        let (none, mut keyed) = (HeaderMap::new(), HeaderMap::new());
        keyed.insert("idempotency-key", HeaderValue::from_static("1"));
        assert!(!is_safe(Progress::Unknown, &Method::POST, &none));
        assert!(is_safe(Progress::Unknown, &Method::POST, &keyed));
        assert!(is_safe(Progress::Unprocessed, &Method::POST, &none));
        assert!(is_safe(Progress::Unknown, &Method::GET, &none));
        assert!(!is_safe(Progress::Final, &Method::GET, &none));
    }

    #[test]
    fn waits_double_up_to_ten_times_with_jitter() {
        let policy = RetryPolicy::default();
        assert_eq!(policy.wait(1, 1.0), Duration::from_millis(25));
        assert_eq!(policy.wait(2, 1.0), Duration::from_millis(50));
        assert_eq!(policy.wait(9, 1.0), Duration::from_millis(250));
        assert_eq!(policy.wait(1, 0.0), Duration::from_micros(12_500));
    }

    #[test]
    fn servers_say_when_to_ask_again() {
        let of = |name: &'static str, value: &'static str| {
            let name = http::HeaderName::from_static(name);
            Pushback::of(&HeaderMap::from_iter([(name, HeaderValue::from_static(value))]))
        };
        let own = Duration::from_millis(25);
        let two = Pushback::After(Duration::from_secs(2));
        assert_eq!(of("retry-after", "2"), Some(two));
        assert_eq!(two.wait(own), Some(Duration::from_secs(2)));
        assert_eq!(Pushback::After(Duration::ZERO).wait(own), Some(own));
        assert_eq!(of("retry-after", "soon"), None);
        assert_eq!(of("grpc-retry-pushback-ms", "-1"), Some(Pushback::Never));
        assert_eq!(Pushback::Never.wait(own), None);
    }

    #[test]
    fn only_named_statuses_are_retried() {
        let policy =
            RetryPolicy { codes: vec![503], grpc_codes: vec![14], ..RetryPolicy::default() };
        assert!(policy.wants(503, &HeaderMap::new()));
        assert!(!policy.wants(500, &HeaderMap::new()));
        let mut grpc = HeaderMap::new();
        grpc.insert("grpc-status", HeaderValue::from_static("14"));
        assert!(policy.wants(200, &grpc));
        assert!(!RetryPolicy::default().wants(503, &grpc));
    }
}
