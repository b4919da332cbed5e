//! One durable pull consumer for each subscription, the record that says where it is, and the attempts spent.

use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, FromConsumer as _, pull};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::{ConsumerErrorKind, RawMessageErrorKind};
use serde::{Deserialize, Serialize};

use super::names::token;
use super::shared::{NatsError, Shared};
use super::stream::Topic;
use crate::bus::{Start, SubscriptionSpec, TopicConfig, dead_letter};

/// JetStream hands an event out again when it hears nothing for this long: what a dead control plane costs.
pub(super) const ACK_WAIT: Duration = Duration::from_secs(10);
/// Events handed out, or waiting for their next attempt, on all control planes together.
const MAX_ACK_PENDING: i64 = 10_000;
/// The same where order is kept: those are all held in memory.
pub(super) const MAX_ORDERED_PENDING: i64 = 2_000;

/// Events that are asked for how often they were tried, for an operator: each is a question of its own.
const MOST_LOOKED_AT: usize = 500;

/// What the bucket says of a subscription.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) topic: String,
    /// Empty in one that was written before this was part of it.
    #[serde(default)]
    dead_letter_topic: String,
    /// JetStream forgets the subscription when nobody consumes it for a while. `None` in a record that was written
    /// before this was part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<bool>,
    /// A resource declared it.
    #[serde(default)]
    declared: bool,
    /// The bus that it is of. Empty in one that was written before this was part of it.
    #[serde(default)]
    bus: String,
    /// Counts how often it was moved: what its deliveries carry as their generation.
    #[serde(default)]
    pub(super) epoch: u64,
    /// Where its consumer is to start, while it is being moved: it may have none for a moment, or until somebody finishes
    /// what was interrupted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) moving_to: Option<Start>,
}

/// A record, and which writing of it.
#[derive(Clone, Debug)]
pub(super) struct Recorded {
    pub(super) record: Record,
    pub(super) revision: u64,
}

impl Record {
    pub(super) fn dead_letter_topic(&self) -> String {
        match self.dead_letter_topic.as_str() {
            "" => format!("{}.dead-letter", self.topic),
            named => named.to_owned(),
        }
    }

    /// Whether a resource declared it for this bus. What it declared for another one is not this one's to forget.
    pub(super) fn is_declared_for(&self, bus: &str) -> bool {
        self.declared && (self.bus.is_empty() || self.bus == bus)
    }

    /// Whether it goes when its consumer is gone. One that does not expire waits for its consumer to be made anew.
    pub(super) fn may_expire(&self) -> bool {
        self.expires != Some(false)
    }
}

pub(super) type PullConsumer = consumer::Consumer<pull::Config>;

fn record_key(name: &str) -> String {
    format!("s.{}", token(name))
}

fn attempts_key(name: &str, position: u64) -> String {
    format!("a.{}.{position}", token(name))
}

