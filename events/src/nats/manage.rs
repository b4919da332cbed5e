//! The NATS bus, as its server and its operator see it.

use std::sync::atomic::{AtomicBool, Ordering};

use async_nats::jetstream::consumer;
use async_nats::jetstream::stream::{self, DeleteMessageErrorKind};
use futures::future::BoxFuture;
use tokio::sync::oneshot;

use super::hub::{Command, now_ms};
use super::names::message_id;
use super::record::{Overtaken, Record};
use super::shared::{NatsError, Shared};
use super::stream::Topic;
use super::subscription::paused_until;
use super::{NatsBus, consume_error, message};
use crate::bus::{
    ConsumeError, Import, ManageError, ManagedBus, Start, StoredEvent, SubscriptionSpec,
    SubscriptionStatus, TopicConfig, TopicStatus, dead_letter,
};

/// Bound on giving back what is in hand: while no server is there, answers wait for one.
pub(super) const GIVE_BACK: std::time::Duration = std::time::Duration::from_secs(5);
/// Bound on telling the servers what was said last.
const FLUSH: std::time::Duration = std::time::Duration::from_secs(2);

impl ManagedBus for NatsBus {
    fn ensure_topic<'a>(
        &'a self,
        name: &'a str,
        config: TopicConfig,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.shared.set_topic(name, &config).await?) })
    }

    fn reset_topic<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.shared.reset_topic(name).await?) })
    }

    fn ensure_subscription(
        &self,
        spec: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<(), ConsumeError>> {
        Box::pin(async move {
            let spec = SubscriptionSpec { declared: true, ..spec };
            let before = self.shared.record(&spec.name).await;
            let before = before.map_err(|error| consume_error(&spec, &error))?;
            Box::pin(self.shared.ensure(&spec))
                .await
                .map_err(|error| consume_error(&spec, &error))?;
            let marked = self.shared.mark_declared(&spec.name).await;
            marked.map_err(|error| consume_error(&spec, &error))?;
            if before.is_some_and(|before| before.topic != spec.topic) {
                self.tell(&spec.name, Command::End("its topic is another one now".to_owned()));
            } else if self.differs(&spec) {
                // They come again, and then it works by the new ones.
                self.tell(&spec.name, Command::End("its settings are others now".to_owned()));
            }
            Ok(())
        })
    }

    fn remove_subscription<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move {
            self.shared.forget(name).await?;
            self.tell(name, Command::End("the subscription was removed".to_owned()));
            Ok(())
        })
    }

    fn topics(&self) -> BoxFuture<'_, Result<Vec<TopicStatus>, ManageError>> {
        Box::pin(self.shared.topic_statuses())
    }

    fn subscriptions(&self) -> BoxFuture<'_, Result<Vec<SubscriptionStatus>, ManageError>> {
        Box::pin(self.subscription_statuses())
    }

    fn read<'a>(
        &'a self,
        topic: &'a str,
        from: u64,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredEvent>, ManageError>> {
        Box::pin(self.shared.patience().with(move || self.shared.read(topic, from, limit)))
    }

    fn remove_events<'a>(
        &'a self,
        topic: &'a str,
        positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>> {
        Box::pin(async move {
            let stream = self.shared.patience().with(|| self.shared.stream(topic)).await?;
            let mut removed = 0;
            for position in positions {
                removed += u64::from(self.shared.remove(&stream, position).await?);
            }
            Ok(removed)
        })
    }

    fn redrive<'a>(
        &'a self,
        dead_letter_topic: &'a str,
        positions: Vec<u64>,
    ) -> BoxFuture<'a, Result<u64, ManageError>> {
        Box::pin(async move {
            let topic = dead_letter_topic;
            let stream = self.shared.patience().with(|| self.shared.stream(topic)).await?;
            let mut moved = 0;
            for position in positions {
                let stored = || self.shared.redrive(&stream, topic, position);
                if self.shared.patience().with(stored).await? {
                    self.shared.remove(&stream, position).await?;
                    moved += 1;
                }
            }
            Ok(moved)
        })
    }

    fn import<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Import>,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move { Ok(self.shared.import(topic, events).await?) })
    }

    fn adopt(&self, spec: SubscriptionSpec) -> BoxFuture<'_, Result<(), ConsumeError>> {
        Box::pin(async move {
            let made = Box::pin(self.shared.ensure(&spec)).await;
            made.map(drop).map_err(|error| consume_error(&spec, &error))
        })
    }

    fn seek<'a>(
        &'a self,
        subscription: &'a str,
        to: Start,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move {
            self.shared.move_to(subscription, to).await?;
            self.tell(subscription, Command::Moved);
            Ok(())
        })
    }

    fn pause<'a>(
        &'a self,
        subscription: &'a str,
        paused: bool,
    ) -> BoxFuture<'a, Result<(), ManageError>> {
        Box::pin(async move {
            let pause = || self.shared.pause(subscription, paused);
            Box::pin(self.shared.patience().with(pause)).await?;
            self.tell(subscription, Command::Paused(paused));
            Ok(())
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.shared.closed.send_replace(true);
            let hubs: Vec<_> = self.hubs.lock().drain().map(|(_, hub)| hub).collect();
            let finished = async {
                for mut hub in hubs {
                    // An error means that its end is gone: it gave everything back.
                    while hub.finished.changed().await.is_ok() {}
                }
            };
            if tokio::time::timeout(GIVE_BACK, finished).await.is_err() {
                // JetStream hands out again what it hears nothing of.
                tracing::warn!(bus = self.shared.name, "not everything could be given back");
            }
            // What they said last goes out before the connection does.
            if self.shared.connected_now() {
                tokio::time::timeout(FLUSH, self.shared.client.flush()).await.ok();
            }
            if let Err(error) = self.shared.client.drain().await {
                tracing::debug!(bus = self.shared.name, %error, "the connection was not drained");
            }
            self.shared.metrics.end();
        })
    }
}

