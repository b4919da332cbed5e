//! What an operator asks of the log: how things are, and moving, holding and removing.

use std::collections::BTreeSet;
use std::time::Duration;

use prost::Message;

use super::LogError;
use super::engine::Engine;
use super::progress::RowChange;
use super::record::Record;
use super::store::{Found, Snapshot};
use crate::bus::{FirstWaiting, Start, SubscriptionStatus, TopicStatus, dead_letter};
use crate::cloudevent::{DELIVER_AT, EXPIRY_TIME, millis};

/// Bytes of dead letters that are moved in one batch, so that it fits into memory.
const MOST_MOVED: u64 = 8 << 20;

impl Engine {
    /// All topics, by name.
    pub(super) fn topic_statuses(&self) -> Vec<TopicStatus> {
        let topics = self.topics.iter().map(|(name, topic)| {
            let row = topic.row();
            TopicStatus {
                name: name.clone(),
                first: row.first,
                next: row.next,
                events: topic.events(),
                bytes: row.bytes,
                declared: row.declared,
            }
        });
        topics.collect()
    }

    /// All subscriptions, by name.
    pub(super) fn subscription_statuses(
        &mut self,
        now_ms: u64,
    ) -> Result<Vec<SubscriptionStatus>, LogError> {
        let names: Vec<String> = self.subscriptions.keys().cloned().collect();
        let mut statuses = Vec::with_capacity(names.len());
        for name in names {
            let (first, oldest_ms) = self.first_waiting(&name, now_ms)?;
            let Some(subscription) = self.subscriptions.get(&name) else {
                continue;
            };
            let row = &subscription.row;
            let scheduled = subscription.progress.not_due(now_ms);
            statuses.push(SubscriptionStatus {
                topic: row.topic.clone(),
                dead_letter_topic: row.dead_letter_topic.clone(),
                lag: self.lag(subscription).saturating_sub(scheduled),
                scheduled: Some(scheduled),
                oldest_ms,
                first,
                in_flight: subscription.consumers.in_flight() as u64,
                retrying: subscription.progress.retrying(),
                attempts: subscription.progress.most_spent(),
                consumers: subscription.consumers.len() as u64,
                paused: row.paused,
                declared: row.declared,
                idle_expiry: row.idle_expiry_ms.map(Duration::from_millis),
                name,
            });
        }
        Ok(statuses)
    }

    /// The first event that a subscription has yet to handle, and since when the oldest waits of those that are due. One
    /// that was published for later waits since then.
    fn first_waiting(
        &mut self,
        name: &str,
        now_ms: u64,
    ) -> Result<(Option<FirstWaiting>, Option<u64>), LogError> {
        let Some(subscription) = self.subscriptions.get(name) else {
            return Ok((None, None));
        };
        let progress = &subscription.progress;
        let (floor, floor_of_due) = (progress.floor(), progress.floor_of_due());
        let due_since = progress.due_since(now_ms);
        let Some(topic) = self.topics.get(&subscription.row.topic) else {
            return Ok((None, None));
        };
        let (id, end) = (topic.row().id, topic.end());
        let first = if floor < end { self.store.first((id, floor), end)? } else { None };
        let told = first.as_ref().map(|(position, record)| FirstWaiting {
            position: *position,
            published_ms: record.published_ms,
        });
        // What comes before is for later, or was.
        let due = match first.filter(|(position, _)| *position >= floor_of_due) {
            None if floor_of_due < end => self.store.first((id, floor_of_due), end)?,
            due => due,
        };
        // What lies from there on was not looked at for what it is for: what is behind it may wait for longer than that.
        let unseen = self.subscriptions.get(name).map_or(0, |it| it.progress.cursor());
        let since = due.map(|(position, record)| match position >= unseen {
            true => record.published_ms,
            false => waits_since(&record, now_ms),
        });
        Ok((told, since.into_iter().chain(due_since).min()))
    }

    /// A view of everything that is on disk, for work off this thread; and the id of a topic in it.
    pub(super) fn topic_snapshot(&mut self, topic: &str) -> Result<(Snapshot, u32), LogError> {
        let known = self.topics.get(topic).ok_or_else(|| LogError::unknown("topic", topic))?;
        let id = known.row().id;
        Ok((self.snapshot()?, id))
    }

    /// Removes events. Returns how many there were.
    pub(super) fn remove_events(
        &mut self,
        topic: &str,
        positions: Vec<u64>,
    ) -> Result<u64, LogError> {
        self.commit_around_admin(topic)?;
        let mut removed = 0;
        for position in positions.into_iter().collect::<BTreeSet<_>>() {
            let length = match self.find(topic, position)? {
                Found::Record(_, length) | Found::Damaged(length) => length,
                Found::Nothing => continue,
            };
            self.remove_event(topic, position, length);
            removed += 1;
        }
        self.commit_around_admin(topic)?;
        Ok(removed)
    }

