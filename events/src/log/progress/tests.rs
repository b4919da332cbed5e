//! The state machine against a model that is too simple to be wrong.

use proptest::prelude::*;

use super::*;

/// What became of each position, by brute force.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Never,
    Out { spent: u32 },
    Waits { spent: u32, until: u64 },
    Done,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Take,
    Finish(usize),
    Postpone(usize, u64, bool),
    GiveBack(usize),
    Publish(u64),
    Pass(u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Take),
        2 => any::<usize>().prop_map(Step::Finish),
        2 => (any::<usize>(), 0_u64..20, any::<bool>())
            .prop_map(|(at, delay, spend)| Step::Postpone(at, delay, spend)),
        1 => any::<usize>().prop_map(Step::GiveBack),
        1 => (1_u64..4).prop_map(Step::Publish),
        1 => (1_u64..10).prop_map(Step::Pass),
        1 => Just(Step::Restart),
    ]
}

struct World {
    progress: Progress,
    rows: BTreeMap<u64, AttemptRow>,
    model: Vec<Fate>,
    out: Vec<u64>,
    now: u64,
}

impl World {
    fn end(&self) -> u64 {
        self.model.len() as u64 + 1
    }

    fn fate(&mut self, position: u64) -> &mut Fate {
        &mut self.model[usize::try_from(position).unwrap() - 1]
    }

    fn pick(&mut self, at: usize) -> Option<u64> {
        if self.out.is_empty() {
            return None;
        }
        let at = at % self.out.len();
        Some(self.out.swap_remove(at))
    }

    fn write(&mut self, position: u64, change: RowChange) {
        match change {
            RowChange::None => {}
            RowChange::Put(row) => drop(self.rows.insert(position, row)),
            RowChange::Delete => assert!(self.rows.remove(&position).is_some()),
        }
    }

    /// The lowest position that the model would hand out: those that were out before come first.
    fn expected(&self) -> Option<(u64, u32)> {
        let due = self.model.iter().zip(1..).filter_map(|(fate, position)| match fate {
            Fate::Waits { spent, until } if *until <= self.now => Some((position, spent + 1)),
            Fate::Never | Fate::Out { .. } | Fate::Waits { .. } | Fate::Done => None,
        });
        let fresh = self.model.iter().zip(1..).filter(|(fate, _)| **fate == Fate::Never);
        due.min().or_else(|| fresh.map(|(_, position)| (position, 1)).min())
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Take => {
                self.progress.wake(self.now);
                let taken = self.progress.take(self.end());
                assert_eq!(taken, self.expected());
                if let Some((position, attempt)) = taken {
                    *self.fate(position) = Fate::Out { spent: attempt - 1 };
                    self.out.push(position);
                }
            }
            Step::Finish(at) => {
                let Some(position) = self.pick(at) else {
                    return;
                };
                *self.fate(position) = Fate::Done;
                let change = self.progress.finish(position);
                self.write(position, change);
            }
            Step::Postpone(at, delay, spend) => {
                let Some(position) = self.pick(at) else {
                    return;
                };
                let until = self.now + delay;
                let Fate::Out { spent } = *self.fate(position) else { unreachable!() };
                let spent = spent + u32::from(spend);
                *self.fate(position) = Fate::Waits { spent, until };
                let change = self.progress.postpone(position, self.now, delay, spend);
                self.write(position, change);
            }
            Step::GiveBack(at) => {
                let Some(position) = self.pick(at) else {
                    return;
                };
                let Fate::Out { spent } = *self.fate(position) else { unreachable!() };
                *self.fate(position) = Fate::Waits { spent, until: 0 };
                self.progress.give_back(position);
            }
            Step::Publish(count) => self.model.extend((0..count).map(|_| Fate::Never)),
            Step::Pass(time) => self.now += time,
            Step::Restart => self.restart(),
        }
    }

    /// Only what is stored survives. What was out comes back, not before its last time, unspent.
    fn restart(&mut self) {
        let rows: Vec<_> = self.rows.iter().map(|(position, row)| (*position, *row)).collect();
        self.progress = Progress::restore(&self.progress.to_row(), &rows, self.now);
        for position in std::mem::take(&mut self.out) {
            let until = self.rows.get(&position).map_or(0, |row| row.not_before_ms);
            let Fate::Out { spent } = *self.fate(position) else { unreachable!() };
            *self.fate(position) = Fate::Waits { spent, until };
        }
    }

    fn check(&self) {
        let open = |fate: &Fate| *fate != Fate::Done;
        let lag = self.model.iter().filter(|fate| open(fate)).count() as u64;
        assert_eq!(self.progress.lag(self.end()), lag);
        let floor = self.model.iter().zip(1..).find(|(fate, _)| open(fate));
        assert_eq!(self.progress.floor(), floor.map_or(self.end(), |(_, position)| position));
    }
}

proptest! {
    #[test]
    fn behaves_like_the_model(steps in prop::collection::vec(step(), 0..200)) {
        let mut world = World {
            progress: Progress::starting_at(1),
            rows: BTreeMap::new(),
            model: Vec::new(),
            out: Vec::new(),
            now: 1,
        };
        for step in steps {
            world.apply(step);
            world.check();
        }
    }
}

#[test]
fn unsettled_events_are_bounded() {
    let mut progress = Progress::starting_at(1);
    let mut taken = 0;
    while let Some((position, _)) = progress.take(u64::MAX) {
        progress.postpone(position, 0, u64::MAX, true);
        taken += 1;
    }
    assert_eq!(taken, MAX_UNSETTLED);
    progress.finish(7);
    assert!(progress.take(u64::MAX).is_some());
}

#[test]
fn what_is_held_back_waits_in_memory_only() {
    let mut progress = Progress::starting_at(1);
    assert_eq!(progress.take(2), Some((1, 1)));
    progress.hold_back(1, 50);
    progress.wake(49);
    assert_eq!((progress.take(2), progress.next_wake()), (None, Some(50)));
    let mut restored = Progress::restore(&progress.to_row(), &[], 0);
    assert_eq!(restored.take(2), Some((1, 1)));
    progress.wake(50);
    assert_eq!(progress.take(2), Some((1, 1)));
    assert_eq!(progress.finish(1), RowChange::None);
}
