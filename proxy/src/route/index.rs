//! Finds the rules that a path may fall under, without looking at all of them.
//!
//! Rules with an exact path or a prefix are found by hashing; the others are looked at in order. Work for one path
//! is bounded by the configuration (how many different lengths its prefixes have), never by the path alone.

use std::collections::{BTreeMap, HashMap};

/// What a rule asks of the path.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key<'a> {
    /// All of it.
    Exact(&'a str),
    /// Its first elements; without a trailing slash.
    Prefix(&'a str),
    /// Something that is not known here.
    Other,
}

/// Positions of rules, by what they ask of the path; each list is in ascending order.
#[derive(Debug, Default)]
pub(super) struct Index {
    exact: HashMap<Box<str>, Vec<usize>>,
    /// By length in bytes.
    prefixes: BTreeMap<usize, HashMap<Box<str>, Vec<usize>>>,
    other: Vec<usize>,
}

impl Index {
    pub(super) fn new<'a>(keys: impl Iterator<Item = Key<'a>>) -> Self {
        let mut index = Self::default();
        for (position, key) in keys.enumerate() {
            let list = match key {
                Key::Exact(path) => index.exact.entry(path.into()).or_default(),
                Key::Prefix(prefix) => {
                    let same_length = index.prefixes.entry(prefix.len()).or_default();
                    same_length.entry(prefix.into()).or_default()
                }
                Key::Other => &mut index.other,
            };
            list.push(position);
        }
        index
    }

    /// The lowest position that `path` may fall under and that `matches`.
    pub(super) fn first(&self, path: &str, matches: impl Fn(usize) -> bool) -> Option<usize> {
        let mut best: Option<usize> = None;
        let mut look = |list: &[usize]| {
            let better = list.iter().copied().take_while(|at| best.is_none_or(|best| *at < best));
            if let Some(found) = { better }.find(|at| matches(*at)) {
                best = Some(found);
            }
        };
        if let Some(list) = self.exact.get(path) {
            look(list);
        }
        for (length, prefixes) in self.prefixes.range(..=path.len()) {
            // A prefix ends where an element does.
            if matches!(path.as_bytes().get(*length), None | Some(b'/'))
                && let Some(list) = path.get(..*length).and_then(|prefix| prefixes.get(prefix))
            {
                look(list);
            }
        }
        look(&self.other);
        best
    }
}
