//! Whether the subscription is still where the hub knows it to be. Somebody may move it, here or by way of another
//! control plane: then its consumer is made anew under the same name, and hands out again what was handled before.
//! Nothing tells a hub that has no question open. Yet a consumer counts what it hands out, so that one that was made
//! anew, or has handed out what is known here, is in doubt until JetStream was asked when it was made.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{AckKind, Message};
use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::super::shared::NatsError;
use super::super::subscription::ACK_WAIT;
use super::{Barrier, Done, Hub};

/// Bound on waiting for what is on the way to a question that is taken back, and for the word that what is given back
/// has arrived.
const LATE: Duration = Duration::from_secs(2);

/// Messages in doubt, in the order in which they came.
#[derive(Default)]
pub(super) struct Doubt {
    asking: bool,
    /// Those that came after JetStream was asked.
    waiting: Vec<Message>,
}

impl Hub {
    /// Finds the consumer. Where it is another one than before, everything held is void. Returns whether it is.
    pub(super) async fn find(&mut self) -> Result<bool, NatsError> {
        let mut found = self.shared.consumer(&self.topic, &self.spec.name).await?;
        if found.is_none() && self.shared.is_lost(&self.spec.name).await? {
            self.topic = Box::pin(self.shared.ensure(&self.spec)).await?;
            found = self.shared.consumer(&self.topic, &self.spec.name).await?;
        }
        let Some(consumer) = found else {
            self.over = Some("the subscription was removed".to_owned());
            return Ok(false);
        };
        let info = consumer.cached_info();
        let born = info.created.to_string();
        let renewed = !self.born.is_empty() && self.born != born;
        // After the consumer: one that was made anew has its record before.
        let record = Box::pin(self.shared.record(&self.spec.name)).await?;
        if renewed {
            self.void();
        }
        self.born = born;
        self.generation = record.map_or(0, |record| record.epoch);
        self.paused = info.paused;
        if self.spec.ordered && info.num_ack_pending > self.hands.len() {
            self.barrier = Some(Barrier { until: Instant::now() + ACK_WAIT * 2, asking: false });
        }
        self.consumer = Some(consumer);
        Ok(renewed)
    }

    fn void(&mut self) {
        self.turn += 1;
        self.hands.clear();
        self.handled = Default::default();
        self.newest = 0;
        self.barrier = None;
    }

    /// Looks whether somebody moved the subscription, or paused it.
    pub(super) async fn look_again(&mut self) {
        let newest = self.newest;
        self.rest_until = Instant::now();
        match self.find().await {
            Ok(true) => {
                // A question that the old consumer had ends with it, sooner or later. The new one may have answered.
                for message in self.end_question().await {
                    if message.info().is_ok_and(|info| info.consumer_sequence <= newest) {
                        self.take(message).await;
                    }
                }
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(subscription = self.spec.name, %error, "cannot look");
                (self.question, self.consumer) = (None, None);
            }
        }
    }

    /// Takes a message in, unless it is in doubt.
    pub(super) async fn take(&mut self, message: Message) {
        self.ask_pending();
        let Ok(info) = message.info() else { return };
        if self.doubt.asking {
            // In their order.
            self.doubt.waiting.push(message);
        } else if self.in_doubt(&message) {
            self.ask_born(vec![message]);
        } else {
            self.newest = info.consumer_sequence;
            self.accept(message).await;
        }
    }

    fn in_doubt(&self, message: &Message) -> bool {
        message.info().is_ok_and(|info| {
            let position = info.stream_sequence;
            info.consumer_sequence <= self.newest
                || self.handled.1.contains(&position)
                || self.hands.get(position).is_some()
        })
    }

    /// Asks when the consumer was made that these come from.
    fn ask_born(&mut self, messages: Vec<Message>) {
        self.doubt.asking = true;
        let (shared, topic) = (Arc::clone(&self.shared), self.topic.clone());
        let name = self.spec.name.clone();
        self.work(async move {
            let consumer = shared.consumer(&topic, &name).await.ok().flatten();
            let born = consumer.map(|consumer| consumer.cached_info().created.to_string());
            Done::Born { born, messages }
        });
    }

    /// Takes in what was in doubt. What nobody can tell of is handed out again.
    pub(super) async fn no_doubt(&mut self, born: Option<String>, messages: Vec<Message>) {
        self.doubt.asking = false;
        let waiting = std::mem::take(&mut self.doubt.waiting);
        let Some(born) = born else {
            // Nor may what came since overtake them.
            (self.question, self.consumer) = (None, None);
            return;
        };
        if born != self.born
            && let Err(error) = self.find().await
        {
            tracing::debug!(subscription = self.spec.name, %error, "cannot look");
            self.consumer = None;
        }
        if born == self.born {
            for message in messages {
                // Not the larger one: a new leader may count on from what it had heard of.
                self.newest = message.info().map_or(0, |info| info.consumer_sequence);
                self.accept(message).await;
            }
        }
        let mut waiting = waiting.into_iter();
        while let Some(message) = waiting.next() {
            if self.in_doubt(&message) {
                // They are all here before JetStream is asked, so one answer is enough.
                self.ask_born(std::iter::once(message).chain(waiting).collect());
                return;
            }
            self.take(message).await;
        }
    }

    /// Takes the open question back, and returns what was answered to it meanwhile: JetStream must not send to nobody
    /// what is given back next.
    pub(super) async fn end_question(&mut self) -> Vec<Message> {
        let Some(question) = self.question.take() else { return Vec::new() };
        if !self.shared.connected_now() {
            return Vec::new();
        }
        question.end(LATE).await
    }

    /// Gives everything back that is held or comes late, in order, and waits until JetStream has it: it would answer the
    /// next question before otherwise, with what is newer.
    pub(super) async fn give_back(&mut self, late: Vec<Message>) {
        let held = self.hands.take().into_iter().map(|(position, held)| (position, held.reply));
        let mut all: std::collections::BTreeMap<u64, _> = held.collect();
        let doubted = std::mem::take(&mut self.doubt.waiting);
        for message in doubted.into_iter().chain(late) {
            if let (Ok(info), Some(reply)) = (message.info(), message.reply.clone()) {
                all.insert(info.stream_sequence, reply);
            }
        }
        let last = if self.shared.connected_now() { all.pop_last() } else { None };
        for reply in all.into_values() {
            self.shared.answer(reply, AckKind::Nak(None)).await;
        }
        // They are taken in one after the other, so the word on the last one is enough.
        if let Some((_, reply)) = last {
            let word = self.shared.client.request(reply, Bytes::from(AckKind::Nak(None)));
            if !matches!(timeout(LATE, word).await, Ok(Ok(_))) {
                tracing::debug!(subscription = self.spec.name, "no word on what was given back");
            }
        }
    }
}
