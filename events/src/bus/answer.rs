//! What an app's answer to a delivery means. Pure: the caller brings status, body and jitter.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use duet_api::proto;

use super::SubscriptionSpec;
use super::spec::{from_wire, wire};
use crate::AnyCase;

/// What becomes of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settle {
    /// Handled.
    Ack,
    /// Again after the delay; spends an attempt.
    Retry {
        /// The wait.
        delay: Duration,
    },
    /// Never handled, and nobody's fault: again, to any consumer, after the delay; no attempt spent.
    Release {
        /// The wait; zero for at once.
        delay: Duration,
    },
    /// To the dead-letter topic, atomically with being done here.
    DeadLetter {
        /// Why, for people.
        reason: String,
        /// The last answer's HTTP status; 0 if there was none.
        status: u32,
    },
}

/// What came of posting an event to the app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppAnswer {
    /// An answer, understood.
    Handled,
    /// 2xx with `{"status": "RETRY"}`, or with a status word that nobody knows.
    AskedToRetry {
        /// The HTTP status.
        status: u16,
    },
    /// 2xx with `{"status": "DROP"}`.
    Dropped {
        /// The HTTP status.
        status: u16,
    },
    /// Any other HTTP status.
    Failed {
        /// The HTTP status.
        status: u16,
    },
    /// The app was not there: the connection was refused, so it cannot have seen the event.
    NotReached,
    /// The app is there, and was not given the event now: something else has to be over before.
    NotNow,
    /// The app may have seen the event, but did not answer: time ran out or the connection broke.
    NoAnswer {
        /// What happened.
        reason: String,
    },
}

#[derive(serde::Deserialize)]
struct StatusBody<'a> {
    #[serde(borrow)]
    status: Option<Cow<'a, str>>,
}

impl AppAnswer {
    /// Reads an HTTP answer as Dapr does: 2xx is success unless a JSON body with a `status` says otherwise.
    #[must_use]
    pub fn from_http(status: u16, body: &[u8]) -> Self {
        if !(200..300).contains(&status) {
            return Self::Failed { status };
        }
        let read = serde_json::from_slice::<AnyCase<StatusBody<'_>>>(body).ok();
        let word = read.and_then(|AnyCase(read)| read.status);
        match word.as_deref() {
            None | Some("" | "SUCCESS") => Self::Handled,
            Some("DROP") => Self::Dropped { status },
            Some(_) => Self::AskedToRetry { status },
        }
    }
}

impl fmt::Display for AppAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handled => f.write_str("SUCCESS"),
            Self::AskedToRetry { .. } => f.write_str("RETRY"),
            Self::Dropped { .. } => f.write_str("DROP"),
            Self::Failed { status } => write!(f, "{status}"),
            Self::NotReached => f.write_str("it does not accept connections"),
            Self::NotNow => f.write_str("not now"),
            Self::NoAnswer { reason } => f.write_str(reason),
        }
    }
}

/// Decides on a delivery. `attempt` is the one that got this answer, from 1, and `path` where it went if not to the
/// subscription's own; `jitter` is a random number of 0 up to 1.
#[must_use]
pub fn on_answer(
    answer: &AppAnswer,
    (attempt, path): (u32, Option<&str>),
    spec: &SubscriptionSpec,
    jitter: f64,
) -> Settle {
    let status = match answer {
        AppAnswer::Handled => return Settle::Ack,
        AppAnswer::NotReached | AppAnswer::NotNow => {
            return Settle::Release { delay: next_delay(1, spec, jitter) };
        }
        AppAnswer::Dropped { status } => {
            return dead_letter("the subscriber answered DROP", *status);
        }
        // As in Dapr: no handler at this path, and trying again will not make one.
        AppAnswer::Failed { status: 404 } => {
            let path = path.unwrap_or(&spec.path);
            return dead_letter(&format!("the subscriber answered 404 at {path}"), 404);
        }
        AppAnswer::AskedToRetry { status } | AppAnswer::Failed { status } => *status,
        AppAnswer::NoAnswer { .. } => 0,
    };
    match spec.max_attempts {
        Some(max) if attempt >= max.get() => {
            dead_letter(&format!("all {max} attempts used; the last: {answer}"), status)
        }
        _ => Settle::Retry { delay: next_delay(attempt, spec, jitter) },
    }
}

fn dead_letter(reason: &str, status: u16) -> Settle {
    Settle::DeadLetter { reason: reason.to_owned(), status: status.into() }
}

/// The wait after a failed attempt (from 1): the backoff, doubled with each attempt, a quarter up or
/// down by jitter (0 up to 1), never over the longest wait.
#[must_use]
pub fn next_delay(attempt: u32, spec: &SubscriptionSpec, jitter: f64) -> Duration {
    let doublings = attempt.saturating_sub(1).min(31);
    let base = spec.backoff.saturating_mul(1_u32 << doublings).min(spec.max_backoff);
    let jitter = if jitter.is_finite() { jitter.clamp(0.0, 1.0) } else { 0.5 };
    let wait = Duration::try_from_secs_f64(base.as_secs_f64() * (0.75 + jitter / 2.0));
    wait.unwrap_or(spec.max_backoff).min(spec.max_backoff)
}

