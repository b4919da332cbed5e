//! One durable pull consumer for each subscription.

use std::time::Duration;

use async_nats::datetime::DateTime;
use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, FromConsumer as _, pull};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::ConsumerErrorKind;

use super::names::token;
use super::record::{Overtaken, Record};
use super::shared::{NatsError, Shared};
use super::stream::Topic;
use crate::bus::{Start, SubscriptionSpec, TopicConfig, dead_letter};

/// JetStream hands an event out again when it hears nothing for this long: what a dead control plane costs.
pub(super) const ACK_WAIT: Duration = Duration::from_secs(10);
/// Events handed out, or waiting for their next attempt, on all control planes together.
const MAX_ACK_PENDING: i64 = 10_000;
/// The same where order is kept: those are all held in memory.
pub(super) const MAX_ORDERED_PENDING: i64 = 2_000;

pub(super) type PullConsumer = consumer::Consumer<pull::Config>;

impl Shared {
    /// Makes what is missing of a subscription. One that exists keeps its place, unless a resource moves it.
    pub(super) async fn ensure(&self, spec: &SubscriptionSpec) -> Result<Topic, NatsError> {
        let mut overtaken = Overtaken::default();
        loop {
            if let Some(topic) = Box::pin(self.try_ensure(spec)).await? {
                return Ok(topic);
            }
            tracing::debug!(subscription = spec.name, "its record was changed meanwhile");
            overtaken.again().await?;
        }
    }

    /// `None` where somebody changed the record meanwhile: what it says now counts.
    async fn try_ensure(&self, spec: &SubscriptionSpec) -> Result<Option<Topic>, NatsError> {
        let (mut record, mut revision) = self.read_record(&spec.name).await?;
        if let Some(why) = record.as_ref().and_then(|old| spec.cannot_leave(&old.topic)) {
            return Err(NatsError::Refused(why));
        }
        if let Some(lost) = self.lost(spec, record.as_ref()) {
            // Before its consumer, so that nothing is delivered as of an earlier generation.
            let Some(put) = self.put_record(&lost, revision).await? else { return Ok(None) };
            (record, revision) = (Some(lost), put);
            tracing::error!(
                bus = self.name,
                subscription = spec.name,
                "the NATS cluster had lost the subscription; it starts anew with all that its topic has"
            );
            self.metrics.remade("subscription");
        } else if record.is_none() && !spec.declared {
            Box::pin(self.may_subscribe(spec)).await?;
        }
        if let Some(old) = record.as_ref().filter(|old| old.topic != spec.topic) {
            self.delete_consumer(&old.topic, &old.name).await?;
        }
        let topic = Box::pin(self.ensure_consumer(spec, record.as_ref())).await?;
        let wanted = Record::new(spec, &self.name, record.as_ref());
        if record.as_ref() != Some(&wanted) {
            if !spec.dead_letter_topic.ends_with(dead_letter::SUFFIX) {
                // Whoever reads it first would make it with the settings of other topics.
                Box::pin(self.keep_letters(&spec.dead_letter_topic, spec.declared)).await?;
            }
            if self.put_record(&wanted, revision).await?.is_none() {
                return Ok(None);
            }
        }
        if spec.declared {
            self.wanted.lock().subscribe(spec);
        }
        Ok(Some(topic))
    }

    async fn ensure_consumer(
        &self,
        spec: &SubscriptionSpec,
        record: Option<&Record>,
    ) -> Result<Topic, NatsError> {
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
                let record = record.filter(|record| record.topic == spec.topic);
                self.create(&topic, spec, start(record, spec), None).await?;
            }
        }
        Ok(topic)
    }

    /// The record that a subscription should have, where the servers have lost it.
    fn lost(&self, spec: &SubscriptionSpec, found: Option<&Record>) -> Option<Record> {
        let wanted = self.wanted.lock();
        let known = wanted.subscription(&spec.name).filter(|_| found.is_none())?;
        Some(Record::lost(known, &self.name))
    }

    /// Makes the consumer; `old` is the one that it replaces.
    pub(super) async fn create(
        &self,
        topic: &Topic,
        spec: &SubscriptionSpec,
        start: Start,
        old: Option<&consumer::Info>,
    ) -> Result<(), NatsError> {
        let rests = old.map_or_else(|| self.wanted.lock().is_paused(&spec.name), |old| old.paused);
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
            pause_until: if rests { Some(paused_until()?) } else { None },
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
}

/// Where a consumer is made that is not there. One that is on record and does not expire was removed by somebody, or lost:
/// it misses nothing.
fn start(record: Option<&Record>, spec: &SubscriptionSpec) -> Start {
    match record {
        None => spec.start,
        Some(Record { moving_to: Some(to), .. }) => *to,
        Some(record) if record.is_kept() => Start::Earliest,
        Some(_) => spec.start,
    }
}

/// Until when a subscription rests, unless it is resumed.
pub(super) fn paused_until() -> Result<DateTime, NatsError> {
    let until = async_nats::datetime::parse_rfc3339("2200-01-01T00:00:00Z");
    until.map_err(|error| NatsError::Refused(format!("pause: {error}")))
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
