//! How a subscription is, and what is in a topic, as JetStream tells it.

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{self, RawMessageErrorKind};

use super::shared::{NatsError, Shared};
use super::subscription::Record;
use crate::bus::{ManageError, SubscriptionStatus, TopicConfig};

impl Shared {
    /// A subscription without the count of its consumers and of attempts. `None` for one whose consumer is gone: it was idle
    /// for too long.
    pub(super) async fn status(
        &self,
        record: Record,
    ) -> Result<Option<SubscriptionStatus>, NatsError> {
        let topic = self.topic(&record.topic, TopicConfig::default()).await?;
        let Some(consumer) = self.consumer(&topic, &record.name).await? else {
            return Ok(None);
        };
        let info = consumer.cached_info();
        let in_flight = info.num_ack_pending as u64;
        let lag = info.num_pending.saturating_add(in_flight);
        let mut oldest_ms = None;
        if lag > 0 {
            let stream = self.js.get_stream(&topic.stream).await;
            let stream = stream.map_err(|error| self.error("the topic's stream", &error))?;
            let floor = info.ack_floor.stream_sequence.saturating_add(1);
            let oldest = self.message(&stream, &record.topic, floor).await?;
            oldest_ms = oldest.map(|oldest| millis(oldest.time));
        }
        Ok(Some(SubscriptionStatus {
            lag,
            oldest_ms,
            in_flight,
            retrying: info.num_redelivered as u64,
            attempts: 0,
            consumers: 0,
            paused: info.paused,
            declared: record.declared,
            idle_expiry: Some(info.config.inactive_threshold).filter(|idle| !idle.is_zero()),
            dead_letter_topic: record.dead_letter_topic(),
            name: record.name,
            topic: record.topic,
        }))
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

/// Milliseconds since the epoch.
pub(super) fn millis(time: async_nats::datetime::DateTime) -> u64 {
    u64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}
