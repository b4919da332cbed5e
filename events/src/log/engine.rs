//! What the log's commands do to memory and to the next batch. Single-threaded: [`super::worker`] calls it.
//!
//! Memory runs ahead of the disk between a command and its commit. If the commit fails, the whole engine is thrown away
//! and loaded again, so there is nothing to roll back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use prost::Message;

use super::declare::Undeclared;
use super::metrics::LogMetrics;
use super::record::{Record, TopicRow, Unsealed};
use super::served::Served;
use super::store::{Batch, Found, Snapshot, Store};
use super::subscription::{self, Subscription, read_row};
use super::topic::Topic;
use super::{Backlog, LogError, Prepared, TopicConfig};
use crate::bus::Published;

#[derive(Debug)]
pub(super) struct Engine {
    pub(super) store: Store,
    pub(super) metrics: LogMetrics,
    pub(super) topics: BTreeMap<String, Topic>,
    pub(super) subscriptions: BTreeMap<String, Subscription>,
    /// The subscription of each consumer.
    pub(super) owners: HashMap<u64, Arc<str>>,
    /// Subscriptions that have consumers.
    pub(super) served: Served,
    /// Those that something was done to since the last commit: the dirty ones are among them.
    touched: BTreeSet<String>,
    /// Topics with events in the current batch.
    grown: BTreeSet<String>,
    pub(super) batch: Batch,
    /// Somebody waits for the flush of this batch.
    pub(super) urgent: bool,
    /// Events, by topic, that retention took from subscriptions and nobody was told of yet.
    pub(super) dropped: BTreeMap<String, u64>,
    /// What the last trim of all topics says; see [`Self::trims_more`].
    pub(super) trims_more: bool,
    /// Nothing was written since the last [`Self::settle_if_quiet`].
    quiet: bool,
    pub(super) next_id: u32,
    /// How many topics and subscriptions there are that no resource declares.
    pub(super) undeclared: Undeclared,
}

impl Engine {
    /// Reads what the store holds: everything but the events, and of those the deduplication windows. A row that makes
    /// no sense costs what it is about, and not the log.
    pub(super) fn load(
        mut store: Store,
        metrics: LogMetrics,
        now_ms: u64,
    ) -> Result<Self, LogError> {
        metrics.damaged_records.inc_by(store.lost_batches());
        let contents = store.contents()?;
        let mut topics = BTreeMap::new();
        for (name, bytes) in &contents.topics {
            let Some(row) = read_row::<TopicRow>(&metrics, &format!("topic {name}"), bytes) else {
                continue;
            };
            topics.insert(name.clone(), Topic::restore(row, &mut store, now_ms)?);
        }
        let mut batch = Batch::default();
        let subscriptions = subscription::load(&contents, &topics, &metrics, now_ms, &mut batch);
        let lost = subscriptions.iter().filter(|(_, subscription)| subscription.dirty);
        let touched = lost.map(|(name, _)| name.clone()).collect();
        let topic_ids = topics.values().map(|topic| topic.row().id);
        let ids = topic_ids.chain(subscriptions.values().map(|s: &Subscription| s.row.id));
        // Rows of a subscription that is lost itself, and events of such a topic, must not become those of the next one.
        let orphans = contents.progress.iter().map(|(id, _)| *id);
        let orphans = orphans.chain(contents.attempts.iter().map(|((id, _), _)| *id));
        let orphans = orphans.chain(contents.last_topic);
        let next_id = ids.chain(orphans).max().unwrap_or(0) + 1;
        let undeclared = Undeclared::of(&topics, &subscriptions);
        let mut engine = Self {
            store,
            metrics,
            topics,
            subscriptions,
            owners: HashMap::new(),
            served: Served::default(),
            touched,
            grown: BTreeSet::new(),
            batch,
            urgent: false,
            dropped: BTreeMap::new(),
            trims_more: false,
            quiet: false,
            next_id,
            undeclared,
        };
        engine.skip_lost_positions()?;
        Ok(engine)
    }

    /// Where a batch of the journal was lost, subscriptions may be further than their topic. What is published next must
    /// not get a position that they are done with.
    fn skip_lost_positions(&mut self) -> Result<(), LogError> {
        let cursors = self.subscriptions.values();
        let cursors = cursors.map(|s| (s.row.topic.clone(), s.progress.cursor()));
        for (name, cursor) in cursors.collect::<Vec<_>>() {
            // The topic may be lost as well.
            self.topic(&name, &TopicConfig::default())?;
            if let Some(topic) = self.topics.get_mut(&name)
                && topic.begin_at(cursor)
            {
                tracing::error!(topic = name, position = cursor, "events before this are lost");
                self.batch.topics.insert(name, topic.row().encode_to_vec());
            }
        }
        Ok(())
    }

