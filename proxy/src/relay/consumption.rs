//! One subscription of this replica: pulls events from the bus while its receiver is there, hands them over, and
//! tells the bus what came of it.

use std::sync::Arc;
use std::time::Duration;

use duet_events::bus::{
    AppAnswer, ConsumeError, Consumer, Delivery, EventBus, Settle, Settler, SubscriptionSpec,
    on_answer,
};
use duet_events::inbox::Inbox;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::extend::Extensions;
use super::gather::Gathered;
use super::in_hand::{InHand, Taken};
use super::metrics::EventMetrics;
use super::receive::{Receiver, Work};

/// Wait before pulling again after the application was not there.
const AWAY_PAUSE: Duration = Duration::from_millis(200);
/// How long an event waits for room before it goes back, unspent.
const NO_ROOM: Duration = Duration::from_secs(1);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// What all subscriptions share.
#[derive(Clone, Debug)]
pub(super) struct Aids {
    pub(super) metrics: EventMetrics,
    pub(super) extensions: Extensions,
    /// What was handled, for subscriptions with `once`.
    pub(super) inbox: Arc<Inbox>,
}

/// One subscription of this replica, consumed.
#[derive(Debug)]
pub(super) struct Consumption {
    bus: Arc<dyn EventBus>,
    ready: watch::Receiver<bool>,
    errors: IntCounterVec,
    hand: Arc<Hand>,
    /// Whether the receiver was there, of each that is in hand. It outlives the consumer by which it came.
    open: JoinSet<bool>,
}

/// Why a consumer ended.
enum End {
    Stopped,
    AppAway,
    Broken(ConsumeError),
}

impl Consumption {
    /// `ready` says whether the receiver is there; nothing is pulled while it is not.
    pub(super) fn new(
        spec: SubscriptionSpec,
        bus: Arc<dyn EventBus>,
        receiver: Arc<dyn Receiver>,
        ready: watch::Receiver<bool>,
        aids: &Aids,
    ) -> Self {
        let hand = Arc::new(Hand::new(spec, receiver, aids));
        let errors = aids.metrics.refused.clone();
        Self { bus, ready, errors, hand, open: JoinSet::new() }
    }

    /// Consumes until `stop`; then finishes what is in flight, and the rest goes back unspent.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        self.consume_until(&stop).await;
        self.finish_open().await;
    }

    async fn finish_open(&mut self) {
        while self.open.join_next().await.is_some() {}
    }

    async fn consume_until(&mut self, stop: &CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        let mut confirmed = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                here = self.ready.wait_for(|ready| *ready) => if here.is_err() { return },
            }
            let spec = self.hand.spec.clone();
            let bus = Arc::clone(&self.bus);
            let opened = tokio::select! {
                opened = bus.consume(spec) => opened,
                () = stop.cancelled() => return,
            };
            let end = match opened {
                Ok(consumer) => {
                    backoff = FIRST_BACKOFF;
                    if !std::mem::replace(&mut confirmed, true) {
                        self.confirmed();
                    }
                    self.consume(consumer, stop).await
                }
                Err(error) => End::Broken(error),
            };
            let pause = match end {
                End::Stopped => return,
                End::AppAway => AWAY_PAUSE,
                End::Broken(error) => self.broken(&error, &mut backoff),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// From here on the bus keeps events for it. Not said before: what is published until then is not its own.
    fn confirmed(&self) {
        let spec = &self.hand.spec;
        tracing::info!(
            subscription = spec.name,
            topic = spec.topic,
            path = spec.path,
            "subscribed"
        );
    }

    /// Reports a consumer that broke; how long to wait before the next one.
    fn broken(&self, error: &ConsumeError, backoff: &mut Duration) -> Duration {
        self.errors.with_label_values(&["bus"]).inc();
        let subscription = &self.hand.spec.name;
        if error.is_retryable() {
            tracing::info!(%error, subscription, "no events for now; trying again");
        } else {
            tracing::error!(%error, subscription, "the bus refuses the subscription");
            *backoff = LONGEST_BACKOFF;
        }
        let pause = backoff.mul_f64(0.5 + rand::random::<f64>());
        *backoff = (*backoff * 2).min(LONGEST_BACKOFF);
        pause
    }

    async fn consume(&mut self, mut consumer: Consumer, stop: &CancellationToken) -> End {
        let settler = consumer.settler();
        // What they say is of before.
        while self.open.try_join_next().is_some() {}
        let mut gathered = Gathered::new(&self.hand.spec);
        let end = loop {
            let due = gathered.due;
            tokio::select! {
                biased;
                () = stop.cancelled() => break End::Stopped,
                away = self.ready.wait_for(|ready| !*ready) => match away {
                    Ok(_) => break End::AppAway,
                    Err(_closed) => break End::Stopped,
                },
                settled = self.open.join_next(), if !self.open.is_empty() => {
                    // Not there, although the probe has not noticed: do not pull what cannot be delivered.
                    if matches!(settled, Some(Ok(false))) {
                        break End::AppAway;
                    }
                }
                () = until(due), if due.is_some() => {
                    start(&self.hand, gathered.take(), &settler, &mut self.open);
                }
                next = consumer.next() => match next.unwrap_or_else(|| Err(ended(&self.hand.spec.name))) {
                    Ok(delivery) => {
                        start(&self.hand, gathered.add(delivery), &settler, &mut self.open);
                    }
                    Err(error) => break End::Broken(error),
                },
            }
        };
        // What was gathered and not handed over goes back with the rest.
        let broken = matches!(end, End::Broken(_));
        if !broken {
            // What the application has in hand is settled before the rest goes back.
            self.finish_open().await;
        }
        // A settle on its way when the process ends would be a delivery again.
        consumer.finish().await;
        if broken && self.hand.spec.ordered {
            // Others may handle what is in hand; what follows it is not for here before that is over.
            self.finish_open().await;
        }
        end
    }
}

