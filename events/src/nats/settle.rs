//! What a settled delivery needs written: an attempt spent, a dead letter stored, an acknowledgement confirmed.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Subject;
use async_nats::jetstream::AckKind;
use bytes::Bytes;
use tokio::time::sleep;

use super::hub::Done;
use super::shared::{NatsError, Shared};
use super::{message, names};
use crate::bus::{Settle, SubscriptionSpec, TopicConfig, dead_letter};
use crate::cloudevent::Event;

/// Wait after a dead letter could not be stored.
const AGAIN: Duration = Duration::from_secs(1);

/// One decision, and what it is about.
pub(super) struct Job {
    pub(super) shared: Arc<Shared>,
    pub(super) spec: SubscriptionSpec,
    pub(super) position: u64,
    /// The attempt that got the answer.
    pub(super) attempt: u32,
    pub(super) reply: Subject,
    /// When the consumer was made.
    pub(super) born: String,
}

impl Job {
    pub(super) async fn run(self, event: Event, outcome: Settle) -> Done {
        let position = self.position;
        match outcome {
            Settle::Ack => {
                self.acknowledge().await;
                Done::Handled { position }
            }
            Settle::Retry { delay } => {
                if let Err(error) = self.shared.spend(&self.spec.name, position, self.attempt).await
                {
                    tracing::warn!(subscription = self.spec.name, %error, "a spent attempt is not on record");
                }
                if self.spec.ordered {
                    return Done::Again { position, delay };
                }
                self.shared
                    .answer(
                        self.reply.clone(),
                        AckKind::Nak(Some(delay).filter(|delay| !delay.is_zero())),
                    )
                    .await;
                Done::Gone { position }
            }
            Settle::DeadLetter { reason, status } => {
                let (mut letter, mut reason) = (event, reason);
                while let Err(error) = self.bury(&letter, &reason, status).await {
                    tracing::warn!(subscription = self.spec.name, %error, "a dead letter waits");
                    if matches!(error, NatsError::Refused(_)) {
                        (letter, reason) = self.smaller(letter, &reason);
                    }
                    sleep(AGAIN).await;
                }
                self.acknowledge().await;
                Done::Handled { position }
            }
            Settle::Release { delay } => Done::Again { position, delay },
        }
    }

    /// With all that a dead letter says an event may be just larger than the servers take: those of publishers are not,
    /// those of other NATS clients may be.
    fn smaller(&self, letter: Event, reason: &str) -> (Event, String) {
        if !reason.is_empty() || letter.data().is_none_or(Bytes::is_empty) {
            return (letter, String::new());
        }
        let (position, topic) = (self.position, &self.spec.topic);
        let reason = format!(
            "its data is too large for a dead letter, and is at position {position} of {topic}"
        );
        (letter.with_data(Bytes::new()), reason)
    }

    async fn bury(&self, event: &Event, reason: &str, status: u32) -> Result<(), NatsError> {
        let verdict = dead_letter::Verdict {
            reason,
            status,
            topic: &self.spec.topic,
            subscription: &self.spec.name,
            attempts: self.attempt,
        };
        let letter = message::edit(event.clone(), |attributes| {
            attributes.extend(verdict.attributes().map(|(name, value)| (name.to_owned(), value)));
        });
        let letter =
            letter.map_err(|error| NatsError::Failed(format!("a dead letter: {error}")))?;
        // Storing it twice keeps one: the second comes when an acknowledgement was lost.
        let of = names::message_id(&self.spec.name, &self.born);
        let id = format!("dead-letter {of} {}", self.position);
        let topic = &self.spec.dead_letter_topic;
        self.shared.store(topic, TopicConfig::keep_all(), &letter, id).await?;
        self.shared.metrics.dead_letter(&self.spec.name);
        Ok(())
    }

    async fn acknowledge(&self) {
        if self.attempt > 1
            && let Err(error) = self.shared.forget_spent(&self.spec.name, self.position).await
        {
            tracing::debug!(subscription = self.spec.name, %error, "spent attempts stay on record");
        }
        if !self.spec.once {
            return self.shared.answer(self.reply.clone(), AckKind::Ack).await;
        }
        // JetStream confirms, so that no lost acknowledgement delivers it again.
        let confirmed = self.shared.client.request(self.reply.clone(), Bytes::from(AckKind::Ack));
        if let Err(error) = confirmed.await {
            tracing::debug!(subscription = self.spec.name, %error, "not confirmed");
            self.shared.answer(self.reply.clone(), AckKind::Ack).await;
        }
    }
}