    /// Before: what is in the current batch cannot be found yet. After: what it removes is found until then, and
    /// retention, or whoever is next, would take it once more.
    fn commit_around_admin(&mut self, topic: &str) -> Result<(), LogError> {
        if !self.topics.contains_key(topic) {
            return Err(LogError::unknown("topic", topic));
        }
        self.commit()
    }

    fn remove_event(&mut self, name: &str, position: u64, length: u64) {
        let Some(topic) = self.topics.get_mut(name) else {
            return;
        };
        topic.remove(position, length, &mut self.batch);
        self.batch.topics.insert(name.to_owned(), topic.row().encode_to_vec());
        let subscriptions = self.subscriptions.iter().filter(|(_, s)| s.row.topic == name);
        let waiting = subscriptions.filter(|(_, s)| s.progress.waits(position));
        let waiting: Vec<String> = waiting.map(|(name, _)| name.clone()).collect();
        for subscription in waiting {
            self.touch(&subscription);
            self.pass_over(&subscription, position);
        }
    }

    /// Moves dead letters back to where they came from, for the subscription that gave them up. Each in one batch: no
    /// crash leaves an event in both places, or in none. One that has expired stays: nobody would get it.
    pub(super) fn redrive(
        &mut self,
        dead_letter_topic: &str,
        positions: Vec<u64>,
        now_ms: u64,
    ) -> Result<u64, LogError> {
        self.commit_around_admin(dead_letter_topic)?;
        let (mut moved, mut bytes) = (0, 0);
        for position in positions.into_iter().collect::<BTreeSet<_>>() {
            let Found::Record(record, length) = self.find(dead_letter_topic, position)? else {
                continue;
            };
            let Some((topic, record)) = self.redriven(*record, now_ms) else {
                continue;
            };
            // It exists: the subscription is on it.
            self.topic(&topic, &self.undeclared_settings(&topic))?;
            self.push(&topic, &record);
            self.remove_event(dead_letter_topic, position, length);
            moved += 1;
            bytes += length;
            if bytes >= MOST_MOVED {
                self.commit()?;
                bytes = 0;
            }
        }
        self.commit_around_admin(dead_letter_topic)?;
        Ok(moved)
    }

    /// The topic that a dead letter goes back to, and what is appended there.
    fn redriven(&self, mut record: Record, now_ms: u64) -> Option<(String, Record)> {
        let event = record.event.as_mut()?;
        let expires = event.attributes.get(EXPIRY_TIME).and_then(|text| millis(text));
        if expires.is_some_and(|at_ms| at_ms <= now_ms) {
            return None;
        }
        let topic = event.attributes.get(dead_letter::TOPIC)?.clone();
        let subscription = event.attributes.get(dead_letter::SUBSCRIPTION)?.clone();
        if self.subscriptions.get(&subscription)?.row.topic != topic {
            return None;
        }
        let mut attributes = std::mem::take(&mut event.attributes).into_iter().collect();
        dead_letter::strip(&mut attributes);
        event.attributes = attributes.into_iter().collect();
        event.attributes.insert(dead_letter::REDRIVE_TO.to_owned(), subscription);
        record.published_ms = now_ms;
        Some((topic, record))
    }

    /// Moves a subscription.
    pub(super) fn seek(&mut self, name: &str, to: Start) -> Result<(), LogError> {
        self.commit()?;
        let Some(subscription) = self.subscriptions.get(name) else {
            return Err(LogError::unknown("subscription", name));
        };
        let topic = subscription.row.topic.clone();
        let position = self.start_of(&topic, to)?;
        if let Some(subscription) = self.subscriptions.get_mut(name) {
            subscription.move_to(name, position, &mut self.batch);
        }
        self.touch(name);
        self.urgent = true;
        tracing::info!(subscription = name, topic, position, "subscription moved");
        Ok(())
    }

    /// Stops or starts handing out.
    pub(super) fn pause(&mut self, name: &str, paused: bool) -> Result<(), LogError> {
        let Some(subscription) = self.subscriptions.get_mut(name) else {
            return Err(LogError::unknown("subscription", name));
        };
        if subscription.row.paused != paused {
            subscription.row.paused = paused;
            let row = subscription.row.encode_to_vec();
            self.batch.subscriptions.insert(name.to_owned(), Some(row));
            self.urgent = true;
            self.served.stir(name);
        }
        Ok(())
    }

    /// Done with an event without a delivery.
    pub(super) fn pass_over(&mut self, name: &str, position: u64) {
        if let Some(subscription) = self.subscriptions.get_mut(name) {
            let change: RowChange = subscription.progress.finish(position);
            subscription.changed(position, change, &mut self.batch);
        }
    }
}

/// Since when an event could be delivered.
fn waits_since(record: &Record, now_ms: u64) -> u64 {
    let attributes = record.event.as_ref().map(|event| &event.attributes);
    let due = attributes.and_then(|attributes| attributes.get(DELIVER_AT));
    let due = due.and_then(|text| millis(text)).filter(|due_ms| *due_ms <= now_ms);
    due.unwrap_or(0).max(record.published_ms)
}
