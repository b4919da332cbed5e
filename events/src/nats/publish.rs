//! From events to acknowledged messages.

use std::future::IntoFuture as _;

use async_nats::jetstream::context::{PublishAckFuture, PublishErrorKind as Kind};
use async_nats::jetstream::message::PublishMessage;

use super::hub::now_ms;
use super::names::message_id;
use super::shared::{NatsError, Shared};
use super::{later, message, stream::Topic};
use crate::bus::{PublishError, PublishErrorKind, Published, TopicConfig};
use crate::cloudevent::Event;

impl Shared {
    /// Sends all events, then waits for JetStream to acknowledge each. Not atomic: where it fails half-way, publishing
    /// the same again stores what is missing.
    pub(super) async fn publish(
        &self,
        order: &tokio::sync::Mutex<()>,
        name: &str,
        events: Vec<Event>,
    ) -> Result<Vec<Published>, NatsError> {
        // Taken in the order of the calls, so that events are sent in that order, also while a stream is made.
        let turn = order.lock().await;
        let topic = self.topic(name, TopicConfig::undeclared(name)).await?;
        self.connected()?;
        let mut acks = Vec::with_capacity(events.len());
        for event in &events {
            let id = topic.dedup.then(|| message_id(event.source(), event.id()));
            acks.push(self.send(&topic, event, id).await?);
        }
        drop(turn);
        let mut published = Vec::with_capacity(acks.len());
        for ack in acks {
            published.push(self.acknowledged(name, ack).await?);
        }
        let duplicates = published.iter().filter(|published| published.duplicate).count();
        let stored = published.len() - duplicates;
        self.metrics.published(name, stored as u64, duplicates as u64);
        Ok(published)
    }

    /// Stores one event under an identity of its own.
    pub(super) async fn store(
        &self,
        name: &str,
        default: TopicConfig,
        event: &Event,
        id: String,
    ) -> Result<Published, NatsError> {
        let topic = self.topic(name, default).await?;
        self.connected()?;
        let ack = self.send(&topic, event, Some(id)).await?;
        self.acknowledged(name, ack).await
    }

    pub(super) async fn send(
        &self,
        topic: &Topic,
        event: &Event,
        id: Option<String>,
    ) -> Result<PublishAckFuture, NatsError> {
        let (mut headers, data) = message::encode(event);
        let later = event.deliver_at_ms().filter(|at| topic.keeps_later && *at > now_ms());
        let waits = later.and_then(|at| later::schedule(&mut headers, &topic.subject, at));
        let subject = waits.unwrap_or_else(|| topic.subject.clone());
        let mut publish = PublishMessage::build().headers(headers).payload(data);
        if let Some(id) = id {
            publish = publish.message_id(id);
        }
        let publish = publish.expected_stream(&topic.stream);
        let sent = self.js.send_publish(subject, publish).await;
        sent.map_err(|error| {
            let kind = error.kind();
            if kind == Kind::MaxPayloadExceeded {
                let text = "the event is larger than the servers' max_payload; see docs/nats.md";
                return NatsError::Refused(format!("{text}: {error}"));
            }
            if kind == Kind::MaxAckPending {
                return NatsError::Full("too many publishes are open".to_owned());
            }
            self.error("publish", &error)
        })
    }

    pub(super) async fn acknowledged(
        &self,
        topic: &str,
        ack: PublishAckFuture,
    ) -> Result<Published, NatsError> {
        let ack = ack.into_future().await.map_err(|error| {
            let kind = error.kind();
            if kind == Kind::StreamNotFound {
                // Somebody removed it: it is made anew by the next publish.
                self.topics.lock().remove(topic);
            }
            if [Kind::StreamNotFound, Kind::TimedOut, Kind::BrokenPipe].contains(&kind) {
                return NatsError::Away(format!("publish: {error}"));
            }
            self.error("publish", &error)
        })?;
        Ok(Published { position: ack.sequence, duplicate: ack.duplicate })
    }
}

/// What a publisher is told.
pub(super) fn publish_error(bus: &str, topic: &str, error: &NatsError) -> PublishError {
    let kind = match error {
        NatsError::Away(_) | NatsError::Closed => PublishErrorKind::Unavailable,
        NatsError::Full(_) => PublishErrorKind::Full,
        NatsError::Refused(_) => PublishErrorKind::Invalid,
        NatsError::Settings(_) | NatsError::Failed(_) => PublishErrorKind::Internal,
    };
    PublishError::new(kind, format!("bus {bus}, topic {topic}: {error}"))
}
