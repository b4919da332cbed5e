//! Ordered subscriptions against a slow model: every event with its key and what became of it, in one list.

use proptest::prelude::*;
use prost::Message as _;

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waits,
    Out,
    Retries(u64),
    Done,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Publish(u64),
    Take,
    Finish(usize),
    Retry(usize, u64),
    GiveBack(usize),
    Pass(u64),
    PutOff,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u64..4).prop_map(Step::Publish),
        6 => Just(Step::Take),
        3 => any::<usize>().prop_map(Step::Finish),
        2 => (any::<usize>(), 0_u64..20).prop_map(|(at, delay)| Step::Retry(at, delay)),
        1 => any::<usize>().prop_map(Step::GiveBack),
        2 => (1_u64..10).prop_map(Step::Pass),
        1 => Just(Step::PutOff),
        1 => Just(Step::Restart),
    ]
}

struct World {
    progress: Progress,
    rows: BTreeMap<u64, AttemptRow>,
    /// Key (0 for none) and fate of each position.
    model: Vec<(u64, Fate)>,
    out: Vec<u64>,
    now: u64,
}

impl World {
    fn new() -> Self {
        let progress = Progress::starting_at(1);
        Self { progress, rows: BTreeMap::new(), model: Vec::new(), out: Vec::new(), now: 1 }
    }

    fn end(&self) -> u64 {
        self.model.len() as u64 + 1
    }

    fn event(&mut self, position: u64) -> &mut (u64, Fate) {
        &mut self.model[usize::try_from(position).unwrap() - 1]
    }

    fn write(&mut self, position: u64, change: RowChange) {
        match change {
            RowChange::None => {}
            RowChange::Put(row) => drop(self.rows.insert(position, row)),
            RowChange::Delete => assert!(self.rows.remove(&position).is_some()),
        }
    }

    /// As the log does it: reads again what has to be, then takes until something may go out.
    fn take(&mut self) -> Option<u64> {
        self.progress.wake(self.now);
        loop {
            while let Some(Refill { key, from, until }) = self.progress.refill() {
                let piece = until.min(from + 3);
                let found: Vec<u64> =
                    (from..piece).filter(|position| self.event(*position).0 == key).collect();
                self.progress.refilled(key, &found, piece);
                if !found.is_empty() {
                    break;
                }
            }
            let (position, _) = self.progress.take(self.end())?;
            let key = self.event(position).0;
            if key == 0 || self.progress.claim(position, key, true) {
                return Some(position);
            }
        }
    }

    /// What the contract lets out now: of each key only the oldest that is not done, and all without a key.
    fn may_go(&self) -> BTreeSet<u64> {
        let mut seen = BTreeSet::new();
        let mut may_go = BTreeSet::new();
        for ((key, fate), position) in self.model.iter().zip(1..) {
            let free = *key == 0 || !seen.contains(key);
            let due = match fate {
                Fate::Waits => true,
                Fate::Retries(until) => *until <= self.now,
                Fate::Out | Fate::Done => false,
            };
            if free && due {
                may_go.insert(position);
            }
            if *fate != Fate::Done {
                seen.insert(*key);
            }
        }
        may_go
    }

    fn pick(&mut self, at: usize) -> Option<u64> {
        let at = at.checked_rem(self.out.len())?;
        Some(self.out.swap_remove(at))
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Publish(key) => self.model.push((key, Fate::Waits)),
            Step::Take => {
                let may_go = self.may_go();
                let taken = self.take();
                assert_eq!(taken.is_none(), may_go.is_empty(), "{taken:?} of {may_go:?}");
                if let Some(position) = taken {
                    assert!(may_go.contains(&position), "{position} of {may_go:?}");
                    self.event(position).1 = Fate::Out;
                    self.out.push(position);
                }
            }
            Step::Finish(at) => {
                if let Some(position) = self.pick(at) {
                    self.event(position).1 = Fate::Done;
                    let change = self.progress.finish(position);
                    self.write(position, change);
                }
            }
            Step::Retry(at, delay) => {
                if let Some(position) = self.pick(at) {
                    let until = self.now + delay;
                    self.event(position).1 = Fate::Retries(until);
                    let change = self.progress.postpone(position, self.now, delay, true);
                    self.write(position, change);
                }
            }
            Step::GiveBack(at) => {
                if let Some(position) = self.pick(at) {
                    self.event(position).1 = Fate::Waits;
                    self.progress.give_back(position);
                }
            }
            Step::Pass(time) => self.now += time,
            Step::PutOff => drop(self.progress.put_off_from(1, 1)),
            Step::Restart => self.restart(),
        }
    }

    fn restart(&mut self) {
        let rows: Vec<_> = self.rows.iter().map(|(position, row)| (*position, *row)).collect();
        self.progress = Progress::restore(&self.progress.to_row(), &rows, self.now);
        for position in std::mem::take(&mut self.out) {
            let until = self.rows.get(&position).map(|row| row.not_before_ms);
            self.event(position).1 = until.map_or(Fate::Waits, Fate::Retries);
        }
    }

    fn check(&self) {
        let open = self.model.iter().filter(|(_, fate)| *fate != Fate::Done).count() as u64;
        assert_eq!(self.progress.lag(self.end()), open);
        let first = self.model.iter().zip(1..).find(|((_, fate), _)| *fate != Fate::Done);
        let floor = first.map_or(self.end(), |(_, position)| position);
        assert!(self.progress.floor() <= floor, "{} of {floor}", self.progress.floor());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn order_is_kept_as_in_the_model(steps in prop::collection::vec(step(), 0..200)) {
        let mut world = World::new();
        for step in steps {
            world.apply(step);
            world.check();
        }
        // In the end everything comes.
        let mut left = world.model.iter().filter(|(_, fate)| *fate != Fate::Done).count();
        for _ in 0..2 * left + 2 {
            world.apply(Step::Pass(20));
            world.apply(Step::Take);
            if !world.out.is_empty() {
                world.apply(Step::Finish(0));
                left -= 1;
            }
            world.check();
        }
        prop_assert_eq!(left, 0);
        prop_assert_eq!(world.progress.floor(), world.end());
    }
}

