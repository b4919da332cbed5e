//! Everything that can happen to a log, in random order, against a model that is too simple to be wrong: publishing,
//! answers of all kinds, consumers that come and go, moving, pausing, removing and redriving, retention, other settings,
//! and crashes: between two turns, before a turn is on disk, and while it is written.

use proptest::prelude::*;

use super::*;

mod check;
mod events;
mod settings;
mod state;

use state::{Fate, Know, Model, Out, Stored, Sub, index};

const TOPIC: &str = "t";
const LETTERS: &str = "t.dead-letter";
/// The first is ordered, the second changes, the third is not.
const NAMES: [&str; 3] = ["a/keyed", "a/mixed", "a/plain"];
const WINDOW: u64 = 60;
const RETENTION: u64 = 100;
const BLOCK: usize = 4096;
const HEADER: usize = 28;

#[derive(Clone, Debug)]
enum Op {
    Publish { id: u8, key: u8, later: u64, lives: u64 },
    Ack(usize),
    Retry(usize, u64),
    Release(usize, u64),
    DeadLetter(usize),
    Open(usize, u32),
    Close(usize),
    Pause(usize, bool),
    Tick,
    Pass(u64),
    Window(u64),
    DropUnhandled(bool),
    Ordered(bool),
    OrderBy(bool),
    Seek(usize, u64),
    SeekTime(usize, u64),
    Remove(u64),
    Redrive(u64),
    Forget(usize),
}

impl Op {
    /// Whether what was done before it in a turn is on disk then.
    fn commits(&self) -> bool {
        match self {
            Self::Window(_)
            | Self::DropUnhandled(_)
            | Self::OrderBy(_)
            | Self::Seek(..)
            | Self::SeekTime(..)
            | Self::Remove(_)
            | Self::Redrive(_) => true,
            Self::Publish { .. }
            | Self::Ack(_)
            | Self::Retry(..)
            | Self::Release(..)
            | Self::DeadLetter(_)
            | Self::Open(..)
            | Self::Close(_)
            | Self::Pause(..)
            | Self::Tick
            | Self::Pass(_)
            | Self::Ordered(_)
            | Self::Forget(_) => false,
        }
    }
}

/// How a turn ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Good,
    /// All of it is on disk.
    Restart,
    /// Nothing of it is.
    Lost,
    /// So many thousandths of what changed in the journal.
    Torn(usize),
    /// What is in the journal goes into the tables.
    Quiet,
}

fn op() -> impl Strategy<Value = Op> {
    let at = || any::<usize>();
    let sub = || 0..NAMES.len();
    prop_oneof![
        12 => (0_u8..30, 0_u8..4, prop_oneof![4 => Just(0), 1 => 1_u64..60], prop_oneof![6 => Just(0), 1 => 1_u64..60])
            .prop_map(|(id, key, later, lives)| Op::Publish { id, key, later, lives }),
        10 => at().prop_map(Op::Ack),
        5 => (at(), 0_u64..40).prop_map(|(at, delay)| Op::Retry(at, delay)),
        2 => (at(), prop_oneof![Just(0), 1_u64..40]).prop_map(|(at, delay)| Op::Release(at, delay)),
        2 => at().prop_map(Op::DeadLetter),
        5 => (sub(), 1_u32..5).prop_map(|(sub, room)| Op::Open(sub, room)),
        2 => at().prop_map(Op::Close),
        1 => (sub(), any::<bool>()).prop_map(|(sub, paused)| Op::Pause(sub, paused)),
        3 => Just(Op::Tick),
        8 => (1_u64..30).prop_map(Op::Pass),
        1 => prop_oneof![Just(0), Just(WINDOW), Just(500)].prop_map(Op::Window),
        1 => any::<bool>().prop_map(Op::DropUnhandled),
        1 => any::<bool>().prop_map(Op::Ordered),
        1 => any::<bool>().prop_map(Op::OrderBy),
        1 => (sub(), 0_u64..60).prop_map(|(sub, position)| Op::Seek(sub, position)),
        1 => (sub(), 0_u64..200).prop_map(|(sub, ago)| Op::SeekTime(sub, ago)),
        1 => (1_u64..60).prop_map(Op::Remove),
        2 => (1_u64..10).prop_map(Op::Redrive),
        1 => sub().prop_map(Op::Forget),
    ]
}

fn turn() -> impl Strategy<Value = (Vec<Op>, End)> {
    let end = prop_oneof![
        12 => Just(End::Good),
        1 => Just(End::Restart),
        1 => Just(End::Lost),
        2 => (0_usize..1000).prop_map(End::Torn),
        1 => Just(End::Quiet),
    ];
    (prop::collection::vec(op(), 1..5), end)
}

struct Consumer {
    sub: usize,
    id: u64,
    room: u32,
    deliveries: mpsc::Receiver<LogDelivery>,
}

struct World {
    dir: TempDir,
    engine: Option<Engine>,
    model: Model,
    consumers: Vec<Consumer>,
    out: Vec<Out>,
    next_consumer: u64,
}

