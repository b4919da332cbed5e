//! What a hub has in its hands, and which of it may go out next. Pure: the caller brings the time.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use async_nats::Subject;
use tokio::time::Instant;

use crate::cloudevent::Event;

/// An event that JetStream gave to this process and waits to hear of.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) event: Event,
    /// Where to acknowledge it.
    pub(super) reply: Subject,
    /// The attempt that its next delivery is, from 1.
    pub(super) attempt: u32,
    pub(super) stage: Stage,
    /// What it keeps its order with.
    pub(super) key: Option<String>,
    /// When JetStream last heard of it.
    pub(super) heard: Instant,
    /// How many came before it; counted as it is taken in.
    pub(super) came: u64,
}

/// Where a held event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Something is being written, or read.
    Busy,
    /// It came again, and the attempts that were spent on it are being read: it does not lose its place meanwhile, see
    /// [`Hands::next`].
    Asking,
    /// May go out.
    Ready,
    /// May go out from then on.
    From(Instant),
    /// With this consumer.
    Out(u64),
}

/// Everything held, by position.
#[derive(Debug, Default)]
pub(super) struct Hands {
    held: BTreeMap<u64, Held>,
    /// Of all of them.
    bytes: usize,
    ready: BTreeSet<u64>,
    /// How many have come.
    came: u64,
    /// Those that are being asked about, by how many came before each.
    asking: BTreeSet<u64>,
    /// Positions of each key, where order is kept.
    keys: HashMap<String, BTreeSet<u64>>,
}

impl Hands {
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// About what all of it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The same of what is with consumers.
    pub(super) fn bytes_out(&self) -> usize {
        let out = self.held.values().filter(|held| matches!(held.stage, Stage::Out(_)));
        out.map(|held| held.event.size()).sum()
    }

    pub(super) fn get(&self, position: u64) -> Option<&Held> {
        self.held.get(&position)
    }

