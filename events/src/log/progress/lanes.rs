//! The keys of an ordered subscription: of each, one event is out at most, and the others wait in publish order.
//!
//! A key that is stuck must not fill the memory that the others need. Then its waiting events are put off: only the
//! position of the first is kept, and later events of the key are not even looked at. When the key is free, the topic
//! is read again from there, a piece at a time. What is put off was never handed out and has no row.

use std::collections::{BTreeMap, BTreeSet};

use crate::log::record::LaneRow;

/// All keys with something unsettled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lanes {
    /// By the hash of the key, never 0. Two keys with the same hash wait for each other, which harms no order.
    lanes: BTreeMap<u64, Lane>,
    /// Those that are free and have events put off.
    refills: BTreeSet<u64>,
    /// Lanes with `put_off`, by its position.
    from: BTreeSet<(u64, u64)>,
    /// Events put off, of all lanes.
    events: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lane {
    /// The one that is out, or that waits for its next attempt.
    head: Option<u64>,
    waiting: BTreeSet<u64>,
    put_off: Option<PutOff>,
}

/// All events of the key from a position on, up to the cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PutOff {
    from: u64,
    events: u64,
}

/// What becomes of an event that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It goes out.
    Go,
    /// It is remembered.
    Waits,
    /// It is forgotten, and read again.
    PutOff,
}

/// What has to be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::log) struct Refill {
    pub(in crate::log) key: u64,
    pub(in crate::log) from: u64,
    /// One past the last.
    pub(in crate::log) until: u64,
}

impl Lanes {
    /// Every key that has something put off is read again: whatever was out has come back.
    pub(super) fn restore(rows: &[LaneRow]) -> Self {
        let mut lanes = Self::default();
        for row in rows {
            let put_off = PutOff { from: row.from, events: row.events };
            let lane = Lane { put_off: Some(put_off), ..Lane::default() };
            lanes.lanes.insert(row.key, lane);
            lanes.refills.insert(row.key);
            lanes.from.insert((row.from, row.key));
            lanes.events += row.events;
        }
        lanes
    }

    pub(super) fn to_rows(&self) -> Vec<LaneRow> {
        let put_off = self.from.iter().filter_map(|(_, key)| Some((*key, self.lanes.get(key)?)));
        let rows = put_off.filter_map(|(key, lane)| {
            let PutOff { from, events } = lane.put_off?;
            Some(LaneRow { key, from, events })
        });
        rows.collect()
    }

    /// A stored event is the one that is out. False: another one is.
    pub(super) fn occupy(&mut self, key: u64, position: u64) -> bool {
        let lane = self.lanes.entry(key).or_default();
        let first = lane.head.is_none();
        if first {
            lane.head = Some(position);
            self.refills.remove(&key);
        }
        first
    }

    pub(super) fn claim(&mut self, key: u64, position: u64, again: bool) -> Claim {
        let lane = self.lanes.entry(key).or_default();
        if lane.head == Some(position) {
            return Claim::Go;
        }
        match &mut lane.put_off {
            // Anything older was remembered all along, and so is what cannot be found by reading.
            Some(put_off) if again && position >= put_off.from => {
                put_off.events += 1;
                self.events += 1;
                Claim::PutOff
            }
            _ if lane.head.is_none() => {
                lane.head = Some(position);
                Claim::Go
            }
            _ => {
                lane.waiting.insert(position);
                Claim::Waits
            }
        }
    }

    /// The event is no longer the lane's. Returns the one that may go out instead.
    pub(super) fn done(&mut self, key: u64, position: u64) -> Option<u64> {
        let lane = self.lanes.get_mut(&key)?;
        lane.waiting.remove(&position);
        if lane.head == Some(position) {
            lane.head = None;
        }
        if lane.head.is_some() {
            return None;
        }
        if let Some(next) = lane.waiting.pop_first() {
            return Some(next);
        }
        if lane.put_off.is_some() {
            self.refills.insert(key);
        } else {
            self.lanes.remove(&key);
        }
        None
    }

