//! Outlier detection: which endpoint is left alone for a while, and how it comes back. Pure: times are milliseconds of one
//! steady clock, shared by all workers.
//!
//! An endpoint is ejected after so many failures in a row, or when too few of the last 10 s' answers were good. When
//! its time is over, one real request probes it: a good answer brings it back, a bad one ejects it for twice as long.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Seconds that the share of good answers is counted over.
const WINDOW: u64 = 10;
const SLOTS: usize = 10;
const COUNT_BITS: u32 = 20;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
const SECOND_MASK: u64 = (1 << (64 - 2 * COUNT_BITS)) - 1;

/// When an endpoint is ejected, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Failures in a row; 0: not counted.
    pub consecutive_failures: u32,
    /// Least share of good answers, in percent; 0: not counted.
    pub min_success_percent: u32,
    /// Answers before that share counts.
    pub min_requests: u32,
    /// First ejection, milliseconds; doubles.
    pub min_ejection: u64,
    /// Longest ejection, milliseconds.
    pub max_ejection: u64,
    /// Of a backend's endpoints, rounded down.
    pub max_ejection_percent: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            consecutive_failures: 7,
            min_success_percent: 80,
            min_requests: 5,
            min_ejection: 1_000,
            max_ejection: 60_000,
            max_ejection_percent: 50,
        }
    }
}

impl Limits {
    /// How many of a backend's endpoints may be ejected at once.
    #[must_use]
    pub fn most_ejected(&self, endpoints: usize) -> usize {
        let percent = usize::try_from(self.max_ejection_percent).unwrap_or(100);
        endpoints.saturating_mul(percent) / 100
    }
}

/// The health of one endpoint.
#[derive(Debug, Default)]
pub struct Health {
    /// Ejected until then; 0: not ejected.
    until: AtomicU64,
    /// A probe is under way.
    probing: AtomicBool,
    /// Ejections in a row.
    streak: AtomicU32,
    failures: AtomicU32,
    /// Each: second, good answers, bad answers.
    slots: [AtomicU64; SLOTS],
}

/// What an answer led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing changed.
    Same,
    /// It should be ejected: [`Health::eject`], if not too many are.
    Eject,
    /// It was ejected, and is back.
    Recovered,
}

