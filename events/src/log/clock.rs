//! The wall clock, and when it is set back.

use std::time::{Duration, Instant, SystemTime};

/// Less than this is no step: a clock that goes slow for a while, or a thread that was held up.
const STEP_MS: u64 = 1_000;

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    millis(since)
}

/// Compares the wall clock with one that never goes back.
#[derive(Debug)]
pub(super) struct Clock {
    /// What both said last.
    seen: (Instant, u64),
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { seen: (Instant::now(), now_ms()) }
    }

    /// Milliseconds that the wall clock was set back since the last look; 0 if it was not.
    pub(super) fn set_back(&mut self) -> u64 {
        self.look(Instant::now(), now_ms())
    }

    fn look(&mut self, at: Instant, now_ms: u64) -> u64 {
        let (seen_at, seen_ms) = std::mem::replace(&mut self.seen, (at, now_ms));
        let expected = seen_ms.saturating_add(millis(at.saturating_duration_since(seen_at)));
        let back = expected.saturating_sub(now_ms);
        if back < STEP_MS { 0 } else { back }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_step_back_is_one() {
        let start = Instant::now();
        let mut clock = Clock { seen: (start, 1_000_000) };
        let mut at = |after_ms, now_ms| clock.look(start + Duration::from_millis(after_ms), now_ms);
        assert_eq!(at(500, 1_000_500), 0);
        assert_eq!(at(1_500, 1_001_400), 0, "a little slow");
        assert_eq!(at(2_500, 902_400), 100_000);
        assert_eq!(at(3_500, 903_400), 0, "it goes on from there");
        assert_eq!(at(4_500, 9_000_000), 0, "forward");
        assert_eq!(at(5_500, 8_500_000), 501_000);
    }
}
