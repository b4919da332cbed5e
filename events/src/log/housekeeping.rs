//! What the log does about once a second: retention, subscriptions that nobody wants any more, and the gauges.

use std::collections::HashMap;

use prost::Message;

use super::LogError;
use super::engine::Engine;
use super::topic::Topic;

impl Engine {
    /// One round of it.
    pub(super) fn tick(&mut self, now_ms: u64) -> Result<(), LogError> {
        self.forget_idle(now_ms);
        for topic in self.topics.values_mut() {
            topic.trim_anew();
        }
        self.trim_on(now_ms)?;
        // What was overlooked, if anything is, waits no longer than this.
        self.served.stir_all();
        for (topic, dropped) in std::mem::take(&mut self.dropped) {
            tracing::warn!(topic, dropped, "retention took events that were not handled yet");
        }
        for status in self.subscription_statuses(now_ms)? {
            let age_ms = now_ms.saturating_sub(status.oldest_ms.unwrap_or(now_ms));
            self.metrics.subscription(&status, age_ms);
        }
        Ok(())
    }

    fn forget_idle(&mut self, now_ms: u64) {
        let mut forgotten = Vec::new();
        for (name, subscription) in &mut self.subscriptions {
            if subscription.is_forgotten(name, now_ms, &mut self.batch) {
                forgotten.push(name.clone());
            }
        }
        for name in forgotten {
            tracing::info!(subscription = name, "without a consumer for too long: removed");
            self.remove(&name);
        }
    }

    /// Whether retention has more to take. It takes a little in each turn, so that publishers and consumers have
    /// theirs, but does not wait in between: otherwise publishers that are faster would fill the disk.
    pub(super) fn trims_more(&self) -> bool {
        self.trims_more
    }

    /// Trims the topics that have more, by a step.
    pub(super) fn trim_on(&mut self, now_ms: u64) -> Result<(), LogError> {
        if !self.batch.trims.is_empty() {
            // What the current batch removes is found until then, and would be taken once more.
            self.commit()?;
        }
        let mut floors: HashMap<&str, u64> = HashMap::new();
        for subscription in self.subscriptions.values() {
            let floor = subscription.progress.floor();
            let lowest = floors.entry(&subscription.row.topic).or_insert(floor);
            *lowest = floor.min(*lowest);
        }
        let mut dropping = Vec::new();
        for (name, topic) in self.topics.iter_mut().filter(|(_, topic)| topic.trims_more()) {
            let floor = floors.get(name.as_str()).copied().unwrap_or(u64::MAX);
            if topic.trim(floor, &mut self.batch, &mut self.store, now_ms)? {
                self.batch.topics.insert(name.clone(), topic.row().encode_to_vec());
                if topic.row().first > floor {
                    dropping.push(name.clone());
                }
            }
        }
        for topic in dropping {
            self.drop_unhandled(&topic);
        }
        self.trims_more = self.topics.values().any(Topic::trims_more);
        Ok(())
    }

    /// Subscriptions go on where the topic begins now.
    fn drop_unhandled(&mut self, name: &str) {
        let first = self.topics.get(name).map_or(0, |topic| topic.row().first);
        let mut dropped = 0;
        let own = self.subscriptions.iter().filter(|(_, s)| s.row.topic == name);
        for subscription in own.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.touch(&subscription);
            let Some(subscription) = self.subscriptions.get_mut(&subscription) else {
                continue;
            };
            let (rows, lost) = subscription.progress.skip_to(first);
            for position in rows {
                self.batch.attempts.insert((subscription.row.id, position), None);
            }
            subscription.dirty |= lost > 0;
            dropped += lost;
        }
        *self.dropped.entry(name.to_owned()).or_default() += dropped;
        self.metrics.dropped(name, dropped);
    }
}