    /// Puts off what waits behind an event that failed, and behind any event, if there are at least so many. Returns
    /// what to forget: of each lane a tail that can be found `again`.
    pub(super) fn put_off(
        &mut self,
        (behind_failed, behind_any): (usize, usize),
        failed: impl Fn(&u64) -> bool,
        again: impl Fn(&u64) -> bool,
    ) -> Vec<u64> {
        let mut gone = Vec::new();
        for (key, lane) in &mut self.lanes {
            let stuck = lane.head.is_some_and(|head| failed(&head));
            let worth_it = if stuck { behind_failed } else { behind_any };
            if lane.waiting.len() < worth_it {
                continue;
            }
            // What has a row stays; everything after the last of those can go.
            let last_kept = lane.waiting.iter().rev().find(|position| !again(position)).copied();
            let from = last_kept.map_or(0, |kept| kept + 1);
            let tail = lane.waiting.split_off(&from);
            let Some(first) = tail.first().copied() else {
                continue;
            };
            let more = tail.len() as u64;
            // What was put off before comes after all of these.
            let before = lane.put_off.map_or(0, |put_off| {
                self.from.remove(&(put_off.from, *key));
                put_off.events
            });
            lane.put_off = Some(PutOff { from: first, events: before + more });
            self.from.insert((first, *key));
            self.events += more;
            gone.extend(tail);
        }
        gone
    }

    /// Whether an event of a key is among those put off.
    pub(super) fn is_put_off(&self, key: u64, position: u64) -> bool {
        let put_off = self.lanes.get(&key).and_then(|lane| lane.put_off);
        put_off.is_some_and(|put_off| position >= put_off.from)
    }

    pub(super) fn refill(&self, cursor: u64) -> Option<Refill> {
        let key = *self.refills.first()?;
        let from = self.lanes.get(&key)?.put_off?.from;
        Some(Refill { key, from, until: cursor })
    }

    /// Events of the key were `found`; what remains lies from `until` on. Returns the one that may go out.
    pub(super) fn refilled(
        &mut self,
        key: u64,
        found: &[u64],
        until: u64,
        cursor: u64,
    ) -> Option<u64> {
        let lane = self.lanes.get_mut(&key)?;
        let put_off = lane.put_off.as_mut()?;
        self.from.remove(&(put_off.from, key));
        // Removed events are never found: in the end the count was too high.
        let over = until >= cursor;
        let counted = if over { put_off.events } else { put_off.events.min(found.len() as u64) };
        self.events -= counted;
        put_off.events -= counted;
        put_off.from = until;
        if over {
            lane.put_off = None;
        } else {
            self.from.insert((until, key));
        }
        if over || !found.is_empty() {
            self.refills.remove(&key);
        }
        lane.waiting.extend(found);
        if lane.head.is_some() {
            return None;
        }
        let next = lane.waiting.pop_first();
        if over && next.is_none() {
            self.lanes.remove(&key);
        }
        next
    }

    /// Everything below a position is gone. Returns how many events that were put off were lost, at most.
    pub(super) fn skip_to(&mut self, first: u64) -> u64 {
        let mut lost = 0;
        while let Some((from, key)) = self.from.first().copied()
            && from < first
        {
            self.from.remove(&(from, key));
            let Some(put_off) = self.lanes.get_mut(&key).and_then(|lane| lane.put_off.as_mut())
            else {
                continue;
            };
            let gone = put_off.events.min(first - from);
            put_off.events -= gone;
            put_off.from = first;
            self.from.insert((first, key));
            lost += gone;
        }
        self.events -= lost;
        lost
    }

    /// Forgets all keys; returns what waited. Nothing may be put off.
    pub(super) fn clear(&mut self) -> Vec<u64> {
        let lanes = std::mem::take(self);
        lanes.lanes.into_values().flat_map(|lane| lane.waiting).collect()
    }

    pub(super) fn has_put_off(&self) -> bool {
        !self.from.is_empty()
    }

    pub(super) fn holds(&self, key: u64, position: u64) -> bool {
        self.lanes.get(&key).is_some_and(|lane| lane.waiting.contains(&position))
    }

    /// Lowest position that was put off.
    pub(super) fn floor(&self) -> Option<u64> {
        self.from.first().map(|(from, _)| *from)
    }

    pub(super) fn put_off_events(&self) -> u64 {
        self.events
    }
}
