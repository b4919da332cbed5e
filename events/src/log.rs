//! The durable log: topics of checksummed records, subscriptions with their progress, one store on disk.
//!
//! One thread owns all of it (`worker`) and takes whatever queued as one turn: apply everything, write one batch,
//! flush once, answer everyone, hand out what is ready. Nothing is answered before the flush. After any failure of
//! the store the thread forgets its memory, opens the store again and goes on from what is on disk.
//!
//! - `store`: `redb` behind a small interface, and a journal in front; `record`: what is in it; `README.md` says why `redb`.
//! - `engine`: what the commands do; `declare` is which topics and subscriptions there are; `topic`, `progress`, `dedup` and
//!   `served` (whom a turn has to look at) are its parts.
//!
//! Used by the embedded bus and by the outbox. Imports [`crate::bus`], [`crate::cloudevent`] and `crate::database_file`.

mod clock;
mod command;
mod consumers;
mod declare;
mod dedup;
mod disk;
mod engine;
mod error;
mod handout;
mod housekeeping;
mod manage;
mod metrics;
mod moving;
mod progress;
pub(crate) mod record;
mod served;
pub(crate) mod store;
mod subscription;
mod topic;
mod worker;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::bus::{
    Backup, ConsumerBackend, Published, Settle, Start, SubscriptionSpec, SubscriptionStatus,
    TopicConfig, TopicStatus,
};
use crate::cloudevent::Event;
use crate::private;

pub(crate) use clock::now_ms;
use command::{Command, Queue};
use engine::Engine;
pub use error::LogError;
pub(crate) use metrics::LogMetrics;
use record::{Record, Unsealed};

/// Bounds of a log's memory. The defaults suit a sidecar as well as the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// The store's page cache. Default: 8 MiB.
    pub cache_bytes: usize,
    /// Events that wait for a flush; publishers past it wait. Default: 16 MiB.
    pub queue_bytes: u32,
    /// How long the record of handled deliveries may wait for company before it is written. A crash
    /// delivers what it forgot again. Default: 10 ms.
    pub settle_delay: Duration,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 8 << 20,
            queue_bytes: 16 << 20,
            settle_delay: Duration::from_millis(10),
        }
    }
}

/// An event for a topic, and in an outbox the topic on the bus that it is for.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) event: Event,
    pub(crate) route: String,
}

/// One event handed out of the log.
#[derive(Clone, Debug)]
pub(crate) struct LogDelivery {
    pub(crate) id: u64,
    pub(crate) position: u64,
    pub(crate) attempt: u32,
    /// See [`crate::bus::Delivery::generation`].
    pub(crate) generation: u64,
    pub(crate) record: Record,
}

/// What a log holds for a subscription.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backlog {
    /// Events not settled.
    pub(crate) events: u64,
    /// Bytes of their records, as the topic has them on average.
    pub(crate) bytes: u64,
}

/// Handle of a log; dropping it closes the log.
#[derive(Debug)]
pub(crate) struct Log {
    queue: Queue,
    room: Arc<Semaphore>,
    room_size: u32,
    /// Ids are never used again, not even after the store was opened anew.
    next_consumer: AtomicU64,
}

impl Log {
    /// Opens the log in `dir`, which is created if missing.
    pub(crate) async fn open(
        dir: &Path,
        options: LogOptions,
        metrics: LogMetrics,
    ) -> Result<Self, LogError> {
        let room_size = options.queue_bytes.max(1);
        let queue = worker::start(dir.to_owned(), options, metrics).await?;
        let room = Arc::new(Semaphore::new(room_size as usize));
        Ok(Self { queue, room, room_size, next_consumer: AtomicU64::new(1) })
    }

