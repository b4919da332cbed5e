//! What of a topic somebody has yet to handle, for a move to another bus. Nobody consumes meanwhile.

use duet_api::proto;

use super::engine::Engine;
use super::record::Record;
use super::store::Snapshot;
use super::{Log, LogError, off_thread};
use crate::bus::dead_letter;

/// An event, and who waits for it.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) position: u64,
    pub(crate) record: Record,
    /// Subscriptions, by name.
    pub(crate) waiting: Vec<String>,
    /// Published within the deduplication window before the topic's last one: no other has its source and id.
    pub(crate) recent: bool,
}

/// Where a topic's open events lie.
struct Stretch {
    snapshot: Snapshot,
    topic: u32,
    /// The first that somebody waits for.
    from: u64,
    last: u64,
    dedup_window_ms: u64,
}

impl Log {
    /// Up to `limit` events of a topic from a position on, oldest first, but for what all its subscriptions have
    /// handled up to. Of a topic without subscriptions, all.
    pub(crate) async fn open_events(
        &self,
        topic: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Open>, LogError> {
        let name = topic.to_owned();
        let stretch = self.run(move |engine, _now| engine.stretch(&name)).await?;
        let window_ms = stretch.dedup_window_ms;
        let (last_ms, records) = off_thread(move || {
            let Stretch { snapshot, topic, last, .. } = stretch;
            let newest = snapshot.records(topic, last..u64::MAX, 1)?;
            let last_ms = newest.first().map_or(u64::MAX, |(_, record)| record.published_ms);
            let found = snapshot.records(topic, from.max(stretch.from)..u64::MAX, limit)?;
            Ok((last_ms, found))
        })
        .await?;
        let topic = topic.to_owned();
        self.run(move |engine, _now| {
            let open = |(position, record): (u64, Record)| Open {
                position,
                waiting: engine.waiting(&topic, position, record.event.as_ref()),
                recent: record.published_ms.saturating_add(window_ms) > last_ms,
                record,
            };
            Ok(records.into_iter().map(open).collect())
        })
        .await
    }
}

impl Engine {
    fn stretch(&mut self, topic: &str) -> Result<Stretch, LogError> {
        self.commit()?;
        let (snapshot, id) = self.topic_snapshot(topic)?;
        let known = self.topics.get(topic).ok_or_else(|| LogError::unknown("topic", topic))?;
        let row = known.row();
        let own = self.subscriptions.values().filter(|s| s.row.topic == topic);
        Ok(Stretch {
            snapshot,
            topic: id,
            from: own.map(|s| s.progress.floor()).min().unwrap_or(row.first),
            last: row.next.saturating_sub(1),
            dedup_window_ms: row.dedup_window_ms,
        })
    }

    /// Who waits for an event.
    fn waiting(&self, topic: &str, position: u64, event: Option<&proto::Event>) -> Vec<String> {
        let only = event.and_then(|event| event.attributes.get(dead_letter::REDRIVE_TO));
        let own = self.subscriptions.iter().filter(|(name, subscription)| {
            subscription.row.topic == topic && only.is_none_or(|only| only == *name)
        });
        let waits = own.filter(|(_, subscription)| {
            let key = event.and_then(|event| subscription.key(event));
            subscription.progress.is_open(position, key)
        });
        waits.map(|(name, _)| name.clone()).collect()
    }
}
