//! Subscriptions that have consumers, and those of them to look at: what changed, and what is due. So a turn costs by what
//! happened, and not by how many there are. Pure.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

#[derive(Debug, Default)]
pub(super) struct Served {
    /// Each with the time at which to look at it if nothing changes before.
    wakes: HashMap<Arc<str>, Option<u64>>,
    /// The same by time.
    by_time: BTreeSet<(u64, Arc<str>)>,
    /// Those of each topic.
    by_topic: HashMap<String, BTreeSet<Arc<str>>>,
    /// Something changed since they were looked at.
    stirred: BTreeSet<Arc<str>>,
}

impl Served {
    /// Has a consumer now, or one more.
    pub(super) fn add(&mut self, name: &Arc<str>, topic: &str) {
        self.wakes.entry(Arc::clone(name)).or_default();
        self.by_topic.entry(topic.to_owned()).or_default().insert(Arc::clone(name));
        self.stirred.insert(Arc::clone(name));
    }

    /// Has none any more.
    pub(super) fn remove(&mut self, name: &str, topic: &str) {
        if let Some((name, Some(at_ms))) = self.wakes.remove_entry(name) {
            self.by_time.remove(&(at_ms, name));
        }
        self.stirred.remove(name);
        if let Some(names) = self.by_topic.get_mut(topic) {
            names.remove(name);
            if names.is_empty() {
                self.by_topic.remove(topic);
            }
        }
    }

    /// Something of a subscription changed.
    pub(super) fn stir(&mut self, name: &str) {
        if let Some((name, _)) = self.wakes.get_key_value(name) {
            self.stirred.insert(Arc::clone(name));
        }
    }

    /// Something of a topic changed.
    pub(super) fn stir_topic(&mut self, topic: &str) {
        self.stirred.extend(self.by_topic.get(topic).into_iter().flatten().map(Arc::clone));
    }

    /// Something changed for everybody.
    pub(super) fn stir_all(&mut self) {
        self.stirred.extend(self.wakes.keys().map(Arc::clone));
    }

    /// Takes those that are to be looked at now, by name.
    pub(super) fn take(&mut self, now_ms: u64) -> BTreeSet<Arc<str>> {
        while self.next_wake().is_some_and(|at_ms| at_ms <= now_ms)
            && let Some((_at_ms, name)) = self.by_time.pop_first()
        {
            if let Some(wake) = self.wakes.get_mut(&name) {
                *wake = None;
            }
            self.stirred.insert(name);
        }
        std::mem::take(&mut self.stirred)
    }

    /// If nothing changes, a subscription is looked at again at this time.
    pub(super) fn wake_at(&mut self, name: &Arc<str>, at_ms: Option<u64>) {
        let Some(wake) = self.wakes.get_mut(name) else {
            return;
        };
        if *wake == at_ms {
            return;
        }
        if let Some(before) = std::mem::replace(wake, at_ms) {
            self.by_time.remove(&(before, Arc::clone(name)));
        }
        if let Some(at_ms) = at_ms {
            self.by_time.insert((at_ms, Arc::clone(name)));
        }
    }

    /// When the next is due, if nothing changes.
    pub(super) fn next_wake(&self) -> Option<u64> {
        self.by_time.first().map(|(at_ms, _name)| *at_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(served: &mut Served, now_ms: u64) -> Vec<String> {
        served.take(now_ms).iter().map(|name| (**name).to_owned()).collect()
    }

    #[test]
    fn only_what_changed_or_is_due_is_looked_at() {
        let mut served = Served::default();
        let [a, b, c]: [Arc<str>; 3] = ["a".into(), "b".into(), "c".into()];
        for (name, topic) in [(&a, "t"), (&b, "t"), (&c, "u")] {
            served.add(name, topic);
        }
        assert_eq!(taken(&mut served, 0), ["a", "b", "c"]);
        assert!(taken(&mut served, 0).is_empty());
        served.stir("c");
        served.stir("unknown");
        assert_eq!(taken(&mut served, 0), ["c"]);
        served.stir_topic("t");
        assert_eq!(taken(&mut served, 0), ["a", "b"]);
        served.wake_at(&a, Some(20));
        served.wake_at(&c, Some(10));
        served.wake_at(&a, Some(15));
        assert_eq!(served.next_wake(), Some(10));
        assert_eq!(taken(&mut served, 14), ["c"]);
        assert_eq!(served.next_wake(), Some(15));
        served.wake_at(&b, Some(16));
        served.wake_at(&b, None);
        assert_eq!(taken(&mut served, 20), ["a"]);
        assert_eq!(served.next_wake(), None);
        // The same time again is another one.
        served.wake_at(&a, Some(15));
        assert_eq!(served.next_wake(), Some(15));
    }

    #[test]
    fn one_without_consumers_is_forgotten() {
        let mut served = Served::default();
        let name: Arc<str> = "a".into();
        served.add(&name, "t");
        served.wake_at(&name, Some(1));
        served.remove("a", "t");
        served.stir("a");
        served.stir_topic("t");
        served.stir_all();
        served.wake_at(&name, Some(1));
        assert!(taken(&mut served, 9).is_empty() && served.next_wake().is_none());
        assert!(served.by_topic.is_empty());
    }
}
