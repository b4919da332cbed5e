//! When a second try is sent beside a slow first one. Pure: times are of one steady clock, shared by all workers.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::budget::{BudgetLimits, RetryBudget};

/// Latencies are remembered for this long, seconds, and for as long again while the next ones are collected.
const WINDOW: u64 = 10;
/// Latencies before a percentile means something.
const ENOUGH: u32 = 50;
/// Four for each power of two microseconds.
const BUCKETS: usize = 4 * 32;

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Of recent latencies, 1 to 99.
    Percentile(u32),
    /// A fixed time.
    Delay(Duration),
}

/// The hedges of one rule.
#[derive(Debug)]
pub struct Hedging {
    after: After,
    budget: RetryBudget,
    recent: [Histogram; 2],
    /// The window that is being collected.
    window: AtomicU64,
}

impl Hedging {
    /// At most `max_percent` hedges per 100 requests.
    #[must_use]
    pub fn new(after: After, max_percent: u32) -> Self {
        let limits = BudgetLimits { percent: max_percent, min_per_second: 0 };
        Self {
            after,
            budget: RetryBudget::new(limits),
            recent: [Histogram::new(), Histogram::new()],
            window: AtomicU64::new(0),
        }
    }

    /// Whether it was made of these.
    #[must_use]
    pub fn is(&self, after: After, max_percent: u32) -> bool {
        self.after == after && self.budget.limits().percent == max_percent
    }

    /// Counts a request, and says when it would be hedged; `None`: too little is known.
    pub fn request(&self, second: u64) -> Option<Duration> {
        self.budget.request(second);
        match self.after {
            After::Delay(delay) => Some(delay),
            After::Percentile(percentile) => {
                let [even, odd] = &self.recent;
                let former = if (second / WINDOW).is_multiple_of(2) { odd } else { even };
                former.percentile(percentile)
            }
        }
    }

    /// Takes in how long a good answer took.
    pub fn answered(&self, took: Duration, second: u64) {
        if self.after == After::Delay(Duration::ZERO) {
            return;
        }
        let window = second / WINDOW;
        let [even, odd] = &self.recent;
        let current = if window.is_multiple_of(2) { even } else { odd };
        if self.window.swap(window, Ordering::Relaxed) != window {
            current.clear();
        }
        current.add(took);
    }

    /// Asks for a hedge; `true` counts it.
    pub fn take(&self, second: u64) -> bool {
        self.budget.retry(second)
    }
}

#[derive(Debug)]
struct Histogram([AtomicU32; BUCKETS]);

impl Histogram {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU32::new(0)))
    }

    fn clear(&self) {
        for bucket in &self.0 {
            bucket.store(0, Ordering::Relaxed);
        }
    }

    fn add(&self, took: Duration) {
        let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX).max(4);
        let power = micros.ilog2();
        let quarter = micros >> (power - 2) & 3;
        if let Some(bucket) =
            usize::try_from(power * 4 + quarter).ok().and_then(|at| self.0.get(at))
        {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Upper end of the bucket that holds it.
    fn percentile(&self, percentile: u32) -> Option<Duration> {
        let counts = self.0.each_ref().map(|bucket| bucket.load(Ordering::Relaxed));
        let all: u32 = counts.iter().sum();
        if all < ENOUGH {
            return None;
        }
        let wanted = u64::from(all) * u64::from(percentile) / 100;
        let mut seen = 0;
        for (number, count) in (0_u64..).zip(counts) {
            seen += u64::from(count);
            if seen > wanted {
                let (power, quarter) = (number / 4, number % 4);
                return Some(Duration::from_micros((5 + quarter) << power >> 2));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_hedges_after_the_percentile_of_the_last_window() {
        let hedging = Hedging::new(After::Percentile(95), 5);
        assert_eq!(hedging.request(3), None);
        for n in 0..1_000_u64 {
            hedging.answered(Duration::from_millis(if n % 100 < 97 { 10 } else { 500 }), 3);
        }
        let after = hedging.request(13).unwrap();
        assert!((10..13).contains(&after.as_millis()), "{after:?}");
        // Two windows later the old ones are gone.
        hedging.answered(Duration::from_millis(1), 23);
        assert_eq!(hedging.request(33), None);
    }

    #[test]
    fn hedges_are_a_small_share() {
        let hedging = Hedging::new(After::Delay(Duration::from_millis(1)), 5);
        let hedged = (0..10_000).filter(|_| {
            assert_eq!(hedging.request(7), Some(Duration::from_millis(1)));
            hedging.take(7)
        });
        assert_eq!(hedged.count(), 500);
    }
}
