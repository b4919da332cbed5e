//! Which topics and subscriptions there are: made by resources, or by whoever publishes and consumes. Those that no
//! resource declares are bounded in number, never move, and leave other topics as they are.

use std::collections::BTreeMap;

use prost::Message;

use super::engine::Engine;
use super::progress::Progress;
use super::subscription::{self, Subscription};
use super::topic::Topic;
use super::{LogError, TopicConfig};
use crate::bus::{Start, SubscriptionSpec, dead_letter};

/// Topics, and subscriptions, that workloads may make without a resource. Each takes memory, and time of every commit and
/// of every round of housekeeping; a topic never goes.
pub(super) const MOST_UNDECLARED: usize = 10_000;

/// How many there are that no resource declares. There may be more than [`MOST_UNDECLARED`]: those of an older version,
/// of a resource that went, and topics for dead letters, which are never lost for want of a topic.
#[derive(Debug, Default)]
pub(super) struct Undeclared {
    topics: usize,
    subscriptions: usize,
}

impl Undeclared {
    pub(super) fn of(
        topics: &BTreeMap<String, Topic>,
        subscriptions: &BTreeMap<String, Subscription>,
    ) -> Self {
        Self {
            topics: topics.values().filter(|topic| !topic.row().declared).count(),
            subscriptions: subscriptions.values().filter(|known| !known.row.declared).count(),
        }
    }

    /// Refuses so many topics more, if that is too many.
    fn room_for_topics(&self, more: usize) -> Result<(), LogError> {
        match more > 0 && self.topics + more > MOST_UNDECLARED {
            true => Err(LogError::TooMany("topics")),
            false => Ok(()),
        }
    }

    fn room_for_subscription(&self) -> Result<(), LogError> {
        match self.subscriptions >= MOST_UNDECLARED {
            true => Err(LogError::TooMany("subscriptions")),
            false => Ok(()),
        }
    }
}

impl Engine {
    /// Creates a topic or changes its settings.
    pub(super) fn ensure_topic(
        &mut self,
        name: &str,
        config: &TopicConfig,
        now_ms: u64,
    ) -> Result<(), LogError> {
        // What is in the current batch could not be found for another deduplication window.
        self.commit()?;
        self.topic(name, config)?;
        let Some(topic) = self.topics.get_mut(name) else {
            return Err(LogError::Closed);
        };
        self.undeclared.topics -= usize::from(!topic.row().declared);
        if topic.configure(config, true, &mut self.store, now_ms)? {
            self.batch.topics.insert(name.to_owned(), topic.row().encode_to_vec());
        }
        self.urgent = true;
        // It may order otherwise now.
        self.served.stir_topic(name);
        Ok(())
    }

    /// Gives a topic the settings of those that nobody declares.
    pub(super) fn reset_topic(&mut self, name: &str, now_ms: u64) -> Result<(), LogError> {
        self.commit()?;
        let config = self.undeclared_settings(name);
        let Some(topic) = self.topics.get_mut(name) else {
            return Ok(());
        };
        self.undeclared.topics += usize::from(topic.row().declared);
        if topic.configure(&config, false, &mut self.store, now_ms)? {
            self.batch.topics.insert(name.to_owned(), topic.row().encode_to_vec());
            self.urgent = true;
        }
        self.served.stir_topic(name);
        Ok(())
    }

    /// The settings of a topic that nobody declares.
    pub(super) fn undeclared_settings(&self, name: &str) -> TopicConfig {
        let named = self.subscriptions.values().any(|other| other.row.dead_letter_topic == name);
        if named { TopicConfig::keep_all() } else { TopicConfig::undeclared(name) }
    }

    /// Makes sure that a topic exists that a publisher names.
    pub(super) fn publishers_topic(&mut self, name: &str) -> Result<(), LogError> {
        if self.topics.contains_key(name) {
            return Ok(());
        }
        self.undeclared.room_for_topics(1)?;
        self.topic(name, &self.undeclared_settings(name))
    }

    /// Makes sure that a topic exists; `config` is for a new one.
    pub(super) fn topic(&mut self, name: &str, config: &TopicConfig) -> Result<(), LogError> {
        crate::bus::check_name(name)
            .map_err(|reason| LogError::Refused(format!("the topic's name {reason}")))?;
        if !self.topics.contains_key(name) {
            let topic = Topic::new(self.new_id(), config);
            self.batch.topics.insert(name.to_owned(), topic.row().encode_to_vec());
            self.topics.insert(name.to_owned(), topic);
            self.undeclared.topics += 1;
        }
        Ok(())
    }

