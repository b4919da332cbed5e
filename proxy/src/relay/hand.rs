//! Hands events of one subscription to its receiver, and decides what becomes of them.

use std::sync::Arc;
use std::time::Duration;

use duet_events::bus::{AppAnswer, Delivery, Settle, Settler, SubscriptionSpec, on_answer};
use duet_events::inbox::Inbox;
use prometheus::{Histogram, IntCounter, IntGauge};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::doubts::Doubts;
use super::extend::Extensions;
use super::in_hand::{InHand, Taken};
use super::metrics::EventMetrics;
use super::receive::{Receiver, Work};
use duet_events::sparse::Sparse;

/// How long an event waits for room before it goes back, unspent.
const NO_ROOM: Duration = Duration::from_secs(1);
/// Before an event comes again of which nobody can say now whether it was handled, or who handles it.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(5);
/// For the application to say whether it still wants an event that it has no handler for.
const RESOLVED_TIMEOUT: Duration = Duration::from_secs(10);

/// Says that there is none at this path.
const NO_HANDLER: AppAnswer = AppAnswer::Failed { status: 404 };

/// What all subscriptions share.
#[derive(Clone, Debug)]
pub(super) struct Aids {
    pub(super) metrics: EventMetrics,
    pub(super) extensions: Extensions,
    /// What was handled, for subscriptions with `once`.
    pub(super) inbox: Arc<Inbox>,
}

/// What a subscription shares with others of the same application.
#[derive(Clone, Debug, Default)]
pub(super) struct Ties {
    /// With the one that it follows: that may still have events in hand.
    pub(super) in_hand: Arc<InHand>,
    /// Raised when the application seems to be another one.
    pub(super) doubts: Doubts,
    /// Of a subscription that the application made in code: cancelled once it does not want it like this any more.
    pub(super) unwanted: Option<CancellationToken>,
    /// Cancelled when this replica leaves.
    pub(super) leaving: CancellationToken,
}

/// Hands events of one subscription to its receiver, and decides what becomes of them.
#[derive(Debug)]
pub(super) struct Hand {
    pub(super) spec: SubscriptionSpec,
    receiver: Arc<dyn Receiver>,
    /// As many as may be in flight: what a broken consumer left in hand counts as well.
    room: Semaphore,
    ties: Ties,
    extensions: Extensions,
    inbox: Arc<Inbox>,
    in_flight: IntGauge,
    duration: Histogram,
    acked: IntCounter,
    retried: IntCounter,
    pub(super) released: IntCounter,
    dead: IntCounter,
    duplicate: IntCounter,
    log: Sparse,
}

impl Hand {
    pub(super) fn new(
        spec: SubscriptionSpec,
        receiver: Arc<dyn Receiver>,
        aids: &Aids,
        ties: Ties,
    ) -> Self {
        let metrics = &aids.metrics;
        // A replica's own name (of a broadcast) is no label.
        let name = spec.name.split('@').next().unwrap_or_default();
        let delivered = |outcome| metrics.delivered.with_label_values(&[name, outcome]);
        Self {
            in_flight: metrics.in_flight.with_label_values(&[name]),
            duration: metrics.duration.with_label_values(&[name]),
            acked: delivered("ack"),
            retried: delivered("retry"),
            released: delivered("release"),
            dead: delivered("dead_letter"),
            duplicate: delivered("duplicate"),
            log: Sparse::default(),
            receiver,
            extensions: aids.extensions.clone(),
            inbox: Arc::clone(&aids.inbox),
            ties,
            room: Semaphore::new(spec.max_in_flight as usize),
            spec,
        }
    }

    /// Returns whether the receiver was there.
    pub(super) async fn over(&self, deliveries: Vec<Delivery>, settler: &Settler) -> bool {
        let take =
            |delivery: Delivery| Some((self.ties.in_hand.take(&delivery, settler)?, delivery));
        let (taken, deliveries): (Vec<_>, Vec<_>) = deliveries.into_iter().filter_map(take).unzip();
        if deliveries.is_empty() {
            return true;
        }
        let count = u32::try_from(deliveries.len()).unwrap_or(u32::MAX);
        // What a broken consumer left in hand has the room: others may have some.
        let Ok(_room) = timeout(NO_ROOM, self.room.acquire_many(count)).await else {
            self.released.inc_by(count.into());
            return true;
        };
        let (taken, deliveries) = match self.spec.once {
            true => self.unhandled(taken, deliveries).await,
            false => (taken, deliveries),
        };
        if deliveries.is_empty() {
            return true;
        }
        let _counted = Counted::new(&self.in_flight, deliveries.len());
        let work = Work { token: Uuid::new_v4().to_string(), deliveries };
        let mut reached = true;
        let answers = self.answers(&work).await;
        if self.spec.once {
            self.remember(&work, &answers).await;
        }
        let unwanted = self.unwanted(&answers).await;
        for ((taken, delivery), answer) in taken.into_iter().zip(&work.deliveries).zip(answers) {
            let outcome = match &unwanted {
                Some(release) if answer == NO_HANDLER => self.counted(release.clone()),
                _ => self.decide(delivery, &answer),
            };
            reached &= answer != AppAnswer::NotReached;
            taken.settle(outcome);
        }
        reached
    }