impl From<Settle> for proto::settle::Outcome {
    fn from(settle: Settle) -> Self {
        use proto::settle;
        match settle {
            Settle::Ack => Self::Ack(settle::Done {}),
            Settle::Retry { delay } => Self::Retry(settle::Retry { delay: wire(delay) }),
            Settle::Release { delay } => Self::Release(settle::Release { delay: wire(delay) }),
            Settle::DeadLetter { reason, status } => {
                Self::DeadLetter(settle::DeadLetter { reason, status })
            }
        }
    }
}

impl From<proto::settle::Outcome> for Settle {
    fn from(outcome: proto::settle::Outcome) -> Self {
        use proto::settle::Outcome;
        // A negative delay is none.
        let delay =
            |raw: Option<prost_types::Duration>| raw.and_then(from_wire).unwrap_or_default();
        match outcome {
            Outcome::Ack(_) => Self::Ack,
            Outcome::Retry(retry) => Self::Retry { delay: delay(retry.delay) },
            Outcome::Release(release) => Self::Release { delay: delay(release.delay) },
            Outcome::DeadLetter(dead) => {
                Self::DeadLetter { reason: dead.reason, status: dead.status }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec() -> SubscriptionSpec {
        let spec = SubscriptionSpec::new("shop/a", "default", "t").unwrap();
        SubscriptionSpec { path: "/a".to_owned(), ..spec }
    }

    fn decide(status: u16, body: &str, attempt: u32) -> Settle {
        on_answer(&AppAnswer::from_http(status, body.as_bytes()), (attempt, None), &spec(), 0.5)
    }

    #[test]
    fn answers_mean_what_dapr_says() {
        let retry = |s| Settle::Retry { delay: Duration::from_secs(s) };
        let cases = [
            (200, "", Settle::Ack),
            (204, "", Settle::Ack),
            (200, "ok", Settle::Ack),
            (200, "{}", Settle::Ack),
            (200, r#"{"status":null}"#, Settle::Ack),
            (200, r#"{"status":""}"#, Settle::Ack),
            (200, r#"{"status":"SUCCESS"}"#, Settle::Ack),
            (200, r#"{"status":"RETRY"}"#, retry(1)),
            (200, r#"{"Status":"RETRY"}"#, retry(1)),
            (200, r#"{"STATUS":"RETRY"}"#, retry(1)),
            (200, r#"{"Status":"SUCCESS","x":[{"status":"RETRY"}],"status":"RETRY"}"#, retry(1)),
            (200, r#"["RETRY"]"#, Settle::Ack),
            (200, r#"{"status":7}"#, Settle::Ack),
            (200, r#"{"status":"WHAT"}"#, retry(1)),
            (200, r#"{"Status":"DROP"}"#, dead_letter("the subscriber answered DROP", 200)),
            (200, r#"{"status":"DROP"}"#, dead_letter("the subscriber answered DROP", 200)),
            (404, "", dead_letter("the subscriber answered 404 at /a", 404)),
            (500, r#"{"status":"SUCCESS"}"#, retry(1)),
            (302, "", retry(1)),
            (429, "", retry(1)),
        ];
        for (status, body, expected) in cases {
            assert_eq!(decide(status, body, 1), expected, "{status} {body}");
        }
        let elsewhere =
            on_answer(&AppAnswer::Failed { status: 404 }, (1, Some("/b")), &spec(), 0.5);
        assert_eq!(elsewhere, dead_letter("the subscriber answered 404 at /b", 404));
    }

    #[test]
    fn used_up_attempts_end_in_the_dead_letter_topic() {
        assert!(matches!(decide(500, "", 9), Settle::Retry { .. }));
        let Settle::DeadLetter { reason, status } = decide(500, "", 10) else {
            panic!("not dead-lettered");
        };
        assert_eq!((reason.as_str(), status), ("all 10 attempts used; the last: 500", 500));
        let unbounded = SubscriptionSpec { max_attempts: None, ..spec() };
        let answer = AppAnswer::NoAnswer { reason: "no answer within 30s".into() };
        assert!(matches!(
            on_answer(&answer, (u32::MAX, None), &unbounded, 0.0),
            Settle::Retry { .. }
        ));
    }

    #[test]
    fn an_app_that_is_not_there_spends_no_attempt() {
        let settle = on_answer(&AppAnswer::NotReached, (10, None), &spec(), 0.5);
        assert_eq!(settle, Settle::Release { delay: Duration::from_secs(1) });
    }

    proptest! {
        #[test]
        fn delays_stay_in_bounds_and_grow(attempt: u32, jitter in 0.0..1.0_f64) {
            let delay = next_delay(attempt, &spec(), jitter);
            prop_assert!(delay >= Duration::from_millis(750));
            prop_assert!(delay <= spec().max_backoff);
            prop_assert!(next_delay(attempt.saturating_add(1), &spec(), jitter) >= delay);
        }

        #[test]
        fn no_answer_body_panics(status: u16, body: Vec<u8>) {
            drop(AppAnswer::from_http(status, &body));
        }
    }
}
