//! What this process knows to be on the cluster, to make it anew where the servers have lost it: a disk that was replaced
//! takes the records of subscriptions with it. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use async_nats::datetime::DateTime;

use crate::bus::{SubscriptionSpec, TopicConfig};

/// Topics and subscriptions.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// What resources declare.
    declared: HashMap<String, TopicConfig>,
    /// When the stream of each topic was made that was seen.
    made: HashMap<String, DateTime>,
    /// Those that resources declare, and those that are consumed here.
    subscriptions: BTreeMap<String, SubscriptionSpec>,
    /// Those that rest, as they were last seen.
    paused: BTreeSet<String>,
}

impl Wanted {
    /// What a resource says of a topic.
    pub(super) fn topic(&self, name: &str) -> Option<TopicConfig> {
        self.declared.get(name).cloned()
    }

    pub(super) fn declare_topic(&mut self, name: &str, config: &TopicConfig) {
        self.declared.insert(name.to_owned(), config.clone());
    }

    pub(super) fn reset_topic(&mut self, name: &str) {
        self.declared.remove(name);
    }

    /// A topic's stream was seen. Returns whether it is another one than before.
    pub(super) fn met(&mut self, topic: &str, made: DateTime) -> bool {
        self.made.insert(topic.to_owned(), made).is_some_and(|before| before != made)
    }

    /// A subscription is there. What a resource says of it counts more than what a consumer does.
    pub(super) fn subscribe(&mut self, spec: &SubscriptionSpec) {
        if spec.declared || !self.subscriptions.get(&spec.name).is_some_and(|known| known.declared)
        {
            self.subscriptions.insert(spec.name.clone(), spec.clone());
        }
    }

    pub(super) fn subscription(&self, name: &str) -> Option<&SubscriptionSpec> {
        self.subscriptions.get(name)
    }

    /// Nobody consumes it here any more: where no resource declares it, others may forget it.
    pub(super) fn leave(&mut self, name: &str) {
        if self.subscriptions.get(name).is_some_and(|known| !known.declared) {
            self.subscriptions.remove(name);
        }
    }

    pub(super) fn forget(&mut self, name: &str) {
        self.subscriptions.remove(name);
        self.paused.remove(name);
    }

    /// Whether a subscription rests.
    pub(super) fn pause(&mut self, name: &str, paused: bool) {
        match paused {
            true => self.paused.insert(name.to_owned()),
            false => self.paused.remove(name),
        };
    }

    pub(super) fn is_paused(&self, name: &str) -> bool {
        self.paused.contains(name)
    }

    /// Those that are wanted and not among these.
    pub(super) fn missing(&self, there: &BTreeSet<&str>) -> Vec<SubscriptionSpec> {
        let all = self.subscriptions.values();
        all.filter(|spec| !there.contains(spec.name.as_str())).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_resource_declares_is_wanted_until_it_is_forgotten_and_other_things_while_consumed() {
        let mut wanted = Wanted::default();
        let spec = |name| SubscriptionSpec::new(name, "default", "orders").unwrap();
        let declared = SubscriptionSpec { declared: true, max_in_flight: 7, ..spec("a/declared") };
        for spec in [&declared, &spec("a/declared"), &spec("a/own")] {
            wanted.subscribe(spec);
        }
        assert_eq!(wanted.subscription("a/declared"), Some(&declared));
        assert_eq!(wanted.missing(&BTreeSet::from(["a/declared"])), [spec("a/own")]);
        wanted.leave("a/declared");
        wanted.leave("a/own");
        assert_eq!(wanted.missing(&BTreeSet::new()), [declared]);
        wanted.pause("a/declared", true);
        assert!(wanted.is_paused("a/declared") && !wanted.is_paused("a/own"));
        wanted.forget("a/declared");
        assert!(wanted.missing(&BTreeSet::new()).is_empty() && !wanted.is_paused("a/declared"));
    }

    #[test]
    fn a_stream_of_another_time_is_another_one() {
        let mut wanted = Wanted::default();
        let at = |text| async_nats::datetime::parse_rfc3339(text).unwrap();
        let (one, two) = (at("2026-01-01T00:00:00Z"), at("2026-01-01T00:00:01Z"));
        assert_eq!([one, one, two].map(|made| wanted.met("t", made)), [false, false, true]);
        assert!(!wanted.met("other", one));
    }
}
