//! Lines of the log that something outside can cause as often as it likes: the metrics count them all, and the log says
//! the first of each kind at once, and after it one in ten seconds at most.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Between two lines of a kind.
const INTERVAL: Duration = Duration::from_secs(10);
/// Kinds that are told apart; where more come within the interval, they have to wait for it.
const MAX_KINDS: usize = 64;

/// Who may say what when.
#[derive(Debug, Default)]
pub struct Sparse(Mutex<HashMap<String, Said>>);

/// The last line of a kind.
#[derive(Debug)]
struct Said {
    at: Instant,
    left_out: u64,
}

impl Sparse {
    /// Whether a line of this kind may go to the log now, and how many were left out before it. `None`: this one is
    /// left out.
    #[must_use]
    pub fn pass(&self, kind: &str) -> Option<u64> {
        let now = Instant::now();
        let due = |said: &Said| now.duration_since(said.at) >= INTERVAL;
        let mut kinds = self.0.lock();
        if let Some(said) = kinds.get_mut(kind) {
            if !due(said) {
                said.left_out += 1;
                return None;
            }
            said.at = now;
            return Some(std::mem::take(&mut said.left_out));
        }
        if kinds.len() >= MAX_KINDS {
            kinds.retain(|_kind, said| !due(said));
        }
        if kinds.len() >= MAX_KINDS {
            return None;
        }
        kinds.insert(kind.to_owned(), Said { at: now, left_out: 0 });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_of_each_kind_passes_and_then_one_in_an_interval_that_counts_the_others() {
        let sparse = Sparse::default();
        assert_eq!((sparse.pass("a"), sparse.pass("b")), (Some(0), Some(0)));
        for _ in 0..1000 {
            assert_eq!(sparse.pass("a"), None);
        }
        tokio::time::advance(INTERVAL).await;
        assert_eq!((sparse.pass("a"), sparse.pass("b")), (Some(1000), Some(0)));
        assert_eq!(sparse.pass("a"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn kinds_without_end_take_no_memory_and_make_no_lines_without_end() {
        let sparse = Sparse::default();
        let passed = |round: u32| {
            (0..10_000).filter(|kind| sparse.pass(&format!("{round} {kind}")).is_some()).count()
        };
        assert_eq!(passed(1), MAX_KINDS);
        tokio::time::advance(INTERVAL).await;
        assert_eq!(passed(2), MAX_KINDS);
        assert_eq!(sparse.0.lock().len(), MAX_KINDS);
    }
}
