//! Rate limits by the generic cell rate algorithm (GCRA, ITU-T I.371): a token bucket that is one number, the time at which
//! it would be full again. Pure: times are nanoseconds of one steady clock, shared by all workers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// Callers that are told apart; more share one limit.
const MAX_CALLERS: usize = 4_096;

/// So many requests in so much time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Time that one request stands for, nanoseconds.
    interval: u64,
    /// How far ahead of the rate requests may be, nanoseconds.
    tolerance: u64,
}

impl Rate {
    /// `requests` in `per`, of which `burst` may come at once. Zeros count as ones.
    #[must_use]
    pub fn new(requests: u32, per: Duration, burst: u32) -> Self {
        let per = u64::try_from(per.as_nanos()).unwrap_or(u64::MAX);
        let interval = (per / u64::from(requests.max(1))).max(1);
        Self { interval, tolerance: interval.saturating_mul(u64::from(burst.max(1) - 1)) }
    }
}

/// One limit.
#[derive(Debug, Default)]
pub struct Gcra(AtomicU64);

impl Gcra {
    /// Takes one request.
    ///
    /// # Errors
    /// When it is too early: how long to wait.
    pub fn take(&self, rate: Rate, now: u64) -> Result<(), Duration> {
        let decide = |full: u64| {
            let full = full.max(now);
            let early = full.saturating_sub(now).saturating_sub(rate.tolerance);
            if early > 0 { Err(early) } else { Ok(full.saturating_add(rate.interval)) }
        };
        let mut full = self.0.load(Ordering::Relaxed);
        loop {
            let next = decide(full).map_err(Duration::from_nanos)?;
            match self.0.compare_exchange_weak(full, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(changed) => full = changed,
            }
        }
    }

    fn is_full(&self, now: u64) -> bool {
        self.0.load(Ordering::Relaxed) <= now
    }
}

/// One limit for each caller.
#[derive(Debug, Default)]
pub struct PerCaller {
    known: Mutex<HashMap<Arc<str>, Arc<Gcra>>>,
    others: Gcra,
}

impl PerCaller {
    /// Takes one request of a caller.
    ///
    /// # Errors
    /// When it is too early: how long to wait.
    pub fn take(&self, caller: &Arc<str>, rate: Rate, now: u64) -> Result<(), Duration> {
        let limit = {
            let mut known = self.known.lock();
            if !known.contains_key(caller) && known.len() >= MAX_CALLERS {
                // One that is full is as good as one that is new.
                known.retain(|_, limit| !limit.is_full(now));
            }
            if known.len() < MAX_CALLERS || known.contains_key(caller) {
                Some(Arc::clone(known.entry(Arc::clone(caller)).or_default()))
            } else {
                None
            }
        };
        limit.as_deref().unwrap_or(&self.others).take(rate, now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a bucket that is filled step by step.
        #[test]
        fn it_is_a_token_bucket(
            requests in 1_u32..50,
            burst in 1_u32..20,
            gaps in proptest::collection::vec(0_u64..400, 1..200),
        ) {
            let rate = Rate::new(requests, Duration::from_nanos(1_000), burst);
            let interval = 1_000 / u64::from(requests);
            let limit = Gcra::default();
            // In parts of a token, so that the reference has no rounding: a token is `interval` parts.
            let (capacity, mut parts) = (u64::from(burst) * interval, u64::from(burst) * interval);
            let mut now = 1_000_000;
            for gap in gaps {
                now += gap;
                parts = (parts + gap).min(capacity);
                let expected = parts >= interval;
                if expected {
                    parts -= interval;
                }
                let taken = limit.take(rate, now);
                prop_assert_eq!(taken.is_ok(), expected);
                if let Err(wait) = taken {
                    prop_assert_eq!(u64::try_from(wait.as_nanos()).unwrap(), interval - parts);
                }
            }
        }
    }

    #[test]
    fn callers_do_not_share_unless_there_are_too_many() {
        let (callers, rate) = (PerCaller::default(), Rate::new(1, Duration::from_secs(1), 1));
        let name = |n: usize| Arc::from(format!("a/{n}"));
        for n in 0..MAX_CALLERS {
            assert!(callers.take(&name(n), rate, 5).is_ok());
        }
        assert!(callers.take(&name(0), rate, 5).is_err());
        assert!(callers.take(&name(MAX_CALLERS), rate, 5).is_ok());
        assert!(callers.take(&name(MAX_CALLERS + 1), rate, 5).is_err());
        assert!(callers.take(&name(MAX_CALLERS + 2), rate, 2_000_000_005).is_ok());
        assert_eq!(callers.known.lock().len(), 1);
    }
}
