//! How a subscription is, and what is in a topic, as JetStream tells it.

use std::time::Duration;

use async_nats::jetstream::consumer;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{self, RawMessageErrorKind};
use futures::TryStreamExt as _;

use super::hub::now_ms;
use super::message;
use super::record::Record;
use super::shared::{NatsError, Shared};
use super::stream::{is_declared_for, topic_of};
use crate::bus::{
    FirstWaiting, ManageError, StoredEvent, SubscriptionStatus, TopicConfig, TopicStatus,
};

/// Bytes of one reading, so that a piece of a topic fits into memory.
const READ_BYTES: usize = 16 << 20;

/// How long somebody who has events in hand may take for one, to be seen from elsewhere.
const BUSY: Duration = Duration::from_secs(60);

impl Shared {
    /// A subscription without the count of attempts, and of consumers only whether anybody anywhere seems to consume it;
    /// and when its consumer was made. `None` for one whose consumer is gone: it was idle for too long.
    pub(super) async fn status(
        &self,
        record: Record,
    ) -> Result<Option<(SubscriptionStatus, String)>, NatsError> {
        let topic = self.topic(&record.topic, TopicConfig::undeclared(&record.topic)).await?;
        let Some(consumer) = self.consumer(&topic, &record.name).await? else {
            return Ok(None);
        };
        let info = consumer.cached_info();
        let in_flight = info.num_ack_pending as u64;
        let lag = info.num_pending.saturating_add(in_flight);
        let mut first = None;
        if lag > 0 {
            let stream = self.js.get_stream(&topic.stream).await;
            let stream = stream.map_err(|error| self.error("the topic's stream", &error))?;
            let floor = info.ack_floor.stream_sequence.saturating_add(1);
            let oldest = self.message(&stream, &record.topic, floor).await?;
            first = oldest.map(|oldest| FirstWaiting {
                position: oldest.sequence,
                published_ms: millis(oldest.time),
            });
        }
        let born = info.created.to_string();
        let status = SubscriptionStatus {
            lag,
            scheduled: None,
            oldest_ms: first.map(|first| first.published_ms),
            first,
            in_flight,
            retrying: info.num_redelivered as u64,
            attempts: 0,
            consumers: u64::from(is_consumed(info)),
            paused: info.paused,
            declared: record.is_declared_for(&self.name),
            idle_expiry: Some(info.config.inactive_threshold).filter(|idle| !idle.is_zero()),
            dead_letter_topic: record.dead_letter_topic(),
            name: record.name,
            topic: record.topic,
        };
        Ok(Some((status, born)))
    }

    /// All topics, by name.
    pub(super) async fn topic_statuses(&self) -> Result<Vec<TopicStatus>, ManageError> {
        self.connected()?;
        let streams = self.js.streams().try_collect().await;
        let streams: Vec<stream::Info> =
            streams.map_err(|error| self.error("the streams", &error))?;
        let ours = |info: &stream::Info| {
            let topic = topic_of(&info.config)?;
            (info.config.name == self.stream_name(topic)).then(|| TopicStatus {
                name: topic.to_owned(),
                first: info.state.first_sequence.max(1),
                next: info.state.last_sequence.saturating_add(1),
                events: info.state.messages,
                bytes: info.state.bytes,
                declared: is_declared_for(&self.name, &info.config),
            })
        };
        let mut topics: Vec<_> = streams.iter().filter_map(ours).collect();
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(topics)
    }

    /// Events of a topic from a position on, oldest first.
    pub(super) async fn read(
        &self,
        topic: &str,
        from: u64,
        limit: usize,
    ) -> Result<Vec<StoredEvent>, ManageError> {
        let stream = self.stream(topic).await?;
        let (mut events, mut bytes) = (Vec::new(), 0);
        let mut next = from.max(1);
        while events.len() < limit
            && bytes < READ_BYTES
            && let Some(found) = self.message(&stream, topic, next).await?
        {
            let position = found.sequence;
            next = position.saturating_add(1);
            bytes += found.payload.len();
            let read =
                message::event(&found.subject, position, Some(&found.headers), found.payload);
            if let Ok(event) = read {
                let published_ms = millis(found.time);
                events.push(StoredEvent { position, published_ms, event });
            }
        }
        Ok(events)
    }

    /// The stream of a topic.
    pub(super) async fn stream(&self, topic: &str) -> Result<stream::Stream, ManageError> {
        self.connected()?;
        let stream = self.js.get_stream(self.stream_name(topic)).await;
        stream.map_err(|error| {
            let error = self.error("the topic's stream", &error);
            if matches!(error, NatsError::Failed(_)) {
                return ManageError::Unknown { kind: "topic", name: topic.to_owned() };
            }
            error.into()
        })
    }

    /// The first event of a topic at or after a position.
    pub(super) async fn message(
        &self,
        stream: &stream::Stream,
        topic: &str,
        from: u64,
    ) -> Result<Option<StreamMessage>, NatsError> {
        let question = stream.raw_message_builder().sequence(from);
        match question.next_by_subject(self.subject(topic)).send().await {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(self.error("an event", &error)),
        }
    }
}

/// Whether somebody has a question open, or got or handled something just now: whoever has as much in hand as it wants
/// asks for nothing. What a dead control plane had in hand stays so until somebody asks for it.
fn is_consumed(info: &consumer::Info) -> bool {
    let last = [info.delivered.last_active, info.ack_floor.last_active];
    let busy = last.into_iter().flatten().any(|at| {
        let quiet = now_ms().saturating_sub(millis(at));
        u128::from(quiet) < BUSY.as_millis()
    });
    info.num_waiting > 0 || (info.num_ack_pending > 0 && busy)
}

/// Milliseconds since the epoch.
pub(super) fn millis(time: async_nats::datetime::DateTime) -> u64 {
    u64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}
