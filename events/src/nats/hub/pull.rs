//! What a hub takes from JetStream: how much it asks for, and what it makes of each message.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Subject;
use async_nats::jetstream::{AckKind, Message};
use tokio::time::{Instant, sleep, timeout};

use super::super::held::{Held, Stage};
use super::super::message;
use super::super::shared::NatsError;
use super::super::subscription::{ACK_WAIT, MAX_ORDERED_PENDING};
use super::question::{Question, Room};
use super::{Done, HEARTBEAT, Hub, PAUSE, now_ms};
use crate::bus::{Settle, dead_letter};
use crate::cloudevent::Event;

/// Events of one pull.
const MAX_PULL: usize = 500;
/// Bytes of events with which a consumer has its hands full, however few they are: as many as on the embedded bus.
const FULL_HANDS: usize = 16 << 20;
/// How often an ordered hub asks whether it has everything that was handed out before it.
const ASK: Duration = Duration::from_millis(200);
/// How long what came later waits for an event that came again, until the attempts that were spent on it are known.
const KEEPS_ITS_PLACE: Duration = Duration::from_secs(1);

impl Hub {
    /// When the next pull may be made, where one is to be made.
    pub(super) fn pull_at(&self) -> Option<Instant> {
        (self.question.is_none() && self.room().is_some()).then_some(self.rest_until)
    }

    /// What there is room for.
    fn room(&self) -> Option<Room> {
        let members = self.members.values().filter(|member| member.credit > 0);
        let (credit, count) = members.fold((0_usize, 0), |(credit, count), member| {
            (credit.saturating_add(member.credit), count + 1)
        });
        let full = FULL_HANDS.saturating_mul(count);
        let events = if credit == 0 { 0 } else { self.events(credit) };
        let bytes = self.bytes(full).filter(|bytes| *bytes > 0)?;
        let room = match self.any_size {
            true => Room { events: events.min(1), bytes: None },
            false => Room { events: events.min(MAX_PULL), bytes: Some(bytes) },
        };
        Some(room).filter(|room| room.events > 0)
    }

    /// How many events more may be in hand.
    fn events(&self, credit: usize) -> usize {
        let pending = usize::try_from(MAX_ORDERED_PENDING).unwrap_or_default();
        let window = match (self.spec.ordered, &self.barrier) {
            (true, Some(_)) => pending,
            (true, None) => {
                let usual = credit.saturating_mul(4).clamp(64, pending);
                // Later events of keys that wait must not keep the others away.
                let stuck = self.hands.len() >= usual && self.hands.next().is_none();
                if stuck { pending } else { usual }
            }
            (false, _) => credit,
        };
        window.saturating_sub(self.hands.len())
    }

    /// How many bytes more may be in hand. One event may be larger than that.
    fn bytes(&self, full: usize) -> Option<usize> {
        let (held, most) = (self.hands.bytes(), full.saturating_mul(4));
        let window = match &self.barrier {
            // From `ACK_WAIT` on, what others had comes before anything new.
            Some(barrier) if Instant::now() + ACK_WAIT >= barrier.until => most,
            None if self.spec.ordered && held >= full && self.hands.next().is_none() => {
                // As above.
                let waits = held.saturating_sub(self.hands.bytes_out());
                full.saturating_add(waits).min(most)
            }
            Some(_) | None => full,
        };
        window.checked_sub(held)
    }

    /// Asks for as many events as there is room for, where no question is open.
    pub(super) async fn pull(&mut self) {
        // Also while a question is open: what another process had may be handled there, and then nothing comes.
        self.ask_pending();
        if self.question.is_some() || Instant::now() < self.rest_until {
            return;
        }
        let Some(room) = self.room() else { return };
        if let Err(error) = self.try_pull(room).await {
            tracing::debug!(subscription = self.spec.name, %error, "cannot pull");
            self.consumer = None;
            self.rest_until = Instant::now() + PAUSE;
        }
    }

    async fn try_pull(&mut self, room: Room) -> Result<(), NatsError> {
        self.shared.connected()?;
        if self.consumer.is_none() {
            self.find().await?;
        }
        self.ask_pending();
        let Some(consumer) = &self.consumer else { return Ok(()) };
        self.question = Some(Question::ask(&self.shared, consumer, room).await?);
        Ok(())
    }

    pub(super) fn ask_pending(&mut self) {
        let Some(barrier) = self.barrier.as_mut().filter(|barrier| !barrier.asking) else { return };
        barrier.asking = true;
        let (shared, topic) = (Arc::clone(&self.shared), self.topic.clone());
        let name = self.spec.name.clone();
        self.work(async move {
            sleep(ASK).await;
            let consumer = shared.consumer(&topic, &name).await.ok().flatten();
            Done::Pending(consumer.map(|consumer| consumer.cached_info().num_ack_pending))
        });
    }