    /// Leaves out what was handled before, and is done with it. While the inbox cannot be read, nothing is delivered, and
    /// no attempt is spent.
    async fn unhandled<'h>(
        &self,
        taken: Vec<Taken<'h>>,
        deliveries: Vec<Delivery>,
    ) -> (Vec<Taken<'h>>, Vec<Delivery>) {
        let events = deliveries.iter().map(|delivery| (&delivery.event, delivery.generation));
        let handled = match self.inbox.handled(&self.spec.name, events, now_ms()).await {
            Ok(handled) => handled,
            Err(error) => {
                if let Some(left_out) = self.log.pass("events wait") {
                    tracing::error!(%error, subscription = self.spec.name, left_out, "events wait");
                }
                for taken in taken {
                    self.released.inc();
                    taken.settle(Settle::Release { delay: UNKNOWN_PAUSE });
                }
                return (Vec::new(), Vec::new());
            }
        };
        let mut left = (Vec::with_capacity(taken.len()), Vec::with_capacity(taken.len()));
        for ((taken, delivery), handled) in taken.into_iter().zip(deliveries).zip(handled) {
            if handled {
                self.duplicate.inc();
                taken.settle(Settle::Ack);
            } else {
                left.0.push(taken);
                left.1.push(delivery);
            }
        }
        left
    }

    /// Before the bus hears of it. What cannot be written down was handled all the same.
    async fn remember(&self, work: &Work, answers: &[AppAnswer]) {
        let done = work.deliveries.iter().zip(answers);
        let done: Vec<_> = done
            .filter(|(_, answer)| **answer == AppAnswer::Handled)
            .map(|(delivery, _)| (&delivery.event, delivery.generation))
            .collect();
        if done.is_empty() {
            return;
        }
        if let Err(error) = self.inbox.remember(&self.spec.name, done, now_ms()).await
            && let Some(left_out) = self.log.pass("handled events may come again")
        {
            let subscription = &self.spec.name;
            tracing::error!(%error, subscription, left_out, "handled events may come again");
        }
    }

    /// One for each delivery.
    async fn answers(&self, work: &Work) -> Vec<AppAnswer> {
        let count = work.deliveries.len();
        let timer = self.duration.start_timer();
        let bound = self.extensions.begin(&work.token, self.spec.ack_timeout);
        let mut answers = Vec::with_capacity(count);
        let over = tokio::select! {
            () = self.receiver.deliver(work, &mut answers) => false,
            () = bound.over() => true,
        };
        timer.observe_duration();
        let broken = |answer: &AppAnswer| {
            matches!(answer, AppAnswer::NotReached | AppAnswer::NoAnswer { .. })
        };
        if !over && answers.iter().any(broken) {
            self.ties.doubts.raise();
            self.left_unsaid(&mut answers);
        }
        let reason = match over {
            true => format!("no answer within {:?}", self.spec.ack_timeout),
            false => "no answer for this event".to_owned(),
        };
        answers.resize(count, AppAnswer::NoAnswer { reason });
        answers
    }

    /// What the application had in hand when it ended, after its sidecar was told to leave, goes back unspent: it is not the event
    /// that was too much for it. Only then: an application that goes first may have been ended by the event, and its
    /// sidecar by whoever looks after both, again and again.
    fn left_unsaid(&self, answers: &mut [AppAnswer]) {
        if !self.ties.leaving.is_cancelled() {
            return;
        }
        for answer in answers.iter_mut().filter(|it| matches!(it, AppAnswer::NoAnswer { .. })) {
            *answer = AppAnswer::NotNow;
        }
    }

    /// What becomes of events without a handler where the application wants them elsewhere by now, or cannot say: its next
    /// version took the connection, and what the one before it said of its handlers is no reason to give an event up.
    async fn unwanted(&self, answers: &[AppAnswer]) -> Option<Settle> {
        let unwanted = self.ties.unwanted.as_ref()?;
        if !answers.contains(&NO_HANDLER) {
            return None;
        }
        let resolved = timeout(RESOLVED_TIMEOUT, self.ties.doubts.resolved()).await;
        let delay = match resolved {
            _ if unwanted.is_cancelled() => Duration::ZERO,
            Ok(()) => return None,
            Err(_elapsed) => UNKNOWN_PAUSE,
        };
        Some(Settle::Release { delay })
    }

    fn decide(&self, delivery: &Delivery, answer: &AppAnswer) -> Settle {
        let of = (delivery.attempt, delivery.path.as_deref());
        let settle = on_answer(answer, of, &self.spec, rand::random());
        let again = matches!(settle, Settle::Retry { .. }) || *answer == AppAnswer::NotReached;
        let (subscription, id, attempt) = (&self.spec.name, delivery.event.id(), delivery.attempt);
        if again && let Some(left_out) = self.log.pass("the event comes again") {
            tracing::warn!(subscription, id, attempt, %answer, left_out, "delivery failed; the event comes again");
        }
        if *answer == AppAnswer::NotNow
            && let Some(left_out) = self.log.pass("the event was not taken")
        {
            tracing::info!(subscription, id, left_out, "the event was not taken; it comes again");
        }
        if let Settle::DeadLetter { reason, .. } = &settle
            && let Some(left_out) = self.log.pass(reason)
        {
            tracing::warn!(
                subscription,
                id,
                reason,
                attempt,
                left_out,
                "event goes to the dead letters"
            );
        }
        self.counted(settle)
    }

    fn counted(&self, settle: Settle) -> Settle {
        match &settle {
            Settle::Ack => self.acked.inc(),
            Settle::Retry { .. } => self.retried.inc(),
            Settle::Release { .. } => self.released.inc(),
            Settle::DeadLetter { .. } => self.dead.inc(),
        }
        settle
    }
}

fn now_ms() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or_default()
}

/// Counts deliveries in flight until dropped.
#[derive(Debug)]
struct Counted<'g> {
    gauge: &'g IntGauge,
    count: i64,
}

impl<'g> Counted<'g> {
    fn new(gauge: &'g IntGauge, count: usize) -> Self {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        gauge.add(count);
        Self { gauge, count }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.gauge.sub(self.count);
    }
}
