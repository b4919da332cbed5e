//! `SubscribeTopicEventsAlpha1`: a subscription that lasts as long as the application's stream. Events go down, an
//! answer for each comes up, by the event's id; the stream's end gives everything unanswered back, unspent.

use std::sync::Arc;
use std::time::Duration;

use duet_api::dapr::runtime::v1::subscribe_topic_events_request_alpha1::SubscribeTopicEventsRequestType as Asked;
use duet_api::dapr::runtime::v1::subscribe_topic_events_response_alpha1::SubscribeTopicEventsResponseType as Said;
use duet_api::dapr::runtime::v1::{
    SubscribeTopicEventsRequestAlpha1, SubscribeTopicEventsRequestInitialAlpha1,
    SubscribeTopicEventsResponseInitialAlpha1,
};
use duet_api::proto::Subscription;
use duet_events::bus::{AppAnswer, ConsumeError, Consumer, Delivery, SubscriptionSpec};
use futures::future::{BoxFuture, FutureExt as _};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::super::api::Api;
use super::super::consumption::Consumption;
use super::super::extend::Extensions;
use super::super::hand::Ties;
use super::super::programmatic::{DEFAULT_ATTEMPTS, name};
use super::super::publish::options::flag;
use super::super::receive::{Receiver, Work};
use super::down::{self, Down, Room};
use super::sent::Sent;
use super::topic_event;

/// How long an event waits for the answer to another one of the same id before it goes back, unspent.
const SAME_ID_WAIT: Duration = Duration::from_secs(1);
/// Of an event whose time ran out.
const NO_ANSWER: &str = "no answer in time";
/// The application must say what it wants within this time.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) use super::down::Events;

/// Opens a subscription as the first message says.
pub(super) async fn open(
    api: &Arc<Api>,
    mut answers: Streaming<SubscribeTopicEventsRequestAlpha1>,
) -> Result<Events, Status> {
    if api.drain.inbound.is_cancelled() {
        return Err(Status::unavailable("the sidecar is draining"));
    }
    let initial = first(&mut answers).await?;
    let spec = spec(api, initial)?;
    let first = allowed(api, &spec).await?;
    // One message for each delivery that is open, and the first.
    let room = usize::try_from(spec.max_in_flight).unwrap_or(64).saturating_add(1);
    let (down, events) = down::new(room);
    down.send(Said::InitialResponse(SubscribeTopicEventsResponseInitialAlpha1 {}), None);
    tracing::info!(subscription = spec.name, topic = spec.topic, "a stream subscribed");
    let stream = Arc::new(Stream::new(spec.clone(), down, api.aids.extensions.clone()));
    let end = CancellationToken::new();
    let listed = api.active.stream(spec.clone());
    let shared: Arc<dyn Receiver> = Arc::<Stream>::clone(&stream);
    let (ready, here) = watch::channel(true);
    let ties = Ties::default();
    let bus = api.buses.bus(&spec.bus);
    let consumption = Consumption::new(spec.clone(), bus, shared, here, (&api.aids, ties));
    let consume = consumption.beginning_with(first).run(end.clone());
    let (drain, force) = (api.drain.inbound.clone(), api.drain.force.clone());
    // Part of phase one: what the application has in hand is answered before the phase ends.
    api.drain.inbound_tasks.spawn(async move {
        let _listed = listed;
        let mut consume = std::pin::pin!(consume);
        let left = tokio::select! {
            () = &mut consume => return,
            left = stream.listen(&mut answers) => left,
            () = stream.down.closed() => Left::Gone,
            () = drain.cancelled() => Left::Draining,
            () = force.cancelled() => return,
        };
        end.cancel();
        match left {
            Left::Gone => stream.release(),
            Left::Draining => {
                tokio::select! {
                    () = &mut consume => return,
                    _ = stream.listen(&mut answers) => stream.release(),
                    () = stream.down.closed() => stream.release(),
                    () = force.cancelled() => return,
                }
            }
            Left::Wrong(status) => {
                stream.down.fail(status);
                stream.release();
            }
        }
        consume.await;
        tracing::info!(subscription = spec.name, "a stream ended");
        drop(ready);
    });
    Ok(events)
}

/// What the application wants: its first message.
async fn first(
    answers: &mut Streaming<SubscribeTopicEventsRequestAlpha1>,
) -> Result<SubscribeTopicEventsRequestInitialAlpha1, Status> {
    let first = tokio::time::timeout(FIRST_TIMEOUT, answers.message()).await;
    let first = first.map_err(|_elapsed| {
        Status::deadline_exceeded("the first message, initial_request, did not come")
    })??;
    let Some(Asked::InitialRequest(initial)) =
        first.and_then(|first| first.subscribe_topic_events_request_type)
    else {
        return Err(Status::invalid_argument("the first message must be initial_request"));
    };
    Ok(initial)
}

/// Why a stream ends.
enum Left {
    Gone,
    Draining,
    Wrong(Status),
}

/// As for a programmatic subscription of the same application: replicas and both kinds share the events.
fn spec(
    api: &Api,
    initial: SubscribeTopicEventsRequestInitialAlpha1,
) -> Result<SubscriptionSpec, Status> {
    let Some(service) = api.config.services.first() else {
        let text = "a subscription belongs to a service, and this sidecar has none (--service)";
        return Err(Status::failed_precondition(text));
    };
    let (bus, topic) = (initial.pubsub_name, initial.topic);
    api.buses.check(&bus)?;
    let raw_payload = initial.metadata.get("rawPayload").map(|value| flag(value)).transpose();
    let raw_payload = raw_payload
        .map_err(|reason| Status::invalid_argument(format!("metadata \"rawPayload\": {reason}")))?;
    for key in initial.metadata.keys().filter(|key| *key != "rawPayload") {
        tracing::info!(topic, key, "metadata of a subscription is ignored");
    }
    let subscription = Subscription {
        name: name(&api.config.namespace, service, (&bus, &topic)),
        bus,
        topic,
        // Nobody looks at it.
        path: "/".to_owned(),
        max_attempts: DEFAULT_ATTEMPTS,
        dead_letter_topic: initial.dead_letter_topic.unwrap_or_default(),
        raw_payload: raw_payload.unwrap_or_default(),
        ..Subscription::default()
    };
    SubscriptionSpec::try_from(subscription)
        .map_err(|error| Status::invalid_argument(error.to_string()))
}

