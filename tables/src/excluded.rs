//! What is left alone for a while, because it cannot be published or would overtake what cannot.

use std::collections::BTreeSet;

/// Most entries: past it, nothing new is read until the next try.
const MAX: usize = 1000;

/// Rows, keys and topics that a read leaves out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Excluded {
    /// Sequences of bad rows.
    pub(crate) rows: BTreeSet<i64>,
    /// Partition keys of bad rows: later rows with the same key wait for them.
    pub(crate) keys: BTreeSet<String>,
    /// Topics that the bus refuses.
    pub(crate) topics: BTreeSet<String>,
    /// Topics that the bus does not take now.
    pub(crate) topics_for_now: BTreeSet<String>,
    /// Sequences of rows that the bus has, and that are locked by the application.
    pub(crate) locked: BTreeSet<i64>,
}

impl Excluded {
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= MAX
    }

    /// Whether a read leaves out no row that might be published.
    pub(crate) fn hides_nothing(&self) -> bool {
        self.len() == self.locked.len()
    }

    /// Sequences that a read leaves out.
    pub(crate) fn places(&self) -> Vec<i64> {
        self.rows.union(&self.locked).copied().collect()
    }

    /// Topics that a read leaves out.
    pub(crate) fn all_topics(&self) -> Vec<String> {
        self.topics.union(&self.topics_for_now).cloned().collect()
    }

    pub(crate) fn has_topic(&self, topic: &str) -> bool {
        self.topics.contains(topic) || self.topics_for_now.contains(topic)
    }

    fn len(&self) -> usize {
        let topics = self.topics.len() + self.topics_for_now.len();
        self.rows.len() + self.keys.len() + topics + self.locked.len()
    }
}