    /// Stores the events, all or none, and returns after the flush.
    pub(crate) async fn append(
        &self,
        topic: &str,
        entries: Vec<Entry>,
    ) -> Result<Vec<Published>, LogError> {
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let published_ms = now_ms();
        let entries: Vec<_> = entries.into_iter().map(|e| Prepared::new(e, published_ms)).collect();
        let bytes: usize = entries.iter().map(|entry| entry.record.len()).sum();
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.room_size);
        let room = Arc::clone(&self.room).acquire_many_owned(bytes).await;
        let room = room.map_err(|_closed| LogError::Closed)?;
        self.ask(|answer| Command::Append { topic: topic.to_owned(), entries, answer, room }).await
    }

    /// Creates the topic or changes its settings.
    pub(crate) async fn ensure_topic(
        &self,
        name: &str,
        config: TopicConfig,
    ) -> Result<(), LogError> {
        let name = name.to_owned();
        self.run(move |engine, now_ms| engine.ensure_topic(&name, &config, now_ms)).await
    }

    /// Gives a topic the settings of those that nobody declares.
    pub(crate) async fn reset_topic(&self, name: &str) -> Result<(), LogError> {
        let name = name.to_owned();
        self.run(move |engine, now_ms| engine.reset_topic(&name, now_ms)).await
    }

    /// Declares a subscription, durably.
    pub(crate) async fn ensure_subscription(&self, spec: SubscriptionSpec) -> Result<(), LogError> {
        self.run(move |engine, _now| engine.declare_for_resource(&spec)).await
    }

    /// Forgets a subscription.
    pub(crate) async fn remove_subscription(&self, name: &str) -> Result<(), LogError> {
        let name = name.to_owned();
        self.run(move |engine, _now| {
            engine.remove(&name);
            Ok(())
        })
        .await
    }

    /// Declares the subscription and becomes one of its consumers.
    pub(crate) async fn consume(&self, spec: SubscriptionSpec) -> Result<LogConsumer, LogError> {
        self.become_consumer(spec, false).await
    }

    /// The same for one who carries events to where they belong: every event in its place and at once, with all its
    /// attributes. What it is published for (a time, an end, one subscription) is for the log where it arrives.
    pub(crate) async fn consume_as_is(
        &self,
        spec: SubscriptionSpec,
    ) -> Result<LogConsumer, LogError> {
        self.become_consumer(spec, true).await
    }

    async fn become_consumer(
        &self,
        spec: SubscriptionSpec,
        as_is: bool,
    ) -> Result<LogConsumer, LogError> {
        let (sender, deliveries) = mpsc::channel(spec.max_in_flight as usize);
        let consumer = self.next_consumer.fetch_add(1, Ordering::Relaxed);
        // From here on, so that a caller that leaves now does not leave a consumer behind.
        let backend = Arc::new(Backend { queue: self.queue.clone(), consumer });
        let spec = Box::new(spec);
        self.ask(|answer| Command::Consume { id: consumer, spec, as_is, sender, answer }).await?;
        Ok(LogConsumer { deliveries, backend })
    }

    /// What a subscription has yet to handle.
    pub(crate) async fn backlog(&self, subscription: &str) -> Result<Backlog, LogError> {
        Ok(self.backlogs().await?.remove(subscription).unwrap_or_default())
    }

    /// The same for all subscriptions, by name.
    pub(crate) async fn backlogs(&self) -> Result<BTreeMap<String, Backlog>, LogError> {
        self.run(|engine, _now| Ok(engine.backlogs())).await
    }

    /// Writes what waits, ends every consumer and closes the store.
    pub(crate) async fn close(&self) {
        let (answer, closed) = oneshot::channel();
        self.queue.send(Command::Close { answer: Some(answer) });
        // An error means that it was closed before.
        closed.await.unwrap_or_default();
    }

    /// All topics, by name.
    pub(crate) async fn topics(&self) -> Result<Vec<TopicStatus>, LogError> {
        self.run(|engine, _now| Ok(engine.topic_statuses())).await
    }

    /// All subscriptions, by name.
    pub(crate) async fn subscriptions(&self) -> Result<Vec<SubscriptionStatus>, LogError> {
        self.run(|engine, now_ms| engine.subscription_statuses(now_ms)).await
    }

    /// Up to `limit` records of a topic, oldest first.
    pub(crate) async fn read(
        &self,
        topic: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Record)>, LogError> {
        let topic = topic.to_owned();
        let (snapshot, id) = self.run(move |engine, _now| engine.topic_snapshot(&topic)).await?;
        off_thread(move || snapshot.records(id, from..u64::MAX, limit)).await
    }

    /// Removes events; returns how many there were.
    pub(crate) async fn remove_events(
        &self,
        topic: &str,
        positions: Vec<u64>,
    ) -> Result<u64, LogError> {
        let topic = topic.to_owned();
        self.run(move |engine, _now| engine.remove_events(&topic, positions)).await
    }

    /// Moves dead letters back; returns how many.
    pub(crate) async fn redrive(
        &self,
        dead_letter_topic: &str,
        positions: Vec<u64>,
    ) -> Result<u64, LogError> {
        let topic = dead_letter_topic.to_owned();
        self.run(move |engine, now_ms| engine.redrive(&topic, positions, now_ms)).await
    }

    /// Moves a subscription.
    pub(crate) async fn seek(&self, subscription: &str, to: Start) -> Result<(), LogError> {
        let name = subscription.to_owned();
        self.run(move |engine, _now| engine.seek(&name, to)).await
    }

    /// Stops or starts handing out events of a subscription.
    pub(crate) async fn pause(&self, subscription: &str, paused: bool) -> Result<(), LogError> {
        let name = subscription.to_owned();
        self.run(move |engine, _now| engine.pause(&name, paused)).await
    }

    /// Copies the store into a folder while it goes on.
    pub(crate) async fn backup(&self, dir: &Path) -> Result<Backup, LogError> {
        let (snapshot, stored) =
            self.run(|engine, _now| Ok((engine.snapshot()?, engine.stored_bytes()))).await?;
        let dir = dir.to_owned();
        off_thread(move || {
            private::folder(&dir).map_err(|error| LogError::io(&dir, &error))?;
            disk::has_room_for_copy(&dir, stored)?;
            let missing_events = snapshot.copy_to(&dir)?;
            Ok(Backup { file: dir.join(store::FILE_NAME), missing_events })
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Engine, u64) -> Result<T, LogError> + Send + 'static,
    ) -> Result<T, LogError> {
        self.ask(|answer| Command::Manage(worker::work(answer, work))).await
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, LogError>>) -> Command,
    ) -> Result<T, LogError> {
        let (answer, answered) = oneshot::channel();
        self.queue.send(command(answer));
        answered.await.unwrap_or(Err(LogError::Closed))
    }
}