/// A refusal is said at once, and not left to a log. A bus that is away is no refusal: the stream waits for it, and there
/// is no consumer yet.
async fn allowed(api: &Api, spec: &SubscriptionSpec) -> Result<Option<Consumer>, Status> {
    let bus = api.buses.bus(&spec.bus);
    match tokio::time::timeout(FIRST_TIMEOUT, bus.consume(spec.clone())).await {
        Ok(Err(error @ ConsumeError::Denied { .. })) => {
            Err(Status::permission_denied(error.to_string()))
        }
        Ok(Err(error)) if !error.is_retryable() => Err(Status::invalid_argument(error.to_string())),
        Ok(Ok(consumer)) => Ok(Some(consumer)),
        Ok(Err(_)) | Err(_) => Ok(None),
    }
}

/// The application's stream, as the receiver of its events.
#[derive(Debug)]
struct Stream {
    spec: SubscriptionSpec,
    down: Down,
    extensions: Extensions,
    // Never held across an await. `None` once the application has left.
    sent: Mutex<Option<Sent>>,
    /// Told of every answer.
    answered: Notify,
}

impl Stream {
    fn new(spec: SubscriptionSpec, down: Down, extensions: Extensions) -> Self {
        let sent = Mutex::new(Some(Sent::default()));
        Self { spec, down, extensions, sent, answered: Notify::new() }
    }

    /// Hears answers until the application leaves or talks nonsense.
    async fn listen(&self, answers: &mut Streaming<SubscribeTopicEventsRequestAlpha1>) -> Left {
        loop {
            let answer = match answers.message().await {
                Ok(Some(answer)) => answer.subscribe_topic_events_request_type,
                // A stream that is cancelled ends with an error.
                Ok(None) | Err(_) => return Left::Gone,
            };
            let Some(Asked::EventProcessed(processed)) = answer else {
                let text = "after initial_request, every message must be event_processed";
                return Left::Wrong(Status::invalid_argument(text));
            };
            if let Some(sent) = self.sent.lock().as_mut() {
                sent.answered(&processed.id, topic_event::outcome(processed.status));
            }
            self.answered.notify_waiters();
        }
    }

    /// Everything unanswered goes back.
    fn release(&self) {
        *self.sent.lock() = None;
        self.down.close();
        self.answered.notify_waiters();
    }

    /// Sends an event down, in its turn.
    fn send(
        &self,
        delivery: &Delivery,
        token: &str,
        room: &mut Option<Room>,
    ) -> Result<Answering, Unsent> {
        let mut sent = self.sent.lock();
        let sent = sent.as_mut().ok_or(Unsent::Away)?;
        let now = Instant::now();
        if !sent.may_go(&delivery.event, now) {
            return Err(Unsent::Waits);
        }
        let event = topic_event::streamed(delivery, token, &self.spec);
        // Full: the application reads slower than its time to answer. Not its fault that this one is too much.
        match self.down.send(Said::EventMessage(event), room.take()) {
            true => Ok(sent.add(&delivery.event, now)),
            false => Err(Unsent::Away),
        }
    }

    /// Sends an event down once there is room and no other of its id: the application's answers name ids, and nothing else.
    async fn send_in_turn(&self, delivery: &Delivery, token: &str) -> Result<Answering, AppAnswer> {
        let mut room = self.down.room(delivery.event.size()).await;
        let limit = Instant::now() + SAME_ID_WAIT;
        loop {
            let mut answered = std::pin::pin!(self.answered.notified());
            // From here on no answer goes unheard.
            answered.as_mut().enable();
            match self.send(delivery, token, &mut room) {
                Ok(answering) => return Ok(answering),
                Err(Unsent::Away) => return Err(AppAnswer::NotReached),
                Err(Unsent::Waits) if Instant::now() >= limit => return Err(AppAnswer::NotNow),
                // Looked at once more when time is up: that of the other one may be, too.
                Err(Unsent::Waits) => drop(timeout_at(limit, answered).await),
            }
        }
    }
}

type Answering = oneshot::Receiver<AppAnswer>;

/// Why an event was not sent.
enum Unsent {
    /// The application has left, or does not read.
    Away,
    /// Another one of its id is there.
    Waits,
}

impl Receiver for Stream {
    fn deliver<'a>(&'a self, work: &'a Work, answers: &'a mut Vec<AppAnswer>) -> BoxFuture<'a, ()> {
        async move {
            // Should the time run out, those that the application was never told of spend no attempt.
            answers.resize(work.deliveries.len(), AppAnswer::NotNow);
            for (delivery, answer) in work.deliveries.iter().zip(answers) {
                let answering = match self.send_in_turn(delivery, &work.token).await {
                    Ok(answering) => answering,
                    Err(unsent) => {
                        *answer = unsent;
                        continue;
                    }
                };
                // What waited for another one has its full time, too.
                self.extensions.renew(&work.token);
                *answer = AppAnswer::NoAnswer { reason: NO_ANSWER.to_owned() };
                // An end without an answer: the application has left.
                *answer = answering.await.unwrap_or(AppAnswer::NotReached);
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests;