    pub(super) fn get_mut(&mut self, position: u64) -> Option<&mut Held> {
        self.held.get_mut(&position)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Held> {
        self.held.values_mut()
    }

    pub(super) fn insert(&mut self, position: u64, mut held: Held) {
        held.came = self.came;
        self.came += 1;
        if let Some(key) = &held.key {
            self.keys.entry(key.clone()).or_default().insert(position);
        }
        let stage = held.stage;
        self.bytes += held.event.size();
        if let Some(before) = self.held.insert(position, held) {
            self.bytes -= before.event.size();
            self.asking.remove(&before.came);
        }
        self.set(position, stage);
    }

    /// Moves an event on.
    pub(super) fn set(&mut self, position: u64, stage: Stage) {
        if let Some(held) = self.held.get_mut(&position) {
            held.stage = stage;
            match stage {
                Stage::Ready => self.ready.insert(position),
                Stage::Busy | Stage::Asking | Stage::From(_) | Stage::Out(_) => {
                    self.ready.remove(&position)
                }
            };
            match stage {
                Stage::Asking => self.asking.insert(held.came),
                Stage::Busy | Stage::Ready | Stage::From(_) | Stage::Out(_) => {
                    self.asking.remove(&held.came)
                }
            };
        }
    }

    pub(super) fn remove(&mut self, position: u64) -> Option<Held> {
        let held = self.held.remove(&position)?;
        self.bytes -= held.event.size();
        self.ready.remove(&position);
        self.asking.remove(&held.came);
        if let Some(key) = &held.key
            && let Some(positions) = self.keys.get_mut(key)
        {
            positions.remove(&position);
            if positions.is_empty() {
                self.keys.remove(key);
            }
        }
        Some(held)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Everything, oldest first.
    pub(super) fn take(&mut self) -> Vec<(u64, Held)> {
        let all = std::mem::take(self);
        all.held.into_iter().collect()
    }

    /// The oldest event that may go out: no older one of its key is held, and it did not come after one that came again and
    /// is being asked about. What somebody gave back would be overtaken by what follows it otherwise. Nobody waits for what
    /// comes later, however many come again.
    pub(super) fn next(&self) -> Option<u64> {
        let asked = self.asking.first().copied().unwrap_or(u64::MAX);
        self.ready.iter().copied().find(|position| {
            let Some(held) = self.held.get(position) else { return false };
            let first = held.key.as_ref().and_then(|key| self.keys.get(key)?.first());
            held.came < asked && first.is_none_or(|first| first == position)
        })
    }

    /// What waited until now may go out. Returns when the next one may.
    pub(super) fn wake(&mut self, now: Instant) -> Option<Instant> {
        let due = |held: &Held| match held.stage {
            Stage::From(at) => Some(at),
            Stage::Busy | Stage::Asking | Stage::Ready | Stage::Out(_) => None,
        };
        let woken: Vec<u64> = self
            .held
            .iter()
            .filter(|(_, held)| due(held).is_some_and(|at| at <= now))
            .map(|(position, _)| *position)
            .collect();
        for position in woken {
            self.set(position, Stage::Ready);
        }
        self.held.values().filter_map(due).min()
    }

    /// What a consumer had may go to another.
    pub(super) fn take_back(&mut self, member: u64) {
        let back: Vec<u64> = self
            .held
            .iter()
            .filter(|(_, held)| held.stage == Stage::Out(member))
            .map(|(position, _)| *position)
            .collect();
        for position in back {
            self.set(position, Stage::Ready);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn hold(hands: &mut Hands, position: u64, key: Option<&str>) {
        let event = Event::new(position.to_string(), "/s", "t").unwrap();
        let (key, now) = (key.map(str::to_owned), Instant::now());
        let (reply, stage) = ("r".into(), Stage::Ready);
        hands.insert(position, Held { event, reply, attempt: 1, stage, key, heard: now, came: 0 });
    }

    #[test]
    fn a_key_goes_one_by_one_and_holds_back_only_itself() {
        let mut hands = Hands::default();
        hold(&mut hands, 2, Some("a"));
        hold(&mut hands, 1, Some("a"));
        hold(&mut hands, 3, Some("b"));
        assert_eq!(hands.next(), Some(1));
        hands.set(1, Stage::Out(7));
        assert_eq!(hands.next(), Some(3));
        hands.set(3, Stage::Out(7));
        assert_eq!(hands.next(), None);
        let later = Instant::now() + Duration::from_secs(1);
        hands.set(1, Stage::From(later));
        assert_eq!((hands.next(), hands.wake(Instant::now())), (None, Some(later)));
        assert_eq!((hands.wake(later), hands.next()), (None, Some(1)));
        hands.remove(1);
        assert_eq!(hands.next(), Some(2));
    }

    #[test]
    fn what_came_after_one_that_is_asked_about_waits_for_it_and_for_no_other() {
        let mut hands = Hands::default();
        for position in [7, 1, 2, 8] {
            hold(&mut hands, position, None);
        }
        for position in [1, 2] {
            hands.set(position, Stage::Asking);
        }
        assert_eq!(hands.next(), Some(7), "it was there before");
        hands.set(7, Stage::Out(1));
        hands.set(2, Stage::Ready);
        assert_eq!(hands.next(), None, "both came later");
        hands.set(1, Stage::Ready);
        assert_eq!(hands.next(), Some(1));
        // Whatever becomes of it, nobody waits for it any more.
        for gone in [Stage::Busy, Stage::Asking] {
            hands.set(1, gone);
            hands.remove(1);
            assert_eq!(hands.next(), Some(2), "{gone:?}");
            hold(&mut hands, 1, None);
        }
        hands.set(1, Stage::Asking);
        hold(&mut hands, 1, None);
        assert_eq!(hands.next(), Some(1), "the same one again");
    }

    #[test]
    fn what_a_consumer_had_comes_back_in_order() {
        let mut hands = Hands::default();
        for position in 1..=3 {
            hold(&mut hands, position, None);
            hands.set(position, Stage::Out(position % 2));
        }
        hands.take_back(1);
        assert_eq!(hands.next(), Some(1));
        let bytes = hands.bytes();
        hands.remove(3);
        assert_eq!(hands.bytes(), bytes / 3 * 2);
        assert_eq!((hands.take().len(), hands.bytes()), (2, 0));
    }
}