fn ended(subscription: &str) -> ConsumeError {
    let reason = "the bus ended the stream".to_owned();
    ConsumeError::Internal { subscription: subscription.to_owned(), reason }
}

fn start(
    hand: &Arc<Hand>,
    works: impl IntoIterator<Item = Vec<Delivery>>,
    settler: &Settler,
    open: &mut JoinSet<bool>,
) {
    for work in works {
        let (hand, settler) = (Arc::clone(hand), settler.clone());
        open.spawn(async move { hand.over(work, &settler).await });
    }
}

fn now_ms() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or_default()
}

async fn until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}

/// Hands events of one subscription to its receiver, and decides what becomes of them.
#[derive(Debug)]
struct Hand {
    spec: SubscriptionSpec,
    receiver: Arc<dyn Receiver>,
    in_hand: InHand,
    /// As many as may be in flight: what a broken consumer left in hand counts as well.
    room: Semaphore,
    extensions: Extensions,
    inbox: Arc<Inbox>,
    in_flight: IntGauge,
    duration: Histogram,
    acked: IntCounter,
    retried: IntCounter,
    released: IntCounter,
    dead: IntCounter,
    duplicate: IntCounter,
}

impl Hand {
    fn new(spec: SubscriptionSpec, receiver: Arc<dyn Receiver>, aids: &Aids) -> Self {
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
            receiver,
            extensions: aids.extensions.clone(),
            inbox: Arc::clone(&aids.inbox),
            in_hand: InHand::default(),
            room: Semaphore::new(spec.max_in_flight as usize),
            spec,
        }
    }

    /// Returns whether the receiver was there.
    async fn over(&self, deliveries: Vec<Delivery>, settler: &Settler) -> bool {
        let take = |delivery: Delivery| Some((self.in_hand.take(&delivery, settler)?, delivery));
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
        for ((taken, delivery), answer) in taken.into_iter().zip(&work.deliveries).zip(answers) {
            let outcome = self.decide(delivery, &answer);
            reached &= !matches!(outcome, Settle::Release { .. });
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
                tracing::error!(%error, subscription = self.spec.name, "events wait");
                for taken in taken {
                    self.released.inc();
                    taken.settle(Settle::Release { delay: LONGEST_BACKOFF });
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
        if let Err(error) = self.inbox.remember(&self.spec.name, done, now_ms()).await {
            let subscription = &self.spec.name;
            tracing::error!(%error, subscription, "handled events may come again");
        }
    }

    /// One for each delivery.
    async fn answers(&self, work: &Work) -> Vec<AppAnswer> {
        let count = work.deliveries.len();
        let timer = self.duration.start_timer();
        let bound = self.extensions.begin(&work.token, self.spec.ack_timeout);
        let mut answers = Vec::with_capacity(count);
        let reason = tokio::select! {
            () = self.receiver.deliver(work, &mut answers) => "no answer for this event".to_owned(),
            () = bound.over() => format!("no answer within {:?}", self.spec.ack_timeout),
        };
        timer.observe_duration();
        answers.resize(count, AppAnswer::NoAnswer { reason });
        answers
    }

    fn decide(&self, delivery: &Delivery, answer: &AppAnswer) -> Settle {
        let attempt = delivery.attempt;
        let settle = on_answer(answer, attempt, &self.spec, rand::random());
        match &settle {
            Settle::Ack => self.acked.inc(),
            Settle::Retry { .. } => self.retried.inc(),
            Settle::Release { .. } => self.released.inc(),
            Settle::DeadLetter { reason, .. } => {
                self.dead.inc();
                let (subscription, id) = (&self.spec.name, delivery.event.id());
                tracing::warn!(subscription, id, reason, attempt, "event goes to the dead letters");
            }
        }
        settle
    }
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
