//! What the log's commands do to memory and to the next batch. Single-threaded: [`super::worker`] calls it.
//!
//! Memory runs ahead of the disk between a command and its commit. If the commit fails, the whole engine is thrown away
//! and loaded again, so there is nothing to roll back.

use std::collections::{BTreeMap, HashMap};

use prost::Message;

use super::handout::Consumers;
use super::metrics::LogMetrics;
use super::progress::Progress;
use super::record::{AttemptRow, ProgressRow, SubscriptionRow, TopicRow};
use super::store::{Batch, Contents, Found, Reader, Store};
use super::topic::Topic;
use super::{Backlog, LogError, Prepared, TopicConfig};
use crate::bus::{Published, Start, SubscriptionSpec};

#[derive(Debug)]
pub(super) struct Engine {
    /// Kept between commits; ahead of `store`, so that it goes first.
    reader: Option<Reader>,
    store: Store,
    pub(super) metrics: LogMetrics,
    pub(super) topics: BTreeMap<String, Topic>,
    pub(super) subscriptions: BTreeMap<String, Subscription>,
    pub(super) consumers: Consumers,
    pub(super) batch: Batch,
    /// Somebody waits for the flush of this batch.
    pub(super) urgent: bool,
    next_id: u32,
}

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) row: SubscriptionRow,
    pub(super) progress: Progress,
    /// Progress is ahead of what the store knows.
    pub(super) dirty: bool,
}

impl Engine {
    /// Reads what the store holds: everything but the events, and of those the deduplication windows.
    pub(super) fn load(store: Store, metrics: LogMetrics, now_ms: u64) -> Result<Self, LogError> {
        let contents = store.contents()?;
        let reader = store.reader()?;
        let mut topics = BTreeMap::new();
        for (name, bytes) in &contents.topics {
            let row =
                TopicRow::decode(bytes.as_slice()).map_err(|error| unreadable(name, &error))?;
            topics.insert(name.clone(), Topic::restore(row, &reader, now_ms)?);
        }
        let subscriptions = load_subscriptions(&contents)?;
        let topic_ids = topics.values().map(|topic| topic.row().id);
        let ids = topic_ids.chain(subscriptions.values().map(|s: &Subscription| s.row.id));
        let next_id = ids.max().unwrap_or(0) + 1;
        Ok(Self {
            reader: Some(reader),
            store,
            metrics,
            topics,
            subscriptions,
            consumers: Consumers::default(),
            batch: Batch::default(),
            urgent: false,
            next_id,
        })
    }

    /// Stores events, all or none.
    pub(super) fn append(
        &mut self,
        topic: &str,
        entries: Vec<Prepared>,
        now_ms: u64,
    ) -> Result<Vec<Published>, LogError> {
        self.topic(topic, &TopicConfig::default())?;
        self.urgent = true;
        let reader = view(&mut self.reader, &self.store)?;
        let Some(state) = self.topics.get_mut(topic) else {
            return Err(LogError::Closed);
        };
        let mut published = Vec::with_capacity(entries.len());
        for entry in entries {
            published.push(state.append(entry, &mut self.batch, reader, now_ms)?);
        }
        self.batch.topics.insert(topic.to_owned(), state.row().encode_to_vec());
        Ok(published)
    }

    /// Creates a topic or changes its settings.
    pub(super) fn ensure_topic(
        &mut self,
        name: &str,
        config: &TopicConfig,
        now_ms: u64,
    ) -> Result<(), LogError> {
        self.topic(name, config)?;
        let reader = view(&mut self.reader, &self.store)?;
        let Some(topic) = self.topics.get_mut(name) else {
            return Err(LogError::Closed);
        };
        if topic.configure(config, reader, now_ms)? {
            self.batch.topics.insert(name.to_owned(), topic.row().encode_to_vec());
        }
        self.urgent = true;
        Ok(())
    }

    /// Makes sure that a topic exists; `config` is for a new one.
    pub(super) fn topic(&mut self, name: &str, config: &TopicConfig) -> Result<(), LogError> {
        crate::bus::check_name(name)
            .map_err(|reason| LogError::Refused(format!("the topic's name {reason}")))?;
        if !self.topics.contains_key(name) {
            let topic = Topic::new(self.new_id(), config);
            self.batch.topics.insert(name.to_owned(), topic.row().encode_to_vec());
            self.topics.insert(name.to_owned(), topic);
        }
        Ok(())
    }

