//! From events to acknowledged messages.

use std::future::IntoFuture as _;
use std::time::Duration;

use async_nats::jetstream::context::{PublishAckFuture, PublishErrorKind as Kind};
use async_nats::jetstream::message::PublishMessage;

use super::hub::now_ms;
use super::names::message_id;
use super::shared::{NatsError, Shared, is_in_process};
use super::{later, message, stream::Topic};
use crate::bus::{PublishError, PublishErrorKind, Published, TopicConfig};
use crate::cloudevent::Event;

/// Bytes of a message that are left for what a dead letter says besides: names of a topic, of its stream and of a
/// subscription. A letter that the servers do not take would wait for ever.
const LETTER: usize = 4 << 10;
/// Waits before an event is sent again that is being stored just now.
const AGAIN_MS: [u64; 6] = [10, 20, 50, 100, 200, 500];

/// A message that JetStream has yet to acknowledge.
pub(super) struct Sent {
    subject: String,
    message: PublishMessage,
    ack: PublishAckFuture,
}

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
        Box::pin(self.may_make_topic(name)).await?;
        let topic = self.topic(name, TopicConfig::undeclared(name)).await?;
        self.connected()?;
        let mut acks = Vec::with_capacity(events.len());
        for event in &events {
            let id = topic.dedup.then(|| message_id(event.source(), event.id()));
            acks.push(self.send(&topic, event, id, LETTER).await?);
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
        let ack = self.send(&topic, event, Some(id), 0).await?;
        self.acknowledged(name, ack).await
    }

    /// Sends one event, where the servers take one that is so much larger.
    pub(super) async fn send(
        &self,
        topic: &Topic,
        event: &Event,
        id: Option<String>,
        room: usize,
    ) -> Result<Sent, NatsError> {
        let (mut headers, data) = message::encode(event);
        let later = event.deliver_at_ms().filter(|at| topic.keeps_later && *at > now_ms());
        let waits = later.and_then(|at| later::schedule(&mut headers, &topic.subject, at));
        let subject = waits.unwrap_or_else(|| topic.subject.clone());
        let (size, most) = (message::size(&headers, &data), self.client.max_payload());
        if size.saturating_add(room) > most {
            return Err(NatsError::Refused(format!(
                "the event is larger than the servers' max_payload; see docs/nats.md: {size} bytes, and {room} are kept \
                 for what a dead letter says, of {most}"
            )));
        }
        let mut message = PublishMessage::build().headers(headers).payload(data);
        if let Some(id) = id {
            message = message.message_id(id);
        }
        let message = message.expected_stream(&topic.stream);
        let ack = self.send_message(subject.clone(), message.clone()).await?;
        Ok(Sent { subject, message, ack })
    }

    async fn send_message(
        &self,
        subject: String,
        message: PublishMessage,
    ) -> Result<PublishAckFuture, NatsError> {
        let sent = self.js.send_publish(subject, message).await;
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
        sent: Sent,
    ) -> Result<Published, NatsError> {
        let Sent { subject, message, ack } = sent;
        let mut ack = ack.into_future().await;
        for wait in AGAIN_MS {
            // The same event came a moment before, here or elsewhere: when that is done, this one is a duplicate.
            if !ack.as_ref().is_err_and(|error| is_in_process(error)) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(wait)).await;
            let again = self.send_message(subject.clone(), message.clone()).await?;
            ack = again.into_future().await;
        }
        let ack = ack.map_err(|error| {
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
        NatsError::TooMany(_) => PublishErrorKind::UnknownTopic,
        NatsError::Refused(_) => PublishErrorKind::Invalid,
        NatsError::Settings(_) | NatsError::Failed(_) => PublishErrorKind::Internal,
    };
    PublishError::new(kind, format!("bus {bus}, topic {topic}: {error}"))
}
