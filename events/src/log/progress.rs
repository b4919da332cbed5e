//! How far a subscription is. A pure state machine: what waits, what is out, what comes back when, and what is held
//! back behind an older event of its key.

use std::collections::{BTreeMap, BTreeSet};

use super::record::AttemptRow;

mod lanes;
mod rows;
mod summary;

pub(super) use lanes::Refill;
use lanes::{Claim, Lanes};

/// Most unsettled events of one subscription. Past it no new ones go out until some are settled, so that an
/// app that fails everything cannot grow this without bound.
pub(super) const MAX_UNSETTLED: usize = 16_384;
/// Most events of one subscription that are known to wait for the time that they were published for (about 60 bytes each).
/// Past it no new events go out until some are due.
pub(super) const MAX_SCHEDULED: usize = 262_144;

/// A failing key with fewer waiting events is not worth a second reading of the topic.
const WORTH_IT: usize = 16;

/// State of one subscription of one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// Lowest position that was never handed out.
    cursor: u64,
    /// Positions below the cursor that are not settled, but for those in `scheduled` and those that `lanes` put off.
    unsettled: BTreeMap<u64, Unsettled>,
    /// Those of them that can go out now.
    ready: BTreeSet<u64>,
    /// Those that wait, by time.
    delayed: BTreeSet<(u64, u64)>,
    /// Events published for later, by time. Each has a row of its own.
    scheduled: BTreeSet<(u64, u64)>,
    /// Their times, by position.
    scheduled_at: BTreeMap<u64, u64>,
    lanes: Lanes,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Unsettled {
    /// Attempts spent.
    spent: u32,
    /// Known to the store by a row of its own.
    has_row: bool,
    /// Its time in `delayed`, while it is there.
    due_ms: Option<u64>,
    /// Its lane; 0 for none.
    key: u64,
    /// Reading the topic again would not find it, so it must not be forgotten.
    stays: bool,
    /// The time that it was published for; 0 for none. Not known of one that was tried before a restart.
    meant_for_ms: u64,
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
            scheduled: BTreeSet::new(),
            scheduled_at: BTreeMap::new(),
            lanes: Lanes::default(),
        }
    }

    /// The clock was set back: what waits for another attempt is not to wait longer for that. What was published for a
    /// time waits for that time.
    pub(super) fn clock_set_back(&mut self, by_ms: u64) {
        for (due_ms, position) in std::mem::take(&mut self.delayed) {
            let due_ms = due_ms.saturating_sub(by_ms);
            self.delayed.insert((due_ms, position));
            if let Some(state) = self.unsettled.get_mut(&position) {
                state.due_ms = Some(due_ms);
            }
        }
    }

    /// The next position to hand out and its attempt (from 1); `end` is one past the topic's last.
    pub(super) fn take(&mut self, end: u64) -> Option<(u64, u32)> {
        if let Some(position) = self.ready.pop_first() {
            let spent = self.unsettled.get(&position).map_or(0, |state| state.spent);
            return Some((position, spent.saturating_add(1)));
        }
        if self.cursor >= end || self.scheduled.len() >= MAX_SCHEDULED {
            return None;
        }
        if self.unsettled.len() >= MAX_UNSETTLED && !self.put_off() {
            return None;
        }
        let position = self.cursor;
        self.cursor += 1;
        self.unsettled.insert(position, Unsettled::default());
        Some((position, 1))
    }

    /// Whether a taken event may go out now, in the order of its key (not 0). If not, it waits here until those before
    /// it are done. `again` says that it can be found again by reading the topic.
    pub(super) fn claim(&mut self, position: u64, key: u64, again: bool) -> bool {
        let Some(state) = self.unsettled.get_mut(&position) else {
            return true;
        };
        if state.key == 0 {
            state.key = key;
        }
        // One with a history must not be forgotten either.
        let again = again && !state.has_row;
        state.stays |= !again;
        match self.lanes.claim(state.key, position, again) {
            Claim::Go => true,
            Claim::Waits => false,
            Claim::PutOff => {
                self.unsettled.remove(&position);
                false
            }
        }
    }

    /// Makes room by forgetting events that wait behind a slow or failing one of their key; they are read again when
    /// their turn comes. False: there are none.
    fn put_off(&mut self) -> bool {
        self.put_off_from(WORTH_IT, MAX_UNSETTLED / 4)
    }

    /// The same for keys with at least so many waiting events behind one that failed, or behind any.
    fn put_off_from(&mut self, failed: usize, any: usize) -> bool {
        let (unsettled, delayed) = (&self.unsettled, |position: &u64| {
            self.unsettled.get(position).is_some_and(|state| state.due_ms.is_some())
        });
        let again = |position: &u64| unsettled.get(position).is_some_and(|state| !state.stays);
        let gone = self.lanes.put_off((failed, any), delayed, again);
        for position in &gone {
            self.unsettled.remove(position);
        }
        !gone.is_empty()
    }

    /// A key whose events have to be read again, and where. None while there is no room for them, as for new events.
    pub(super) fn refill(&mut self) -> Option<Refill> {
        self.lanes.refill(self.cursor)?;
        if self.unsettled.len() >= MAX_UNSETTLED && !self.put_off() {
            return None;
        }
        // Anew: what was put off just now may be of this key.
        self.lanes.refill(self.cursor)
    }

    /// Events of a key were read again, up to a position.
    pub(super) fn refilled(&mut self, key: u64, found: &[u64], until: u64) {
        // One that is known is on its way already: after a restart, older ones come back without their key.
        let new = found.iter().filter(|position| !self.unsettled.contains_key(*position));
        let new: Vec<u64> = new.copied().collect();
        for position in &new {
            self.unsettled.insert(*position, Unsettled { key, ..Unsettled::default() });
        }
        if let Some(next) = self.lanes.refilled(key, &new, until, self.cursor) {
            self.ready.insert(next);
        }
    }

    /// Nothing has to be read again.
    pub(super) fn may_reorder(&self) -> bool {
        !self.lanes.has_put_off()
    }

    /// Forgets keys: they mean something else from now on.
    pub(super) fn reorder(&mut self) {
        for position in self.lanes.clear() {
            self.ready.insert(position);
        }
        for state in self.unsettled.values_mut() {
            state.key = 0;
        }
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
        while self.unsettled.len() < MAX_UNSETTLED
            && let Some((at, position)) = self.scheduled.first().copied()
            && at <= now_ms
        {
            self.scheduled.pop_first();
            self.scheduled_at.remove(&position);
            let state = Unsettled { has_row: true, meant_for_ms: at, ..Unsettled::default() };
            self.unsettled.insert(position, state);
            self.ready.insert(position);
        }
    }

    /// Lowest position that was never handed out: the topic had all below it.
    pub(super) fn cursor(&self) -> u64 {
        self.cursor
    }

    /// When the next delayed event is due.
    pub(super) fn next_wake(&self) -> Option<u64> {
        let room = self.unsettled.len() < MAX_UNSETTLED;
        let scheduled = self.scheduled.first().filter(|_first| room);
        [self.delayed.first(), scheduled].into_iter().flatten().map(|(at, _)| *at).min()
    }

    /// A delivery that nobody answers for any more: ready at once, unspent.
    pub(super) fn give_back(&mut self, position: u64) {
        if self.unsettled.contains_key(&position) {
            self.ready.insert(position);
        }
    }

    /// Done with it, one way or another.
    pub(super) fn finish(&mut self, position: u64) -> RowChange {
        if let Some(at) = self.scheduled_at.remove(&position) {
            self.scheduled.remove(&(at, position));
            return RowChange::Delete;
        }
        let Some(state) = self.unsettled.remove(&position) else {
            return RowChange::None;
        };
        self.ready.remove(&position);
        if let Some(due_ms) = state.due_ms {
            self.delayed.remove(&(due_ms, position));
        }
        if state.key != 0
            && let Some(next) = self.lanes.done(state.key, position)
        {
            self.ready.insert(next);
        }
        if state.has_row { RowChange::Delete } else { RowChange::None }
    }

    /// Not before a delay is over, and `spend` says whether the attempt counts.
    pub(super) fn postpone(
        &mut self,
        position: u64,
        now_ms: u64,
        delay_ms: u64,
        spend: bool,
    ) -> RowChange {
        let not_before_ms = now_ms.saturating_add(delay_ms);
        let Some(state) = self.unsettled.get_mut(&position) else {
            return RowChange::None;
        };
        state.spent = state.spent.saturating_add(u32::from(spend));
        state.has_row = true;
        state.due_ms = Some(not_before_ms);
        self.delayed.insert((not_before_ms, position));
        let (spent, key) = (state.spent, state.key);
        RowChange::Put(AttemptRow { spent, not_before_ms, key, scheduled: false, noted_ms: now_ms })
    }

    /// Not before a time, and unspent, as far as memory goes: nothing is written for it, and after a restart it is ready.
    pub(super) fn hold_back(&mut self, position: u64, until_ms: u64) {
        if let Some(state) = self.unsettled.get_mut(&position) {
            state.due_ms = Some(until_ms);
            self.delayed.insert((until_ms, position));
        }
    }

    /// A taken event without a history that was published for a later time: it is out of everyone's way until then.
    pub(super) fn schedule(&mut self, position: u64, at_ms: u64) -> RowChange {
        let Some(state) = self.unsettled.remove(&position) else {
            return RowChange::None;
        };
        if state.key != 0
            && let Some(next) = self.lanes.done(state.key, position)
        {
            self.ready.insert(next);
        }
        self.scheduled.insert((at_ms, position));
        self.scheduled_at.insert(position, at_ms);
        RowChange::Put(AttemptRow {
            not_before_ms: at_ms,
            scheduled: true,
            ..AttemptRow::default()
        })
    }

    /// Everything below a position is gone. Returns the positions whose rows go, and how many events were lost.
    pub(super) fn skip_to(&mut self, first: u64) -> (Vec<u64>, u64) {
        if self.floor() >= first {
            return (Vec::new(), 0);
        }
        let never_seen = first.saturating_sub(self.cursor);
        self.cursor = self.cursor.max(first);
        let unsettled = self.unsettled.range(..first).map(|(position, _)| *position);
        let scheduled = self.scheduled_at.range(..first).map(|(position, _)| *position);
        let gone: Vec<u64> = unsettled.chain(scheduled).collect();
        let mut rows = Vec::new();
        for position in &gone {
            if self.finish(*position) == RowChange::Delete {
                rows.push(*position);
            }
        }
        let put_off = self.lanes.skip_to(first);
        (rows, never_seen + gone.len() as u64 + put_off)
    }

    /// Whether an event is not settled; `key` is its lane.
    pub(super) fn is_open(&self, position: u64, key: Option<u64>) -> bool {
        position >= self.cursor
            || self.unsettled.contains_key(&position)
            || self.scheduled_at.contains_key(&position)
            || key.is_some_and(|key| self.lanes.is_put_off(key, position))
    }

    /// Attempts that an unsettled event has spent.
    pub(super) fn spent(&self, position: u64) -> u32 {
        self.unsettled.get(&position).map_or(0, |state| state.spent)
    }

    /// Whether it is known, and nobody has it.
    pub(super) fn waits(&self, position: u64) -> bool {
        self.ready.contains(&position)
            || self.scheduled_at.contains_key(&position)
            || self.unsettled.get(&position).is_some_and(|state| {
                state.due_ms.is_some() || self.lanes.holds(state.key, position)
            })
    }
}

#[cfg(test)]
mod ordered_tests;
#[cfg(test)]
mod tests;