    fn new_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Declares a subscription; one that exists keeps its progress unless its topic is another one.
    pub(super) fn declare(&mut self, spec: &SubscriptionSpec) -> Result<(), LogError> {
        self.topic(&spec.topic, &TopicConfig::default())?;
        self.urgent = true;
        if let Some(known) = self.subscriptions.get_mut(&spec.name)
            && known.row.topic == spec.topic
        {
            if known.row.dead_letter_topic != spec.dead_letter_topic {
                known.row.dead_letter_topic.clone_from(&spec.dead_letter_topic);
                let row = known.row.encode_to_vec();
                self.batch.subscriptions.insert(spec.name.clone(), Some(row));
            }
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
        let Some(topic) = self.topics.get(&spec.topic) else {
            return Err(LogError::Closed);
        };
        let cursor = match spec.start {
            Start::Latest => topic.end(),
            Start::Earliest => topic.row().first,
            Start::Position(position) => position.clamp(topic.row().first, topic.end()),
            Start::Time(ms) => topic.first_at(ms, view(&mut self.reader, &self.store)?)?,
        };
        let row = SubscriptionRow {
            id: self.new_id(),
            topic: spec.topic.clone(),
            dead_letter_topic: spec.dead_letter_topic.clone(),
        };
        tracing::info!(
            subscription = spec.name,
            topic = spec.topic,
            position = cursor,
            "subscription declared; it starts here"
        );
        self.batch.subscriptions.insert(spec.name.clone(), Some(row.encode_to_vec()));
        let progress = Progress::starting_at(cursor);
        let subscription = Subscription { row, progress, dirty: true };
        self.subscriptions.insert(spec.name.clone(), subscription);
        Ok(())
    }

    /// Forgets a subscription and ends its consumers.
    pub(super) fn remove(&mut self, name: &str) {
        self.urgent = true;
        let Some(subscription) = self.subscriptions.remove(name) else {
            return;
        };
        let id = subscription.row.id;
        self.consumers.end_all_of(name);
        self.batch.subscriptions.insert(name.to_owned(), None);
        self.batch.progress.insert(id, None);
        self.batch.attempts.retain(|place, _row| place.0 != id);
        self.batch.forget.push(id);
        self.metrics.forget_subscription(name);
    }

    /// What each subscription has yet to handle.
    pub(super) fn backlogs(&self) -> BTreeMap<String, Backlog> {
        let backlogs = self.subscriptions.iter().filter_map(|(name, subscription)| {
            let topic = self.topics.get(&subscription.row.topic)?;
            let events = subscription.progress.lag(topic.end());
            Some((name.clone(), Backlog { events, bytes: topic.row().bytes }))
        });
        backlogs.collect()
    }

    /// Adds changed progress to the batch and writes it. Afterwards everything applied so far is on disk.
    pub(super) fn commit(&mut self) -> Result<(), LogError> {
        for subscription in self.subscriptions.values_mut().filter(|s| s.dirty) {
            let row = subscription.progress.to_row().encode_to_vec();
            self.batch.progress.insert(subscription.row.id, Some(row));
            subscription.dirty = false;
        }
        self.urgent = false;
        if self.batch.is_empty() {
            return Ok(());
        }
        // An older view would keep the pages alive that this commit frees.
        self.reader = None;
        let batch = std::mem::take(&mut self.batch);
        let timer = self.metrics.flush_seconds.start_timer();
        self.store.commit(&batch)?;
        timer.observe_duration();
        self.metrics.group_events.observe(batch.events.len() as f64);
        for topic in self.topics.values_mut() {
            topic.written();
        }
        Ok(())
    }

    /// Housekeeping, about once a second: retention, and the gauges.
    pub(super) fn tick(&mut self, now_ms: u64) -> Result<(), LogError> {
        let mut floors: HashMap<&str, u64> = HashMap::new();
        for subscription in self.subscriptions.values() {
            let floor = subscription.progress.floor();
            let lowest = floors.entry(&subscription.row.topic).or_insert(floor);
            *lowest = floor.min(*lowest);
        }
        let reader = view(&mut self.reader, &self.store)?;
        for (name, topic) in &mut self.topics {
            let floor = floors.get(name.as_str()).copied().unwrap_or(u64::MAX);
            if topic.trim(floor, &mut self.batch, reader, now_ms)? {
                self.batch.topics.insert(name.clone(), topic.row().encode_to_vec());
            }
        }
        for (name, subscription) in &self.subscriptions {
            let Some(topic) = self.topics.get(&subscription.row.topic) else {
                continue;
            };
            let lag = subscription.progress.lag(topic.end());
            let oldest = if lag == 0 {
                now_ms
            } else {
                match reader.get(topic.place(subscription.progress.floor()))? {
                    Found::Record(record, _) => record.published_ms,
                    Found::Damaged(_) | Found::Nothing => now_ms,
                }
            };
            let age_ms = now_ms.saturating_sub(oldest);
            self.metrics.subscription(name, lag, age_ms, self.consumers.in_flight(name));
        }
        Ok(())
    }

    /// What lies at a position of a topic.
    pub(super) fn find(&mut self, topic: &str, position: u64) -> Result<Found, LogError> {
        let reader = view(&mut self.reader, &self.store)?;
        match self.topics.get(topic) {
            Some(topic) => reader.get(topic.place(position)),
            None => Ok(Found::Nothing),
        }
    }
}

/// The view of the events as of the last commit.
fn view<'a>(reader: &'a mut Option<Reader>, store: &Store) -> Result<&'a Reader, LogError> {
    match reader {
        Some(reader) => Ok(reader),
        None => Ok(reader.insert(store.reader()?)),
    }
}

fn load_subscriptions(contents: &Contents) -> Result<BTreeMap<String, Subscription>, LogError> {
    let progress: HashMap<u32, &Vec<u8>> = contents.progress.iter().map(|(k, v)| (*k, v)).collect();
    let mut attempts: HashMap<u32, Vec<(u64, AttemptRow)>> = HashMap::new();
    for ((id, position), bytes) in &contents.attempts {
        let row = AttemptRow::decode(bytes.as_slice())
            .map_err(|error| unreadable("an attempt", &error))?;
        attempts.entry(*id).or_default().push((*position, row));
    }
    let mut subscriptions = BTreeMap::new();
    for (name, bytes) in &contents.subscriptions {
        let row =
            SubscriptionRow::decode(bytes.as_slice()).map_err(|error| unreadable(name, &error))?;
        let stored = progress.get(&row.id).map_or(&[][..], |bytes| bytes.as_slice());
        let stored = ProgressRow::decode(stored).map_err(|error| unreadable(name, &error))?;
        let attempts = attempts.remove(&row.id).unwrap_or_default();
        let progress = Progress::restore(&stored, &attempts);
        subscriptions.insert(name.clone(), Subscription { row, progress, dirty: false });
    }
    Ok(subscriptions)
}

fn unreadable(name: &str, error: &prost::DecodeError) -> LogError {
    LogError::Store(format!("the row of {name} cannot be read: {error}"))
}