impl Health {
    /// Whether it is ejected, its probe included.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.until.load(Ordering::Relaxed) != 0
    }

    /// Whether it may get a request now: it is well, or a probe is due.
    #[must_use]
    pub fn is_usable(&self, now: u64) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until == 0 || (until <= now && !self.probing.load(Ordering::Relaxed))
    }

    /// Takes a request on. `Some(true)`: as the probe, which must end in [`Health::answered`] or
    /// [`Health::abandoned`]; `None`: another one was faster.
    pub fn claim(&self, now: u64) -> Option<bool> {
        let until = self.until.load(Ordering::Relaxed);
        if until == 0 {
            return Some(false);
        }
        let due = until <= now;
        (due && !self.probing.swap(true, Ordering::AcqRel)).then_some(true)
    }

    /// A probe ended without an answer, because its caller left.
    pub fn abandoned(&self) {
        self.probing.store(false, Ordering::Release);
    }

    /// Takes an answer in. `probe`: as [`Health::claim`] said.
    pub fn answered(&self, good: bool, probe: bool, limits: &Limits, now: u64) -> Verdict {
        if probe {
            if good {
                self.recover();
                return Verdict::Recovered;
            }
            return Verdict::Eject;
        }
        if self.is_ejected() {
            // Sent before the ejection: says nothing about now.
            return Verdict::Same;
        }
        self.count(good, now / 1000);
        if good {
            if self.failures.load(Ordering::Relaxed) != 0 {
                self.failures.store(0, Ordering::Relaxed);
            }
            return Verdict::Same;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        let in_a_row = limits.consecutive_failures > 0 && failures >= limits.consecutive_failures;
        if in_a_row || self.too_few_good(limits, now / 1000) {
            Verdict::Eject
        } else {
            Verdict::Same
        }
    }

    /// Leaves it alone: for how long, in milliseconds. `random` of 0 to 1 keeps several callers' probes apart.
    pub fn eject(&self, limits: &Limits, now: u64, random: f64) -> u64 {
        let streak = self.streak.fetch_add(1, Ordering::Relaxed).min(16);
        let time = limits.min_ejection.saturating_mul(1 << streak).min(limits.max_ejection).max(1);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an ejection is some minutes at most"
        )]
        let time = time + (time as f64 * 0.25 * random.clamp(0.0, 1.0)) as u64;
        self.until.store(now + time, Ordering::Relaxed);
        self.probing.store(false, Ordering::Release);
        time
    }

    fn recover(&self) {
        for slot in &self.slots {
            slot.store(0, Ordering::Relaxed);
        }
        self.failures.store(0, Ordering::Relaxed);
        self.streak.store(0, Ordering::Relaxed);
        self.until.store(0, Ordering::Relaxed);
        self.probing.store(false, Ordering::Release);
    }

    fn count(&self, good: bool, second: u64) {
        let Some(slot) = usize::try_from(second % WINDOW).ok().and_then(|at| self.slots.get(at))
        else {
            return;
        };
        let one = if good { 1 << COUNT_BITS } else { 1 };
        let second = second & SECOND_MASK;
        // Never fails: the closure always answers.
        let _former = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |value| {
            let same = value >> (2 * COUNT_BITS) == second;
            let full = [value, value >> COUNT_BITS].iter().any(|v| v & COUNT_MASK == COUNT_MASK);
            Some(match (same, full) {
                (true, true) => value,
                (true, false) => value + one,
                (false, _) => second << (2 * COUNT_BITS) | one,
            })
        });
    }

    fn too_few_good(&self, limits: &Limits, second: u64) -> bool {
        if limits.min_success_percent == 0 {
            return false;
        }
        let (mut good, mut bad) = (0, 0);
        for slot in &self.slots {
            let value = slot.load(Ordering::Relaxed);
            let age = (second & SECOND_MASK).wrapping_sub(value >> (2 * COUNT_BITS));
            if age < WINDOW {
                good += value >> COUNT_BITS & COUNT_MASK;
                bad += value & COUNT_MASK;
            }
        }
        let all = good + bad;
        all >= u64::from(limits.min_requests)
            && good * 100 < all * u64::from(limits.min_success_percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(health: &Health, times: u32, now: u64) -> Verdict {
        let limits = Limits { min_success_percent: 0, ..Limits::default() };
        (0..times).map(|_| health.answered(false, false, &limits, now)).last().unwrap()
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_between_does_not() {
        let (health, limits) = (Health::default(), Limits::default());
        let limits = Limits { min_success_percent: 0, ..limits };
        assert_eq!(fail(&health, 6, 0), Verdict::Same);
        assert_eq!(health.answered(true, false, &limits, 0), Verdict::Same);
        assert_eq!(fail(&health, 6, 0), Verdict::Same);
        assert_eq!(fail(&health, 1, 0), Verdict::Eject);
    }

    #[test]
    fn a_low_share_of_good_answers_ejects_and_old_ones_are_forgotten() {
        let (health, limits) = (Health::default(), Limits::default());
        for n in 0..40 {
            let verdict = health.answered(n % 10 != 0, false, &limits, 1_000);
            assert_eq!(verdict, Verdict::Same, "{n}");
        }
        // 20 s later these do not count: 3 of 5 are too few.
        let verdicts: Vec<Verdict> = [true, false, true, false, true, false]
            .iter()
            .map(|good| health.answered(*good, false, &limits, 21_000))
            .collect();
        assert_eq!(verdicts.last(), Some(&Verdict::Eject));
        assert!(verdicts.iter().take(4).all(|verdict| *verdict == Verdict::Same), "{verdicts:?}");
    }

    #[test]
    fn one_probe_at_a_time_decides_and_the_time_doubles() {
        let (health, limits) = (Health::default(), Limits::default());
        assert_eq!(health.eject(&limits, 0, 0.0), 1_000);
        assert!(!health.is_usable(999) && health.claim(999).is_none());
        assert!(health.is_usable(1_000));
        assert_eq!(health.claim(1_000), Some(true));
        assert!(!health.is_usable(1_000) && health.claim(1_000).is_none());
        health.abandoned();
        assert_eq!(health.claim(1_000), Some(true));
        assert_eq!(health.answered(false, true, &limits, 1_000), Verdict::Eject);
        assert_eq!(health.eject(&limits, 1_000, 0.0), 2_000);
        assert_eq!(health.claim(3_000), Some(true));
        assert_eq!(health.answered(true, true, &limits, 3_000), Verdict::Recovered);
        assert_eq!(health.claim(3_000), Some(false));
        assert_eq!(health.eject(&limits, 3_000, 0.0), 1_000);
        for _ in 0..30 {
            assert!(health.eject(&limits, 3_000, 1.0) <= 75_000);
        }
    }

    #[test]
    fn a_lone_endpoint_is_not_ejected_by_default() {
        let limits = Limits::default();
        assert_eq!([1, 2, 3, 5].map(|n| limits.most_ejected(n)), [0, 1, 1, 2]);
    }
}