/// Reads and writes of the disk that may take long.
async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(LogError::Store(error.to_string())))
}

impl Drop for Log {
    fn drop(&mut self) {
        self.queue.send(Command::Close { answer: None });
    }
}

/// The two halves of a consumer, for a bus to wrap.
pub(crate) struct LogConsumer {
    pub(crate) deliveries: mpsc::Receiver<LogDelivery>,
    pub(crate) backend: Arc<dyn ConsumerBackend>,
}

struct Backend {
    queue: Queue,
    consumer: u64,
}

impl ConsumerBackend for Backend {
    fn settle(&self, delivery: u64, outcome: Settle) -> bool {
        let consumer = self.consumer;
        self.queue.send(Command::Settle { consumer, delivery, outcome })
    }

    fn retire(&self) {
        let consumer = self.consumer;
        let work: command::Work = Box::new(move |engine, _waiting| {
            engine.map(|engine| engine.retire_consumer(consumer)).or(Ok(()))
        });
        self.queue.send(Command::Manage(work));
    }

    fn close(&self) {
        self.queue.send(Command::CloseConsumer { consumer: self.consumer });
    }
}

impl Drop for Backend {
    /// For a caller that left before it had its consumer; otherwise it is closed already.
    fn drop(&mut self) {
        self.close();
    }
}

/// An entry encoded on the publisher's own thread.
#[derive(Debug)]
struct Prepared {
    source: String,
    id: String,
    record: Unsealed,
}

impl Prepared {
    fn new(entry: Entry, published_ms: u64) -> Self {
        let event = Some(entry.event.into());
        let record = Record { published_ms, event, route: entry.route };
        let unsealed = Unsealed::new(&record);
        let event = record.event.unwrap_or_default();
        Self { source: event.source, id: event.id, record: unsealed }
    }
}

#[cfg(test)]
mod tests;
