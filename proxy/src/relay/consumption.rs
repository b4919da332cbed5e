//! One subscription of this replica: pulls events from the bus while its receiver is there, hands them over, and
//! tells the bus what came of it.

use std::sync::Arc;
use std::time::Duration;

use duet_events::bus::{
    ConsumeError, Consumer, Delivery, EventBus, Settle, Settler, SubscriptionSpec,
};
use prometheus::{IntCounter, IntCounterVec};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::gather::Gathered;
use super::hand::{Aids, Hand, Ties};
use super::receive::Receiver;

/// Wait before pulling again after the application was not there.
const AWAY_PAUSE: Duration = Duration::from_millis(200);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// One subscription of this replica, consumed.
#[derive(Debug)]
pub(super) struct Consumption {
    bus: Arc<dyn EventBus>,
    /// Opened already.
    first: Option<Consumer>,
    ready: watch::Receiver<bool>,
    errors: IntCounterVec,
    hand: Arc<Hand>,
    /// Whether the receiver was there, of each that is in hand. It outlives the consumer by which it came.
    open: JoinSet<bool>,
    /// Consumers that pull nothing more, each until what came by it is settled.
    retired: JoinSet<()>,
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
        (aids, ties): (&Aids, Ties),
    ) -> Self {
        let hand = Arc::new(Hand::new(spec, receiver, aids, ties));
        let errors = aids.metrics.refused.clone();
        let (open, retired) = (JoinSet::new(), JoinSet::new());
        Self { bus, first: None, ready, errors, hand, open, retired }
    }

    /// Begins with a consumer that is open. Another one in its place would get what follows while the first events still
    /// come back from this one.
    pub(super) fn beginning_with(mut self, first: Option<Consumer>) -> Self {
        self.first = first;
        self
    }

    /// Consumes until `stop`; then finishes what is in flight, and the rest goes back unspent.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        self.consume_until(&stop).await;
        self.finish().await;
    }

    /// Waits until nothing is in hand.
    async fn finish(&mut self) {
        while self.open.join_next().await.is_some() {}
        while self.retired.join_next().await.is_some() {}
    }

    async fn consume_until(&mut self, stop: &CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        let mut confirmed = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                here = self.ready.wait_for(|ready| *ready) => if here.is_err() { return },
            }
            let opened = match self.first.take() {
                Some(first) => Ok(first),
                None => tokio::select! {
                    opened = self.bus.consume(self.hand.spec.clone()) => opened,
                    () = stop.cancelled() => return,
                },
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
        while self.retired.try_join_next().is_some() {}
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
        if matches!(end, End::Broken(_)) {
            // What was gathered and not handed over goes back with the rest, as far as the bus is concerned.
            consumer.finish().await;
        } else {
            let open = std::mem::take(&mut self.open);
            let gathered = gathered.take().into_iter().flatten().collect();
            self.retired.spawn(retire(consumer, gathered, open, self.hand.released.clone()));
        }
        if self.hand.spec.ordered {
            // Others may handle what is in hand once its consumer breaks; what follows it is not for here before that is
            // over.
            self.finish().await;
        }
        end
    }
}

/// Pulls nothing more by a consumer: others get what it had not handed over. It ends when what the application has in
/// hand is settled; until then nobody else gets that.
async fn retire(
    mut consumer: Consumer,
    gathered: Vec<Delivery>,
    mut open: JoinSet<bool>,
    released: IntCounter,
) {
    consumer.retire();
    let settler = consumer.settler();
    let back = |delivery: Delivery| {
        released.inc();
        settler.settle(delivery.id, Settle::Release { delay: Duration::ZERO });
    };
    gathered.into_iter().for_each(back);
    let mut there = true;
    loop {
        tokio::select! {
            settled = open.join_next() => if settled.is_none() { break },
            next = consumer.next(), if there => match next {
                Some(Ok(delivery)) => back(delivery),
                // The bus hands out again what is in hand, and the answer to it counts then.
                Some(Err(_)) | None => there = false,
            },
        }
    }
    // A settle on its way when the process ends would be a delivery again.
    consumer.finish().await;
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

async fn until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}