    /// Stores events, all or none.
    pub(super) fn append(
        &mut self,
        topic: &str,
        entries: Vec<Prepared>,
        now_ms: u64,
    ) -> Result<Vec<Published>, LogError> {
        self.publishers_topic(topic)?;
        self.urgent = true;
        let Some(state) = self.topics.get_mut(topic) else {
            return Err(LogError::Closed);
        };
        let mut published = Vec::with_capacity(entries.len());
        for entry in entries {
            published.push(state.append(entry, &mut self.batch, &mut self.store, now_ms)?);
        }
        self.grew(topic);
        Ok(published)
    }

    /// What each subscription has yet to handle.
    pub(super) fn backlogs(&self) -> BTreeMap<String, Backlog> {
        let backlogs = self.subscriptions.iter().filter_map(|(name, subscription)| {
            let topic = self.topics.get(&subscription.row.topic)?;
            let events = self.lag(subscription);
            // Some of the topic's may be handled, and wait for one before them to go.
            let all = u128::from(topic.events().max(1));
            let bytes = u128::from(topic.row().bytes) * u128::from(events) / all;
            Some((
                name.clone(),
                Backlog { events, bytes: u64::try_from(bytes).unwrap_or(u64::MAX) },
            ))
        });
        backlogs.collect()
    }

    /// Events that a subscription has yet to handle. Those that were removed ahead of it are not known to it, but it waits
    /// for no more than there are.
    pub(super) fn lag(&self, subscription: &Subscription) -> u64 {
        let topic = self.topics.get(&subscription.row.topic);
        topic.map_or(0, |topic| subscription.progress.lag(topic.end()).min(topic.events()))
    }

    /// Bytes of all records.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.topics.values().map(|topic| topic.row().bytes).sum()
    }

    /// Adds changed topics and progress to the batch and writes it. Afterwards everything done so far is on disk, and may be
    /// acknowledged and handed out.
    pub(super) fn commit(&mut self) -> Result<(), LogError> {
        let grown = std::mem::take(&mut self.grown);
        for name in &grown {
            if let Some(topic) = self.topics.get(name).filter(|topic| topic.has_unwritten()) {
                self.batch.topics.insert(name.clone(), topic.row().encode_to_vec());
            }
        }
        for name in std::mem::take(&mut self.touched) {
            if let Some(subscription) = self.subscriptions.get_mut(&name).filter(|s| s.dirty) {
                let row = subscription.progress.to_row().encode_to_vec();
                self.batch.progress.insert(subscription.row.id, Some(row));
                subscription.dirty = false;
            }
        }
        self.urgent = false;
        if self.batch.is_empty() {
            return Ok(());
        }
        self.quiet = false;
        let batch = std::mem::take(&mut self.batch);
        let events = batch.events.len();
        let timer = self.metrics.flush_seconds.start_timer();
        self.store.commit(batch)?;
        timer.observe_duration();
        self.metrics.group_events.observe(events as f64);
        for name in grown {
            if let Some(topic) = self.topics.get_mut(&name) {
                topic.written();
            }
            self.served.stir_topic(&name);
        }
        debug_assert!(!self.topics.values().any(Topic::has_unwritten));
        debug_assert!(!self.subscriptions.values().any(|subscription| subscription.dirty));
        Ok(())
    }

    /// Once a while without writes is over: lets the store write down what makes opening it quick.
    pub(super) fn settle_if_quiet(&mut self) -> Result<(), LogError> {
        let quiet = std::mem::replace(&mut self.quiet, true);
        if quiet { self.store.settle() } else { Ok(()) }
    }

    /// Adds a record to a topic that exists, whatever it is.
    pub(super) fn push(&mut self, topic: &str, record: &Record) {
        if let Some(state) = self.topics.get_mut(topic) {
            state.push(Unsealed::new(record), &mut self.batch);
            self.grew(topic);
        }
    }

    fn grew(&mut self, topic: &str) {
        if !self.grown.contains(topic) {
            self.grown.insert(topic.to_owned());
        }
    }

    /// Something is done to a subscription: what changes is written with the next commit, and what may be handed out then
    /// is looked for.
    pub(super) fn touch(&mut self, subscription: &str) {
        self.served.stir(subscription);
        self.note_progress(subscription);
    }

    /// The progress of a subscription may be ahead of what the store knows.
    pub(super) fn note_progress(&mut self, subscription: &str) {
        if !self.touched.contains(subscription) {
            self.touched.insert(subscription.to_owned());
        }
    }

    /// A view of everything as of the last commit, for another thread.
    pub(super) fn snapshot(&mut self) -> Result<Snapshot, LogError> {
        self.store.snapshot()
    }

    /// What lies at a position of a topic.
    pub(super) fn find(&mut self, topic: &str, position: u64) -> Result<Found, LogError> {
        match self.topics.get(topic) {
            Some(topic) => self.store.find(topic.place(position)),
            None => Ok(Found::Nothing),
        }
    }
}