/// One failing key with more events than fit, and then one event of another key.
#[test]
fn a_stuck_key_does_not_fill_the_memory_of_the_others() {
    let mut world = World::new();
    let many = 3 * MAX_UNSETTLED as u64;
    world.model = (1..=many).map(|_| (7, Fate::Waits)).collect();
    world.model.push((8, Fate::Waits));
    assert_eq!(world.take(), Some(1));
    world.progress.postpone(1, 0, u64::MAX, true);
    assert_eq!(world.take(), Some(many + 1), "the other key goes on");
    assert_eq!(world.progress.lag(world.end()), many + 1);
    assert!(world.progress.unsettled.len() <= MAX_UNSETTLED);
    assert!(world.progress.to_row().encoded_len() < 100_000);
    world.progress.finish(many + 1);
    for position in 1..=many {
        world.progress.finish(position);
        let next = world.take();
        assert_eq!(next, (position < many).then_some(position + 1));
        assert!(world.progress.unsettled.len() <= MAX_UNSETTLED);
    }
    assert_eq!(world.progress, Progress::starting_at(world.end()));
}

#[test]
fn an_event_for_later_survives_a_restart_and_holds_nothing_back() {
    let mut progress = Progress::starting_at(1);
    assert_eq!(progress.take(4), Some((1, 1)));
    assert!(matches!(progress.schedule(1, 100), RowChange::Put(row) if row.scheduled));
    assert_eq!(progress.take(4), Some((2, 1)));
    let row = AttemptRow { not_before_ms: 100, scheduled: true, ..AttemptRow::default() };
    let progress = Progress::restore(&progress.to_row(), &[(1, row)], 0);
    assert_eq!((progress.lag(4), progress.floor(), progress.next_wake()), (3, 1, Some(100)));
}

#[test]
fn an_event_for_later_joins_its_key_when_it_is_due() {
    let mut progress = Progress::starting_at(1);
    progress.take(4);
    progress.schedule(1, 100);
    assert_eq!(progress.take(4), Some((2, 1)));
    assert!(progress.claim(2, 7, true));
    progress.wake(100);
    assert_eq!(progress.take(4), Some((1, 1)));
    assert!(!progress.claim(1, 7, false), "due, but 2 is out");
    assert_eq!(progress.take(4), Some((3, 1)));
    assert!(!progress.claim(3, 7, true));
    progress.finish(2);
    assert_eq!(progress.take(4), Some((1, 1)), "publish order again");
    assert_eq!(progress.finish(1), RowChange::Delete);
}

#[test]
fn events_for_later_are_bounded_and_do_not_count_as_unsettled() {
    let mut progress = Progress::starting_at(1);
    for position in 1..=MAX_SCHEDULED as u64 {
        assert_eq!(progress.take(u64::MAX), Some((position, 1)));
        progress.schedule(position, 10);
    }
    assert_eq!(progress.take(u64::MAX), None);
    progress.wake(10);
    assert_eq!(progress.unsettled.len(), MAX_UNSETTLED);
    assert_eq!(progress.next_wake(), None, "no room: nothing to wake up for");
    assert_eq!(progress.take(u64::MAX), Some((1, 1)));
    progress.finish(1);
    assert_eq!(progress.next_wake(), Some(10));
}

#[test]
fn what_retention_took_is_skipped_and_counted() {
    let mut progress = Progress::starting_at(1);
    for position in 1..=4 {
        assert_eq!(progress.take(11), Some((position, 1)));
    }
    progress.finish(1);
    progress.postpone(2, 0, 50, true);
    progress.schedule(4, 60);
    assert_eq!(progress.skip_to(6), (vec![2, 4], 4));
    assert_eq!((progress.floor(), progress.lag(11)), (6, 5));
    assert_eq!((progress.finish(3), progress.next_wake()), (RowChange::None, None));
    progress.give_back(3);
    assert_eq!(progress.take(11), Some((6, 1)));
    assert_eq!(progress.skip_to(5), (vec![], 0));
}