    pub(super) async fn pulled(&mut self, pulled: Option<Result<Message, String>>) {
        match pulled {
            Some(Ok(message)) => self.take(message).await,
            Some(Err(error)) => {
                tracing::debug!(subscription = self.spec.name, %error, "the pull failed");
                self.question = None;
                self.consumer = None;
                self.rest_until = Instant::now() + PAUSE;
            }
            None => {
                let question = self.question.take();
                // Then one that is larger than all the room there is comes alone.
                self.any_size = question.is_some_and(|question| question.was_too_small());
            }
        }
    }

    /// Takes in a message of the consumer that the hub knows.
    pub(super) async fn accept(&mut self, message: Message) {
        let Ok(info) = message.info() else { return };
        let (position, delivered) = (info.stream_sequence, info.delivered);
        let Some(reply) = message.reply.clone() else { return };
        if self.handled.1.contains(&position) {
            self.shared.answer(reply, AckKind::Ack).await;
            return;
        }
        if let Some(held) = self.hands.get_mut(position) {
            // Handed out again while we were away: it is in good hands.
            (held.reply, held.heard) = (reply, Instant::now());
            return;
        }
        let (subject, payload) = (message.subject.clone(), message.payload.clone());
        let event = message::event(&subject, position, message.headers.as_ref(), payload.clone());
        match event {
            Ok(event) => self.take_event(position, delivered, reply, event).await,
            Err(error) => {
                self.shared.metrics.unreadable.inc();
                if let Ok(event) = message::foreign(&subject, position, payload) {
                    self.hold(position, reply, event, Stage::Out(0));
                    let reason = format!("not a valid event: {error}");
                    self.settle(position, Settle::DeadLetter { reason, status: 0 }).await;
                }
            }
        }
    }

    async fn take_event(
        &mut self,
        position: u64,
        delivered: i64,
        reply: Subject,
        mut event: Event,
    ) {
        if let Some(only) = dead_letter::redriven_to(&event).map(str::to_owned) {
            if only != self.spec.name {
                self.shared.answer(reply, AckKind::Ack).await;
                return;
            }
            let stripped = message::edit(event.clone(), |attributes| {
                attributes.remove(dead_letter::REDRIVE_TO);
            });
            event = stripped.unwrap_or(event);
        }
        let wait = event.deliver_at_ms().unwrap_or(0).saturating_sub(now_ms());
        if wait > 0 {
            // The server does not keep it until then, or its clock is ahead of ours.
            self.shared.answer(reply, AckKind::Nak(Some(Duration::from_millis(wait)))).await;
            return;
        }
        if delivered <= 1 {
            self.hold(position, reply, event, Stage::Ready);
            return;
        }
        self.hold(position, reply, event, Stage::Asking);
        let (shared, name) = (Arc::clone(&self.shared), self.spec.name.clone());
        self.work(async move {
            match timeout(KEEPS_ITS_PLACE, shared.spent(&name, position)).await {
                Ok(Ok(spent)) => Done::Spent { position, spent },
                Ok(Err(_)) | Err(_) => Done::Unknown { position },
            }
        });
    }

    /// Asks on for the attempts that were spent on an event, while others go on.
    pub(super) fn ask_on(&mut self, position: u64) {
        self.hands.set(position, Stage::Busy);
        let (shared, name) = (Arc::clone(&self.shared), self.spec.name.clone());
        self.work(async move {
            loop {
                sleep(PAUSE).await;
                if let Ok(spent) = shared.spent(&name, position).await {
                    return Done::Spent { position, spent };
                }
            }
        });
    }

    fn hold(&mut self, position: u64, reply: Subject, event: Event, stage: Stage) {
        let key = event.order_key(&self.topic.order_by).filter(|_| self.spec.ordered);
        let key = key.map(str::to_owned);
        let heard = Instant::now();
        self.hands.insert(position, Held { event, reply, attempt: 1, stage, key, heard, came: 0 });
    }

    /// Tells JetStream of everything that it would soon hand out again.
    pub(super) async fn still_working(&mut self) {
        let now = Instant::now();
        let mut replies = Vec::new();
        for held in self.hands.iter_mut() {
            if now.duration_since(held.heard) >= HEARTBEAT {
                held.heard = now;
                replies.push(held.reply.clone());
            }
        }
        if self.shared.connected().is_ok() {
            for reply in replies {
                self.shared.answer(reply, AckKind::Progress).await;
            }
            if self.paused {
                self.ask_paused();
            }
        }
    }

    /// Somebody may have resumed it by way of another control plane.
    fn ask_paused(&mut self) {
        let (shared, topic) = (Arc::clone(&self.shared), self.topic.clone());
        let name = self.spec.name.clone();
        self.work(async move {
            let consumer = shared.consumer(&topic, &name).await.ok().flatten();
            Done::Paused(consumer.is_none_or(|consumer| consumer.cached_info().paused))
        });
    }
}

/// Never, while no question is open.
pub(super) async fn next_message(
    question: &mut Option<Question>,
) -> Option<Result<Message, String>> {
    match question {
        Some(question) => question.next().await,
        None => std::future::pending().await,
    }
}
