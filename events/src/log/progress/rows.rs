//! Progress as it lies in the store.

use super::{Lanes, Progress, Unsettled};
use crate::log::record::{AttemptRow, ProgressRow};

impl Progress {
    /// Reads back what was stored. Everything that was out is ready again, unspent.
    pub(in crate::log) fn restore(
        row: &ProgressRow,
        attempts: &[(u64, AttemptRow)],
        now_ms: u64,
    ) -> Self {
        let mut progress = Self::starting_at(row.cursor);
        progress.lanes = Lanes::restore(&row.lanes);
        for position in &row.fresh {
            progress.unsettled.insert(*position, Unsettled::default());
            progress.ready.insert(*position);
        }
        for (position, attempt) in attempts {
            progress.cursor = progress.cursor.max(position + 1);
            progress.unsettled.remove(position);
            progress.ready.remove(position);
            if attempt.scheduled {
                progress.scheduled.insert((attempt.not_before_ms, *position));
                progress.scheduled_at.insert(*position, attempt.not_before_ms);
                continue;
            }
            // Nobody waits longer because the clock was set back meanwhile.
            let set_back_ms = attempt.noted_ms.saturating_sub(now_ms);
            let due_ms = attempt.not_before_ms.saturating_sub(set_back_ms);
            progress.delayed.insert((due_ms, *position));
            // It was the one of its key that was out, so it holds back the others from the start.
            let due_ms = Some(due_ms);
            let first = attempt.key != 0 && progress.lanes.occupy(attempt.key, *position);
            let key = if first { attempt.key } else { 0 };
            let state = Unsettled {
                spent: attempt.spent,
                has_row: true,
                due_ms,
                key,
                stays: true,
                meant_for_ms: 0,
            };
            progress.unsettled.insert(*position, state);
        }
        progress
    }

    /// The form for the store, without the rows.
    pub(in crate::log) fn to_row(&self) -> ProgressRow {
        let fresh = self.unsettled.iter().filter(|(_, state)| !state.has_row);
        ProgressRow {
            cursor: self.cursor,
            fresh: fresh.map(|(position, _)| *position).collect(),
            lanes: self.lanes.to_rows(),
        }
    }
}