impl NatsBus {
    async fn subscription_statuses(&self) -> Result<Vec<SubscriptionStatus>, ManageError> {
        let mut all = Vec::new();
        for record in self.shared.records().await? {
            all.extend(self.subscription(record.record).await?);
        }
        Ok(all)
    }

    async fn subscription(
        &self,
        record: Record,
    ) -> Result<Option<SubscriptionStatus>, ManageError> {
        let Some((status, _born)) = self.shared.status(record).await? else { return Ok(None) };
        // Those of other control planes are at least one.
        let consumers = self.consumers(&status.name).await.max(status.consumers);
        let attempts = match status.lag {
            0 => 0,
            _ => self.shared.most_spent(&status.name).await?,
        };
        Ok(Some(SubscriptionStatus { consumers, attempts, ..status }))
    }

    async fn consumers(&self, name: &str) -> u64 {
        let (answer, count) = oneshot::channel();
        self.tell(name, Command::Count(answer));
        count.await.map_or(0, |count| count as u64)
    }
}

impl Shared {
    async fn remove(&self, stream: &stream::Stream, position: u64) -> Result<bool, ManageError> {
        let tried = AtomicBool::new(false);
        let remove = || async {
            let again = tried.swap(true, Ordering::Relaxed);
            match stream.delete_message(position).await {
                Ok(deleted) => Ok(deleted),
                Err(error) => {
                    // No such message; perhaps as the answer to the try before was lost.
                    if let DeleteMessageErrorKind::JetStream(error) = error.kind()
                        && [10_037, 10_043, 10_057].contains(&error.error_code().0)
                    {
                        return Ok(again);
                    }
                    Err(self.error("removing an event", &error).into())
                }
            }
        };
        self.patience().with(remove).await
    }

