//! Which (`source`, `id`) a topic saw lately. Keeps a keyed 64-bit fingerprint and the position of each event of
//! the window; the record itself, which the store holds anyway, says whether it is really the same. So nothing more
//! is written, a restart rebuilds this from the topic's youngest records, and nobody can provoke collisions.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};

/// The window is cut into this many spans, forgotten one at a time.
const SPANS: u64 = 4;
/// Most events remembered for one topic (about 30 bytes each). Past it the oldest span goes early.
const MAX_ENTRIES: usize = 4 << 20;
/// The same for one span, so that about as many are full at once as the window has.
const MAX_SPAN: usize = MAX_ENTRIES / 4;

/// Keyed hash of a (`source`, `id`), which no publisher can foresee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint(u64);

impl Hash for Fingerprint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0);
    }
}

/// A fingerprint is a good hash already.
#[derive(Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = self.0.rotate_left(8) ^ value;
    }
}

/// Memory of one topic's window.
#[derive(Debug)]
pub(super) struct Dedup {
    window_ms: u64,
    hasher: RandomState,
    /// Oldest first.
    spans: VecDeque<Span>,
}

#[derive(Debug)]
struct Span {
    /// Youngest entry.
    until_ms: u64,
    started_ms: u64,
    positions: HashMap<Fingerprint, u64, BuildHasherDefault<AsItIs>>,
}

impl Dedup {
    /// Remembers for a window; zero for not at all.
    pub(super) fn new(window_ms: u64) -> Self {
        Self { window_ms, hasher: RandomState::new(), spans: VecDeque::new() }
    }

    /// False: this topic takes everything.
    pub(super) fn is_on(&self) -> bool {
        self.window_ms > 0
    }

