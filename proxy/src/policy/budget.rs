//! The retry budget: bounds all retries of calls to one destination together, over all workers.
//!
//! Over the last 10 s, retries may be at most `percent` of requests plus `min_per_second` for each second. Each
//! second has a slot of two atomics; a slot is reset when its second comes round again. Counting is done at the
//! decision, so a backoff in progress is counted already.

use std::sync::atomic::{AtomicU64, Ordering};

/// Seconds looked back on.
const WINDOW: u64 = 10;
const SLOTS: usize = 10;

/// How much is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetLimits {
    /// Retries per 100 requests.
    pub percent: u32,
    /// Always allowed.
    pub min_per_second: u32,
}

impl Default for BudgetLimits {
    fn default() -> Self {
        Self { percent: 20, min_per_second: 10 }
    }
}

/// Shared by all workers.
#[derive(Debug)]
pub struct RetryBudget {
    limits: BudgetLimits,
    requests: [Slot; SLOTS],
    retries: [Slot; SLOTS],
}

/// The second in the upper half, the count in the lower.
#[derive(Debug, Default)]
struct Slot(AtomicU64);

impl Slot {
    fn add(&self, second: u64) {
        let second = second & u64::from(u32::MAX);
        // Never fails: the closure always answers.
        let _former = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |value| {
            let count = if value >> 32 == second { value & u64::from(u32::MAX) } else { 0 };
            Some(second << 32 | (count + 1).min(u64::from(u32::MAX)))
        });
    }

    fn count(&self, now: u64) -> u64 {
        let value = self.0.load(Ordering::Relaxed);
        let age = (now & u64::from(u32::MAX)).wrapping_sub(value >> 32);
        if age < WINDOW { value & u64::from(u32::MAX) } else { 0 }
    }
}

impl RetryBudget {
    /// An unspent budget.
    #[must_use]
    pub fn new(limits: BudgetLimits) -> Self {
        Self { limits, requests: Default::default(), retries: Default::default() }
    }

    /// What it was made with.
    #[must_use]
    pub fn limits(&self) -> BudgetLimits {
        self.limits
    }

    /// Counts a request. `now` is in whole seconds of any steady clock.
    pub fn request(&self, now: u64) {
        if let Some(slot) = self.requests.get(index(now)) {
            slot.add(now);
        }
    }

    /// Asks for a retry; `true` counts it.
    pub fn retry(&self, now: u64) -> bool {
        let sum = |slots: &[Slot]| slots.iter().map(|slot| slot.count(now)).sum::<u64>();
        let earned = sum(&self.requests) * u64::from(self.limits.percent) / 100;
        let allowed = earned + u64::from(self.limits.min_per_second) * WINDOW;
        if sum(&self.retries) >= allowed {
            return false;
        }
        if let Some(slot) = self.retries.get(index(now)) {
            slot.add(now);
        }
        true
    }
}

fn index(second: u64) -> usize {
    usize::try_from(second % WINDOW).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_never_exceed_the_budget_over_a_million_requests() {
        let limits = BudgetLimits { percent: 20, min_per_second: 10 };
        let budget = RetryBudget::new(limits);
        let (mut granted, mut window) = (0_u64, std::collections::VecDeque::new());
        for n in 0..1_000_000_u64 {
            let now = 1000 + n / 5_000;
            budget.request(now);
            // Every other request fails and asks.
            if n % 2 == 0 && budget.retry(now) {
                granted += 1;
                window.push_back(now);
            }
        }
        let seconds = 1_000_000 / 5_000;
        assert!(granted <= 200_000 + 10 * (seconds + WINDOW), "{granted}");
        assert!(granted >= 190_000, "{granted}");
    }

    #[test]
    fn a_budget_of_nothing_grants_nothing() {
        let budget = RetryBudget::new(BudgetLimits { percent: 0, min_per_second: 0 });
        budget.request(5);
        assert!(!budget.retry(5));
    }

    #[test]
    fn what_was_spent_comes_back_after_the_window() {
        let budget = RetryBudget::new(BudgetLimits { percent: 0, min_per_second: 1 });
        let granted = (0..100).filter(|_| budget.retry(7)).count();
        assert_eq!(granted, 10);
        assert!(!budget.retry(16));
        assert!(budget.retry(17));
    }
}