impl World {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let model = Model { now: 1_000, window: WINDOW, ..Model::default() };
        let mut world = Self {
            dir,
            engine: None,
            model,
            consumers: Vec::new(),
            out: Vec::new(),
            next_consumer: 1,
        };
        world.load();
        world.configure();
        world.model.subs = vec![Sub::default(); NAMES.len()];
        for sub in 0..NAMES.len() {
            let spec = world.spec(sub, 64);
            world.engine().declare_for_resource(&spec).unwrap();
        }
        world.engine().commit().unwrap();
        world
    }

    fn load(&mut self) {
        let store = Store::open(self.dir.path(), 1 << 20).unwrap();
        let engine = Engine::load(store, LogMetrics::unregistered(), self.model.now).unwrap();
        assert_eq!(engine.metrics.damaged(), 0);
        self.engine = Some(engine);
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().unwrap()
    }

    fn apply(&mut self, op: &Op) {
        let delay = |ms: u64| Duration::from_millis(ms);
        match *op {
            Op::Publish { id, key, later, lives } => self.publish(id, key, later, lives),
            Op::Ack(at) => self.settle(at, &Settle::Ack),
            Op::Retry(at, ms) => self.settle(at, &Settle::Retry { delay: delay(ms) }),
            Op::Release(at, ms) => self.settle(at, &Settle::Release { delay: delay(ms) }),
            Op::DeadLetter(at) => {
                self.settle(at, &Settle::DeadLetter { reason: "no".to_owned(), status: 1 });
            }
            Op::Open(sub, room) => self.open(sub, room),
            Op::Close(at) => self.close(at),
            Op::Pause(sub, paused) => {
                self.model.subs[sub].paused = paused;
                self.engine().pause(NAMES[sub], paused).unwrap();
            }
            Op::Tick => self.tick(),
            Op::Pass(time) => self.model.now += time,
            Op::Window(window) => {
                self.model.window = window;
                self.configure();
            }
            Op::DropUnhandled(drops) => {
                self.model.drops = drops;
                self.configure();
            }
            Op::Ordered(ordered) => {
                self.model.ordered = ordered;
                let spec = self.spec(1, 64);
                self.engine().declare_for_resource(&spec).unwrap();
            }
            Op::OrderBy(by_subject) => self.order(by_subject),
            Op::Seek(sub, position) => {
                self.engine().seek(NAMES[sub], Start::Position(position)).unwrap();
                self.moved(sub, position);
            }
            Op::SeekTime(sub, ago) => self.seek_time(sub, self.model.now - ago),
            Op::Remove(position) => self.remove(position),
            Op::Redrive(position) => self.redrive(position),
            Op::Forget(sub) => self.forget(sub),
        }
    }

    fn turn(&mut self, ops: &[Op], end: End) {
        let lossy = matches!(end, End::Lost | End::Torn(_));
        let end = if lossy && ops.iter().any(Op::commits) { End::Restart } else { end };
        let (model, out) = (self.model.clone(), self.out.clone());
        let journal = self.dir.path().join("log.journal");
        let before =
            if matches!(end, End::Torn(_)) { std::fs::read(&journal).unwrap() } else { Vec::new() };
        for op in ops {
            self.apply(op);
        }
        let mut kept = true;
        if matches!(end, End::Lost) {
            kept = false;
        } else {
            self.engine().commit().unwrap();
        }
        match end {
            End::Good => {}
            End::Quiet => {
                for _ in 0..2 {
                    self.engine().settle_if_quiet().unwrap();
                }
            }
            End::Restart | End::Lost => self.crash(),
            End::Torn(part) => {
                self.engine = None;
                kept = tear(&journal, &before, part);
                self.crash();
            }
        }
        if !kept {
            let now = self.model.now;
            self.model = Model { now, ..model };
            self.out = out;
            let out = std::mem::take(&mut self.out);
            self.give_back(out);
        }
        if matches!(end, End::Restart | End::Lost | End::Torn(_)) {
            self.load();
        }
        self.receive();
        self.engine().store.catch_up().unwrap();
        self.count();
    }

    fn crash(&mut self) {
        self.engine = None;
        self.consumers.clear();
        let out = std::mem::take(&mut self.out);
        self.give_back(out);
    }

    /// Everything is handled at last.
    fn drain(&mut self) {
        for sub in 0..NAMES.len() {
            self.apply(&Op::Pause(sub, false));
            self.apply(&Op::Open(sub, 4));
        }
        for _ in 0..2_000 {
            self.engine().commit().unwrap();
            self.receive();
            if self.out.is_empty() {
                let open = self.engine().backlogs().into_values().map(|backlog| backlog.events);
                if open.sum::<u64>() == 0 {
                    break;
                }
                self.model.now += 10;
            }
            while !self.out.is_empty() {
                self.apply(&Op::Ack(0));
            }
        }
        for (name, backlog) in self.engine().backlogs() {
            assert_eq!(backlog.events, 0, "{name}");
        }
        for (sub, name) in NAMES.iter().enumerate() {
            for position in 1..=self.model.topic.len() as u64 {
                let stored = self.model.topic[index(position)].clone();
                let done = self.event(sub, position).fate == Fate::Done;
                let mine = stored.only.is_none_or(|only| only == sub);
                assert!(
                    done || stored.gone || stored.expires > 0 || !mine,
                    "{name} never got {position}: {stored:?}"
                );
            }
        }
    }
}

/// Leaves a part of what changed in the journal. Returns whether what changed is there all the same.
fn tear(path: &PathBuf, before: &[u8], part: usize) -> bool {
    let after = std::fs::read(path).unwrap();
    let changed = |at: &usize| before.get(*at) != after.get(*at);
    let Some(first) = (0..after.len()).find(changed) else { return true };
    let start = first / BLOCK * BLOCK;
    let length = u32::from_le_bytes(after[start + 24..start + HEADER].try_into().unwrap());
    let end = start + HEADER + length as usize;
    let cut = start + (end - start) * part / 950;
    let mut torn = after[..cut.min(after.len())].to_vec();
    torn.extend(&before[torn.len()..]);
    std::fs::write(path, &torn).unwrap();
    torn[..end] == after[..end]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 2_000, ..ProptestConfig::default() })]
    #[test]
    fn a_log_behaves_like_the_model(turns in prop::collection::vec(turn(), 1..40)) {
        let mut world = World::new();
        for (ops, end) in &turns {
            world.turn(ops, *end);
        }
        world.drain();
    }
}