    /// Publishing times from here on count.
    pub(super) fn horizon_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.window_ms)
    }

    /// Positions that may hold the same event, youngest first.
    pub(super) fn candidates(&self, print: Fingerprint) -> impl Iterator<Item = u64> {
        self.spans.iter().rev().filter_map(move |span| span.positions.get(&print).copied())
    }

    /// Remembers an event. False: the window was cut short to make room.
    pub(super) fn insert(&mut self, print: Fingerprint, position: u64, now_ms: u64) -> bool {
        let width = self.window_ms / SPANS;
        // A full one is closed, so that too many events cost the oldest of them and not all.
        let over = |span: &Span| {
            now_ms.saturating_sub(span.started_ms) > width || span.positions.len() >= MAX_SPAN
        };
        if self.spans.back().is_none_or(over) {
            let positions = HashMap::default();
            self.spans.push_back(Span { until_ms: now_ms, started_ms: now_ms, positions });
        }
        if let Some(span) = self.spans.back_mut() {
            span.until_ms = span.until_ms.max(now_ms);
            span.positions.insert(print, position);
        }
        if self.len() <= MAX_ENTRIES {
            return true;
        }
        self.spans.pop_front();
        false
    }

    /// Remembers an event that is older than all others. False: there is no room for it, nor for older ones.
    pub(super) fn insert_older(&mut self, print: Fingerprint, position: u64, at_ms: u64) -> bool {
        if self.len() >= MAX_ENTRIES {
            return false;
        }
        let width = self.window_ms / SPANS;
        let over = |span: &Span| {
            span.until_ms.saturating_sub(at_ms) > width || span.positions.len() >= MAX_SPAN
        };
        if self.spans.front().is_none_or(over) {
            let positions = HashMap::default();
            self.spans.push_front(Span { until_ms: at_ms, started_ms: at_ms, positions });
        }
        if let Some(span) = self.spans.front_mut() {
            span.until_ms = span.until_ms.max(at_ms);
            span.started_ms = span.started_ms.min(at_ms);
            span.positions.entry(print).or_insert(position);
        }
        true
    }

    /// Forgets what is older than the window.
    pub(super) fn expire(&mut self, now_ms: u64) {
        let horizon = self.horizon_ms(now_ms);
        while self.spans.front().is_some_and(|span| span.until_ms < horizon) {
            self.spans.pop_front();
        }
    }

    fn len(&self) -> usize {
        self.spans.iter().map(|span| span.positions.len()).sum()
    }

    pub(super) fn fingerprint(&self, source: &str, id: &str) -> Fingerprint {
        Fingerprint(self.hasher.hash_one((source, id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(dedup: &mut Dedup, source: &str, id: &str, position: u64, now_ms: u64) {
        assert!(dedup.insert(dedup.fingerprint(source, id), position, now_ms));
    }

    fn candidates(dedup: &Dedup, source: &str, id: &str) -> Vec<u64> {
        dedup.candidates(dedup.fingerprint(source, id)).collect()
    }

    #[test]
    fn events_are_remembered_for_the_window_and_then_forgotten() {
        let mut dedup = Dedup::new(1000);
        for at in 0..50 {
            insert(&mut dedup, "/s", &at.to_string(), at, at * 100);
            dedup.expire(at * 100);
        }
        assert_eq!(candidates(&dedup, "/s", "49"), [49]);
        assert_eq!(candidates(&dedup, "/s", "40"), [40]);
        assert_eq!(candidates(&dedup, "/s", "20"), Vec::<u64>::new());
        assert_eq!(candidates(&dedup, "/t", "49"), Vec::<u64>::new());
        assert!(dedup.len() < 20);
    }

    #[test]
    fn too_many_events_cost_the_oldest_only() {
        let mut dedup = Dedup::new(1000);
        let many = (MAX_ENTRIES + 1) as u64;
        let whole = (0..many).all(|at| dedup.insert(Fingerprint(at), at, 0));
        assert!(!whole);
        assert_eq!(dedup.candidates(Fingerprint(many - 1)).collect::<Vec<_>>(), [many - 1]);
        assert_eq!(dedup.len(), MAX_ENTRIES + 1 - MAX_SPAN);
    }

    #[test]
    fn what_is_read_back_is_remembered_as_if_it_came_just_then() {
        let (mut live, mut read) = (Dedup::new(1000), Dedup::new(1000));
        let times = [(0, 0), (1, 0), (2, 100), (3, 300), (4, 250), (5, 600), (6, 900)];
        for (position, at_ms) in times {
            live.insert(Fingerprint(position % 6), position, at_ms);
        }
        for (position, at_ms) in times.into_iter().rev() {
            assert!(read.insert_older(Fingerprint(position % 6), position, at_ms));
        }
        for now_ms in [900, 1050, 1200, 1500, 2000] {
            live.expire(now_ms);
            read.expire(now_ms);
            // Whatever the spans, nothing of the window is missing.
            for (position, _) in times.into_iter().filter(|(_, at_ms)| now_ms <= at_ms + 1000) {
                let found = |dedup: &Dedup| {
                    dedup.candidates(Fingerprint(position % 6)).any(|at| at >= position)
                };
                assert!(found(&live) && found(&read), "{position} at {now_ms}");
            }
        }
        assert!(read.spans.is_empty());
        assert!(read.insert(Fingerprint(9), 9, 2000));
    }

    #[test]
    fn reading_back_ends_where_there_is_no_room() {
        let mut dedup = Dedup::new(1000);
        let many = MAX_ENTRIES as u64;
        assert!((0..many).all(|at| dedup.insert_older(Fingerprint(at), many - at, 0)));
        assert!(!dedup.insert_older(Fingerprint(many), 0, 0));
        assert_eq!(dedup.spans.len(), MAX_ENTRIES / MAX_SPAN);
    }

    #[test]
    fn source_and_id_are_not_mixed_up() {
        let mut dedup = Dedup::new(1000);
        insert(&mut dedup, "ab", "c", 1, 0);
        assert_eq!(candidates(&dedup, "a", "bc"), Vec::<u64>::new());
    }
}
