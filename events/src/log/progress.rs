//! How far a subscription is. A pure state machine: what waits, what is out, what comes back when.

use std::collections::{BTreeMap, BTreeSet};

use super::record::{AttemptRow, ProgressRow};

/// Most unsettled events of one subscription. Past it no new ones go out until some are settled, so that an
/// app that fails everything cannot grow this without bound.
pub(super) const MAX_UNSETTLED: usize = 16_384;

/// State of one subscription of one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// Lowest position that was never handed out.
    cursor: u64,
    /// Positions below the cursor that are not settled.
    unsettled: BTreeMap<u64, Unsettled>,
    /// Those of them that can go out now.
    ready: BTreeSet<u64>,
    /// Those that wait, by time.
    delayed: BTreeSet<(u64, u64)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Unsettled {
    /// Attempts spent.
    spent: u32,
    /// Known to the store by a row of its own.
    has_row: bool,
    /// Its time in `delayed`, while it is there.
    due_ms: Option<u64>,
}

/// What a settled delivery changes in the rows of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowChange {
    None,
    Put(AttemptRow),
    Delete,
}

impl Progress {
    /// Starts at a position.
    pub(super) fn starting_at(cursor: u64) -> Self {
        Self {
            cursor,
            unsettled: BTreeMap::new(),
            ready: BTreeSet::new(),
            delayed: BTreeSet::new(),
        }
    }

    /// Reads back what was stored. Everything that was out is ready again, unspent.
    pub(super) fn restore(row: &ProgressRow, attempts: &[(u64, AttemptRow)]) -> Self {
        let mut progress = Self::starting_at(row.cursor);
        for position in &row.fresh {
            progress.unsettled.insert(*position, Unsettled::default());
            progress.ready.insert(*position);
        }
        for (position, attempt) in attempts {
            progress.cursor = progress.cursor.max(position + 1);
            let due_ms = Some(attempt.not_before_ms);
            let state = Unsettled { spent: attempt.spent, has_row: true, due_ms };
            progress.unsettled.insert(*position, state);
            progress.ready.remove(position);
            progress.delayed.insert((attempt.not_before_ms, *position));
        }
        progress
    }

    /// The form for the store, without the rows.
    pub(super) fn to_row(&self) -> ProgressRow {
        let fresh = self.unsettled.iter().filter(|(_, state)| !state.has_row);
        ProgressRow { cursor: self.cursor, fresh: fresh.map(|(position, _)| *position).collect() }
    }

    /// The next position to hand out and its attempt (from 1); `end` is one past the topic's last.
    pub(super) fn take(&mut self, end: u64) -> Option<(u64, u32)> {
        if let Some(position) = self.ready.pop_first() {
            let spent = self.unsettled.get(&position).map_or(0, |state| state.spent);
            return Some((position, spent.saturating_add(1)));
        }
        if self.cursor >= end || self.unsettled.len() >= MAX_UNSETTLED {
            return None;
        }
        let position = self.cursor;
        self.cursor += 1;
        self.unsettled.insert(position, Unsettled::default());
        Some((position, 1))
    }

    /// Moves what is due from delayed to ready.
    pub(super) fn wake(&mut self, now_ms: u64) {
        while let Some((at, position)) = self.delayed.first().copied()
            && at <= now_ms
        {
            self.delayed.pop_first();
            self.ready.insert(position);
            if let Some(state) = self.unsettled.get_mut(&position) {
                state.due_ms = None;
            }
        }
    }

    /// When the next delayed event is due.
    pub(super) fn next_wake(&self) -> Option<u64> {
        self.delayed.first().map(|(at, _)| *at)
    }

    /// A delivery that nobody answers for any more: ready at once, unspent.
    pub(super) fn give_back(&mut self, position: u64) {
        if self.unsettled.contains_key(&position) {
            self.ready.insert(position);
        }
    }

    /// Done with it, one way or another.
    pub(super) fn finish(&mut self, position: u64) -> RowChange {
        let Some(state) = self.unsettled.remove(&position) else {
            return RowChange::None;
        };
        self.ready.remove(&position);
        if let Some(due_ms) = state.due_ms {
            self.delayed.remove(&(due_ms, position));
        }
        if state.has_row { RowChange::Delete } else { RowChange::None }
    }

    /// Not before a time, and `spend` says whether the attempt counts.
    pub(super) fn postpone(&mut self, position: u64, not_before_ms: u64, spend: bool) -> RowChange {
        let Some(state) = self.unsettled.get_mut(&position) else {
            return RowChange::None;
        };
        state.spent = state.spent.saturating_add(u32::from(spend));
        state.has_row = true;
        state.due_ms = Some(not_before_ms);
        self.delayed.insert((not_before_ms, position));
        RowChange::Put(AttemptRow { spent: state.spent, not_before_ms })
    }

    /// Attempts that an unsettled event has spent.
    pub(super) fn spent(&self, position: u64) -> u32 {
        self.unsettled.get(&position).map_or(0, |state| state.spent)
    }

    /// Whether it is known, and nobody has it.
    pub(super) fn waits(&self, position: u64) -> bool {
        let delayed = self.unsettled.get(&position).is_some_and(|state| state.due_ms.is_some());
        delayed || self.ready.contains(&position)
    }

    /// Events that wait after a failed attempt.
    pub(super) fn retrying(&self) -> u64 {
        let failed = self.delayed.iter().filter(|(_, position)| self.spent(*position) > 0);
        failed.count() as u64
    }

    /// Lowest position that is still needed.
    pub(super) fn floor(&self) -> u64 {
        self.unsettled.first_key_value().map_or(self.cursor, |(position, _)| *position)
    }

    /// Events not settled yet; `end` is one past the topic's last.
    pub(super) fn lag(&self, end: u64) -> u64 {
        end.saturating_sub(self.cursor) + self.unsettled.len() as u64
    }
}

#[cfg(test)]
mod tests;