    fn new_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Declares a subscription; one that exists keeps its progress, unless a resource moves it to another topic.
    pub(super) fn declare(&mut self, spec: &SubscriptionSpec) -> Result<(), LogError> {
        if !spec.declared {
            self.may_declare(spec)?;
        }
        self.topic(&spec.topic, &self.undeclared_settings(&spec.topic))?;
        if !spec.declared && names_letters(spec) {
            self.topic(&spec.dead_letter_topic, &TopicConfig::keep_all())?;
        }
        self.urgent = true;
        self.keep_letters(spec);
        if let Some(known) = self.subscriptions.get_mut(&spec.name)
            && known.row.topic == spec.topic
        {
            known.configure(spec, &mut self.batch);
            self.touch(&spec.name);
            return Ok(());
        }
        if self.subscriptions.contains_key(&spec.name) {
            tracing::warn!(
                subscription = spec.name,
                topic = spec.topic,
                "the subscription moves to another topic and starts anew there"
            );
            self.remove(&spec.name);
        }
        self.add(spec)
    }

    /// Checks what a consumer asks for that no resource declares.
    fn may_declare(&self, spec: &SubscriptionSpec) -> Result<(), LogError> {
        let known = self.subscriptions.get(&spec.name);
        if let Some(why) = known.and_then(|known| spec.cannot_leave(&known.row.topic)) {
            return Err(LogError::Refused(why));
        }
        if known.is_none() {
            self.undeclared.room_for_subscription()?;
        }
        // What it named before may be made also where there are too many.
        let names_other = names_letters(spec)
            && known.is_none_or(|known| known.row.dead_letter_topic != spec.dead_letter_topic);
        let named = Some(&spec.dead_letter_topic).filter(|_| names_other);
        let wanted = [Some(&spec.topic), named].into_iter().flatten();
        let new = wanted.filter(|topic| !self.topics.contains_key(*topic)).count();
        self.undeclared.room_for_topics(new)
    }

    /// Dead letters stay, also where their topic is older than the subscription that names it. But only a resource may
    /// say so of a topic that has had events: they may be anybody's, who counts on its deduplication and retention.
    fn keep_letters(&mut self, spec: &SubscriptionSpec) {
        let name = &spec.dead_letter_topic;
        let Some(topic) = self.topics.get_mut(name) else {
            return;
        };
        let may = spec.declared || name.ends_with(dead_letter::SUFFIX) || topic.end() == 1;
        if may && topic.keep_all() {
            self.batch.topics.insert(name.clone(), topic.row().encode_to_vec());
        }
    }

    /// Declares a subscription for a resource.
    pub(super) fn declare_for_resource(&mut self, spec: &SubscriptionSpec) -> Result<(), LogError> {
        self.declare(&SubscriptionSpec { declared: true, ..spec.clone() })?;
        if let Some(subscription) = self.subscriptions.get_mut(&spec.name) {
            let news = subscription.mark_declared(&spec.name, &mut self.batch);
            self.undeclared.subscriptions -= usize::from(news);
        }
        Ok(())
    }

    fn add(&mut self, spec: &SubscriptionSpec) -> Result<(), LogError> {
        let cursor = self.start_of(&spec.topic, spec.start)?;
        let row = subscription::new_row(self.new_id(), spec);
        tracing::info!(
            subscription = spec.name,
            topic = spec.topic,
            position = cursor,
            "subscription declared; it starts here"
        );
        self.batch.subscriptions.insert(spec.name.clone(), Some(row.encode_to_vec()));
        let subscription = Subscription::new(row, Progress::starting_at(cursor));
        self.subscriptions.insert(spec.name.clone(), subscription);
        self.touch(&spec.name);
        self.undeclared.subscriptions += 1;
        Ok(())
    }

    /// The position that a start means now.
    pub(super) fn start_of(&mut self, topic: &str, start: Start) -> Result<u64, LogError> {
        let Some(topic) = self.topics.get(topic) else {
            return Err(LogError::Closed);
        };
        Ok(match start {
            Start::Latest => topic.end(),
            Start::Earliest => topic.row().first,
            Start::Position(position) => position.clamp(topic.row().first, topic.end()),
            Start::Time(ms) => topic.first_at(ms, &mut self.store)?,
        })
    }

    /// Forgets a subscription and ends its consumers.
    pub(super) fn remove(&mut self, name: &str) {
        self.urgent = true;
        let Some(subscription) = self.subscriptions.remove(name) else {
            return;
        };
        self.undeclared.subscriptions -= usize::from(!subscription.row.declared);
        let id = subscription.row.id;
        // Its senders are dropped with it, so that the streams end.
        self.served.remove(name, &subscription.row.topic);
        self.batch.subscriptions.insert(name.to_owned(), None);
        self.batch.progress.insert(id, None);
        self.batch.attempts.retain(|place, _row| place.0 != id);
        self.batch.forget.push(id);
        self.metrics.forget_subscription(name);
    }
}

/// Whether a subscription has its dead letters elsewhere than everybody.
fn names_letters(spec: &SubscriptionSpec) -> bool {
    spec.dead_letter_topic.strip_suffix(dead_letter::SUFFIX) != Some(spec.topic.as_str())
}