    /// Stores a dead letter at its old topic. It is removed here only then: whatever happens between leaves it in both, and
    /// doing it again within the window stores it once. One that has expired stays: nobody would get it.
    async fn redrive(
        &self,
        letters: &stream::Stream,
        topic: &str,
        position: u64,
    ) -> Result<bool, ManageError> {
        let found = self.message(letters, topic, position).await?;
        let Some(found) = found.filter(|found| found.sequence == position) else {
            return Ok(false);
        };
        let read = message::event(&found.subject, position, Some(&found.headers), found.payload);
        let Ok(event) = read else { return Ok(false) };
        if event.expires_ms().is_some_and(|at_ms| at_ms <= now_ms()) {
            return Ok(false);
        }
        let attribute = |name: &str| event.attribute(name).map(str::to_owned);
        let (Some(to), Some(subscription)) =
            (attribute(dead_letter::TOPIC), attribute(dead_letter::SUBSCRIPTION))
        else {
            return Ok(false);
        };
        if self.record(&subscription).await?.is_none_or(|record| record.topic != to) {
            return Ok(false);
        }
        let event = message::edit(event, |attributes| {
            dead_letter::strip(attributes);
            attributes.insert(dead_letter::REDRIVE_TO.to_owned(), subscription);
        });
        let event = event.map_err(|error| NatsError::Failed(error.to_string()))?;
        let id = format!("redrive {} {position}", message_id(topic, &found.time.to_string()));
        self.store(&to, TopicConfig::undeclared(&to), &event, id).await?;
        Ok(true)
    }

    async fn known(&self, subscription: &str) -> Result<(Record, u64), ManageError> {
        let (record, revision) = self.read_record(subscription).await?;
        let unknown =
            || ManageError::Unknown { kind: "subscription", name: subscription.to_owned() };
        Ok((record.ok_or_else(unknown)?, revision))
    }

    /// Each step may be done twice: one that is done again is another generation.
    async fn move_to(&self, subscription: &str, to: Start) -> Result<(), ManageError> {
        let patience = self.patience();
        let (topic, old, record) =
            patience.with(|| Box::pin(self.begin_move(subscription, to))).await?;
        let anew = || async {
            self.delete_consumer(&record.topic, subscription).await?;
            Box::pin(self.recreate(&topic, subscription, old.as_ref(), to)).await?;
            Ok(())
        };
        patience.with(anew).await?;
        patience.with(|| self.end_move(&record)).await
    }

    /// First: what the new consumer hands out is of the new generation, and starts where it was asked to, whatever happens
    /// between.
    async fn begin_move(
        &self,
        subscription: &str,
        to: Start,
    ) -> Result<(Topic, Option<consumer::Info>, Record), ManageError> {
        let mut overtaken = Overtaken::default();
        loop {
            let (mut record, revision) = self.known(subscription).await?;
            let topic = self.topic(&record.topic, TopicConfig::undeclared(&record.topic)).await?;
            let old = self.consumer(&topic, subscription).await?;
            let old = old.map(|consumer| consumer.cached_info().clone());
            record.epoch = record.epoch.wrapping_add(1);
            record.moving_to = Some(to);
            if self.put_record(&record, revision).await?.is_some() {
                return Ok((topic, old, record));
            }
            overtaken.again().await?;
        }
    }

    /// Unless somebody moves it again, or saw that it is there.
    async fn end_move(&self, moved: &Record) -> Result<(), ManageError> {
        let mut overtaken = Overtaken::default();
        loop {
            let (mut record, revision) = self.known(&moved.name).await?;
            if record.epoch != moved.epoch || record.moving_to.is_none() {
                return Ok(());
            }
            record.moving_to = None;
            if self.put_record(&record, revision).await?.is_some() {
                return Ok(());
            }
            overtaken.again().await?;
        }
    }

    async fn pause(&self, subscription: &str, paused: bool) -> Result<(), ManageError> {
        let (record, _) = self.known(subscription).await?;
        if !self.client.is_server_compatible(2, 11, 0) {
            let why = "pausing a subscription needs NATS 2.11 or later";
            return Err(ManageError::Refused(why.to_owned()));
        }
        let stream = self.stream(&record.topic).await?;
        let name = super::names::token(subscription);
        let done = match paused {
            true => stream.pause_consumer(&name, paused_until()?).await,
            false => stream.resume_consumer(&name).await,
        };
        done.map_err(|error| self.error("pause", &error))?;
        self.wanted.lock().pause(subscription, paused);
        Ok(())
    }
}

impl From<NatsError> for ManageError {
    fn from(error: NatsError) -> Self {
        match error {
            NatsError::Refused(reason) => Self::Refused(reason),
            NatsError::TooMany(_) => Self::Refused(error.to_string()),
            NatsError::Away(_) => Self::Away(error.to_string()),
            NatsError::Settings(_)
            | NatsError::Full(_)
            | NatsError::Failed(_)
            | NatsError::Closed => Self::Failed(error.to_string()),
        }
    }
}