impl Shared {
    pub(super) async fn record(&self, name: &str) -> Result<Option<Record>, NatsError> {
        let found = self.state().await?.get(record_key(name)).await;
        let found = found.map_err(|error| self.state_error("a subscription's record", &error))?;
        Ok(found.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Every record, by name.
    pub(super) async fn records(&self) -> Result<Vec<Recorded>, NatsError> {
        use futures::TryStreamExt as _;
        let store = self.state().await?;
        let keys = store.keys().await.map_err(|error| self.state_error("the records", &error))?;
        let keys: Vec<String> =
            keys.try_collect().await.map_err(|error| self.state_error("the records", &error))?;
        let mut records = Vec::new();
        for key in keys.into_iter().filter(|key| key.starts_with("s.")) {
            let found = store.entry(key).await;
            let found =
                found.map_err(|error| self.state_error("a subscription's record", &error))?;
            records.extend(found.and_then(|entry| {
                let record = serde_json::from_slice(&entry.value).ok()?;
                Some(Recorded { record, revision: entry.revision })
            }));
        }
        records.sort_by(|a, b| a.record.name.cmp(&b.record.name));
        Ok(records)
    }

    /// Makes what is missing of a subscription. One that exists keeps its place, unless a resource moves it.
    pub(super) async fn ensure(&self, spec: &SubscriptionSpec) -> Result<Topic, NatsError> {
        let record = self.record(&spec.name).await?;
        if let Some(why) = record.as_ref().and_then(|old| spec.cannot_leave(&old.topic)) {
            return Err(NatsError::Refused(why));
        }
        if let Some(old) = record.as_ref().filter(|old| old.topic != spec.topic) {
            self.delete_consumer(&old.topic, &old.name).await?;
        }
        let mut topic = self.topic(&spec.topic, TopicConfig::undeclared(&spec.topic)).await?;
        let mut found = self.consumer(&topic, &spec.name).await?;
        if found.is_none() {
            // Somebody may have removed the stream: making it anew makes the consumers of what is on record.
            topic = self.topic(&spec.topic, TopicConfig::undeclared(&spec.topic)).await?;
            found = self.consumer(&topic, &spec.name).await?;
        }
        match found {
            Some(consumer) => {
                Box::pin(self.reconfigure(&topic, consumer.cached_info(), spec)).await?;
            }
            None => {
                let moving = record.as_ref().filter(|record| record.topic == spec.topic);
                let start = moving.and_then(|record| record.moving_to).unwrap_or(spec.start);
                self.create(&topic, spec, start, None).await?;
            }
        }
        let wanted = Record {
            name: spec.name.clone(),
            topic: spec.topic.clone(),
            dead_letter_topic: spec.dead_letter_topic.clone(),
            expires: Some(spec.idle_expiry.is_some()),
            declared: record.as_ref().is_some_and(|record| record.declared),
            bus: self.name.clone(),
            epoch: record.as_ref().map_or(0, |record| record.epoch),
            moving_to: None,
        };
        if record.as_ref() != Some(&wanted) {
            if !spec.dead_letter_topic.ends_with(dead_letter::SUFFIX) {
                // Whoever reads it first would make it with the settings of other topics.
                Box::pin(self.keep_letters(&spec.dead_letter_topic, spec.declared)).await?;
            }
            self.put_record(&wanted).await?;
        }
        Ok(topic)
    }

    /// Notes that a resource declares a subscription, whoever made it.
    pub(super) async fn mark_declared(&self, name: &str) -> Result<(), NatsError> {
        match self.record(name).await? {
            Some(record) if !record.declared => {
                self.put_record(&Record { declared: true, ..record }).await
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) async fn put_record(&self, record: &Record) -> Result<(), NatsError> {
        let bytes = serde_json::to_vec(record).unwrap_or_default();
        let put = self.state().await?.put(record_key(&record.name), bytes.into()).await;
        put.map(drop).map_err(|error| self.state_error("a subscription's record", &error))
    }

    /// Makes the consumer; `old` is the one that it replaces.
    pub(super) async fn create(
        &self,
        topic: &Topic,
        spec: &SubscriptionSpec,
        start: Start,
        old: Option<&consumer::Info>,
    ) -> Result<(), NatsError> {
        let config = pull::Config {
            durable_name: Some(token(&spec.name)),
            description: Some(format!("Duet: subscription {}", spec.name)),
            deliver_policy: policy(self.within(topic, start).await?)?,
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_deliver: -1,
            max_ack_pending: max_ack_pending(spec),
            filter_subject: topic.subject.clone(),
            inactive_threshold: spec.idle_expiry.unwrap_or_default(),
            // As many as its stream has, also when that changes.
            num_replicas: 0,
            pause_until: old.filter(|old| old.paused).and_then(|old| old.config.pause_until),
            ..pull::Config::default()
        };
        let made = self.js.create_consumer_on_stream(config, topic.stream.clone()).await;
        made.map_err(|error| self.error("the subscription's consumer", &error))?;
        Ok(())
    }

    /// Brings the settings of a consumer to what is declared; its place stays.
    async fn reconfigure(
        &self,
        topic: &Topic,
        info: &consumer::Info,
        spec: &SubscriptionSpec,
    ) -> Result<(), NatsError> {
        let (pending, idle) = (max_ack_pending(spec), spec.idle_expiry.unwrap_or_default());
        let now = &info.config;
        if now.max_ack_pending == pending && now.inactive_threshold == idle && now.num_replicas == 0
        {
            return Ok(());
        }
        let config = pull::Config::try_from_consumer_config(now.clone());
        let mut config = config.map_err(|error| NatsError::Refused(error.to_string()))?;
        (config.max_ack_pending, config.inactive_threshold) = (pending, idle);
        config.num_replicas = 0;
        let made = self.js.create_consumer_on_stream(config, topic.stream.clone()).await;
        made.map_err(|error| self.error("the subscription's consumer", &error))?;
        Ok(())
    }

    /// A position beyond the end is the end: JetStream would leave out what comes until then.
    async fn within(&self, topic: &Topic, start: Start) -> Result<Start, NatsError> {
        let Start::Position(position) = start else { return Ok(start) };
        let stream = self.js.get_stream(&topic.stream).await;
        let stream = stream.map_err(|error| self.error("the topic's stream", &error))?;
        let end = stream.cached_info().state.last_sequence;
        Ok(if position > end { Start::Latest } else { start })
    }

    /// Makes the consumer anew, with the settings that it had and another start.
    pub(super) async fn recreate(
        &self,
        topic: &Topic,
        name: &str,
        old: Option<&consumer::Info>,
        start: Start,
    ) -> Result<(), NatsError> {
        let mut spec = SubscriptionSpec::new(name, &self.name, &topic.stream)
            .map_err(|error| NatsError::Refused(error.to_string()))?;
        if let Some(old) = old {
            spec.ordered = old.config.max_ack_pending == MAX_ORDERED_PENDING;
            let idle = old.config.inactive_threshold;
            spec.idle_expiry = Some(idle).filter(|idle| !idle.is_zero());
        }
        self.create(topic, &spec, start, old).await
    }

    /// The consumer of a subscription, where there is one.
    pub(super) async fn consumer(
        &self,
        topic: &Topic,
        name: &str,
    ) -> Result<Option<PullConsumer>, NatsError> {
        self.connected()?;
        let stream = self.js.get_stream_no_info(&topic.stream).await;
        let stream = stream.map_err(|error| self.error("the topic's stream", &error))?;
        if let Err(error) = stream.consumer_info(token(name)).await {
            return match error.kind() {
                ConsumerInfoErrorKind::NotFound => Ok(None),
                ConsumerInfoErrorKind::StreamNotFound => {
                    // Somebody removed it: whoever needs the topic next makes it anew.
                    self.topics.lock().retain(|_, known| known.stream != topic.stream);
                    Ok(None)
                }
                ConsumerInfoErrorKind::InvalidName
                | ConsumerInfoErrorKind::Offline
                | ConsumerInfoErrorKind::Request
                | ConsumerInfoErrorKind::JetStream(_)
                | ConsumerInfoErrorKind::TimedOut
                | ConsumerInfoErrorKind::NoResponders => {
                    Err(self.error("the subscription's consumer", &error))
                }
            };
        }
        let found = stream.get_consumer::<pull::Config>(&token(name)).await;
        found
            .map(Some)
            .map_err(|error| NatsError::Away(format!("the subscription's consumer: {error}")))
    }

    /// Forgets a consumer and the attempts spent. One that does not exist is fine.
    pub(super) async fn delete_consumer(&self, topic: &str, name: &str) -> Result<(), NatsError> {
        let deleted =
            self.js.delete_consumer_from_stream(token(name), self.stream_name(topic)).await;
        if let Err(error) = deleted
            && !matches!(error.kind(), ConsumerErrorKind::JetStream(error)
                if [10_014, 10_059].contains(&error.error_code().0))
        {
            return Err(self.error("the subscription's consumer", &error));
        }
        self.purge_state(&format!("a.{}.>", token(name))).await
    }

    pub(super) async fn forget(&self, name: &str) -> Result<(), NatsError> {
        if let Some(record) = self.record(name).await? {
            self.delete_consumer(&record.topic, name).await?;
            self.purge_state(&record_key(name)).await?;
        }
        Ok(())
    }

    /// Forgets what is left of a subscription whose consumer JetStream forgot, unless it was written again since.
    pub(super) async fn forget_expired(&self, gone: &Recorded) -> Result<(), NatsError> {
        let Record { name, topic, .. } = &gone.record;
        let topic = self.topic(topic, TopicConfig::undeclared(topic)).await?;
        if self.consumer(&topic, name).await?.is_some() {
            return Ok(());
        }
        self.purge_state(&format!("a.{}.>", token(name))).await?;
        let store = self.state().await?;
        let filter = format!("$KV.{}.{}", store.name, record_key(name));
        let purged = store.stream.purge().sequence(gone.revision.saturating_add(1)).filter(filter);
        purged.await.map(drop).map_err(|error| self.state_error("the bucket of state", &error))
    }

    /// Attempts spent on an event.
    pub(super) async fn spent(&self, name: &str, position: u64) -> Result<u32, NatsError> {
        let found = self.state().await?.get(attempts_key(name, position)).await;
        let found = found.map_err(|error| self.state_error("spent attempts", &error))?;
        let text = found.as_deref().and_then(|bytes| std::str::from_utf8(bytes).ok());
        Ok(text.and_then(|text| text.parse().ok()).unwrap_or(0))
    }

    /// Most attempts spent on one event that is not handled, as far as that many are looked at.
    pub(super) async fn most_spent(&self, name: &str) -> Result<u32, NatsError> {
        let store = self.state().await?;
        let filter = format!("$KV.{}.a.{}.>", store.name, token(name));
        let (mut most, mut next) = (0, 1);
        for _ in 0..MOST_LOOKED_AT {
            let question = store.stream.raw_message_builder().sequence(next);
            let found = match question.next_by_subject(filter.clone()).send().await {
                Ok(found) => found,
                Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => break,
                Err(error) => return Err(self.state_error("spent attempts", &error)),
            };
            next = found.sequence.saturating_add(1);
            let text = std::str::from_utf8(&found.payload).ok();
            most = most.max(text.and_then(|text| text.parse().ok()).unwrap_or(0));
        }
        Ok(most)
    }

    pub(super) async fn spend(
        &self,
        name: &str,
        position: u64,
        spent: u32,
    ) -> Result<(), NatsError> {
        let put = self.state().await?;
        let put = put.put(attempts_key(name, position), spent.to_string().into()).await;
        put.map(drop).map_err(|error| self.state_error("spent attempts", &error))
    }

    /// Removes what is remembered of an event.
    pub(super) async fn forget_spent(&self, name: &str, position: u64) -> Result<(), NatsError> {
        self.purge_state(&attempts_key(name, position)).await
    }

    async fn purge_state(&self, key: &str) -> Result<(), NatsError> {
        let store = self.state().await?;
        // Not the bucket's own purge: that leaves a mark for each key for ever.
        let filter = format!("$KV.{}.{key}", store.name);
        let purged = store.stream.purge().filter(filter).await;
        purged.map(drop).map_err(|error| self.state_error("the bucket of state", &error))
    }
}

fn max_ack_pending(spec: &SubscriptionSpec) -> i64 {
    if spec.ordered { MAX_ORDERED_PENDING } else { MAX_ACK_PENDING }
}

fn policy(start: Start) -> Result<DeliverPolicy, NatsError> {
    Ok(match start {
        Start::Latest => DeliverPolicy::New,
        Start::Earliest => DeliverPolicy::All,
        Start::Position(position) => {
            DeliverPolicy::ByStartSequence { start_sequence: position.max(1) }
        }
        Start::Time(ms) => {
            let ms = i64::try_from(ms).unwrap_or(i64::MAX);
            let time = jiff::Timestamp::from_millisecond(ms)
                .map_err(|error| NatsError::Refused(format!("start: {error}")))?;
            let start_time = async_nats::datetime::parse_rfc3339(&time.to_string());
            let start_time =
                start_time.map_err(|error| NatsError::Refused(format!("start: {error}")))?;
            DeliverPolicy::ByStartTime { start_time }
        }
    })
}
