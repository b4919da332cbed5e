//! What is told of progress, and what retention needs to know.

use super::Progress;

impl Progress {
    /// Most attempts that an unsettled event has spent.
    pub(in crate::log) fn most_spent(&self) -> u32 {
        self.unsettled.values().map(|state| state.spent).max().unwrap_or(0)
    }

    /// Events that wait after a failed attempt.
    pub(in crate::log) fn retrying(&self) -> u64 {
        let failed = self.delayed.iter().filter(|(_, position)| self.spent(*position) > 0);
        failed.count() as u64
    }

    /// Lowest position that is still needed.
    pub(in crate::log) fn floor(&self) -> u64 {
        let unsettled = self.unsettled.first_key_value().map(|(position, _)| *position);
        let scheduled = self.scheduled_at.first_key_value().map(|(position, _)| *position);
        let lowest = [unsettled, scheduled, self.lanes.floor()].into_iter().flatten().min();
        lowest.unwrap_or(self.cursor)
    }

    /// Events not settled yet, due or not; `end` is one past the topic's last.
    pub(in crate::log) fn lag(&self, end: u64) -> u64 {
        let known = (self.unsettled.len() + self.scheduled.len()) as u64;
        end.saturating_sub(self.cursor) + known + self.lanes.put_off_events()
    }

    /// Those of them that are known to be for later. What nobody was there for to be handed to is not known.
    pub(in crate::log) fn not_due(&self, now_ms: u64) -> u64 {
        let due = self.scheduled.range(..=(now_ms, u64::MAX)).count();
        (self.scheduled.len() - due) as u64
    }

    /// Lowest position that waits since it was published.
    pub(in crate::log) fn floor_of_due(&self) -> u64 {
        let mut plain = self.unsettled.iter().filter(|(_, state)| state.meant_for_ms == 0);
        let plain = plain.next().map(|(position, _)| *position);
        [plain, self.lanes.floor()].into_iter().flatten().min().unwrap_or(self.cursor)
    }

    /// The longest that one waits of those that were published for a time that has come: since that time.
    pub(in crate::log) fn due_since(&self, now_ms: u64) -> Option<u64> {
        let meant = self.unsettled.values().map(|state| state.meant_for_ms).filter(|ms| *ms > 0);
        let scheduled = self.scheduled.first().map(|(at_ms, _)| *at_ms);
        meant.chain(scheduled).min().filter(|at_ms| *at_ms <= now_ms)
    }
}
