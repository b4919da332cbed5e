//! What the model knows.

/// What a topic holds at a position.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) id: String,
    pub(super) key: Option<u8>,
    pub(super) published: u64,
    /// 0: at once.
    pub(super) later: u64,
    /// 0: for ever.
    pub(super) expires: u64,
    pub(super) only: Option<usize>,
    /// Nothing of it is there any more.
    pub(super) gone: bool,
}

/// What a subscription makes of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fate {
    #[default]
    Never,
    Out,
    Waits {
        until: u64,
    },
    Done,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Know {
    pub(super) fate: Fate,
    pub(super) spent: u32,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Sub {
    /// From position 1 on; positions before its start are done.
    pub(super) events: Vec<Know>,
    pub(super) paused: bool,
    pub(super) epoch: u32,
    /// Its order changed at least once.
    pub(super) reordered: bool,
}

/// A delivery that a consumer has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) sub: usize,
    pub(super) consumer: u64,
    pub(super) delivery: u64,
    pub(super) position: u64,
    pub(super) epoch: u32,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub(super) now: u64,
    pub(super) topic: Vec<Stored>,
    /// Subscription and event of each letter; `None`: it is gone.
    pub(super) letters: Vec<Option<(usize, Stored)>>,
    pub(super) subs: Vec<Sub>,
    pub(super) window: u64,
    pub(super) drops: bool,
    pub(super) ordered: bool,
    pub(super) by_subject: bool,
}

pub(super) fn index(position: u64) -> usize {
    usize::try_from(position).unwrap() - 1
}

pub(super) fn time(ms: u64) -> String {
    jiff::Timestamp::from_millisecond(i64::try_from(ms).unwrap()).unwrap().to_string()
}

impl Stored {
    pub(super) fn is_expired(&self, now: u64) -> bool {
        self.expires > 0 && self.expires <= now
    }
}
