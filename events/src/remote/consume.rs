//! One consumer's stream.

use std::sync::Arc;
use std::time::Duration;

use duet_api::proto::event_bus_client::EventBusClient;
use duet_api::proto::{self, ConsumeRequest, ConsumeResponse, consume_request, consume_response};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::{OPEN_TIMEOUT, describe};
use crate::bus::{ConsumeError, Consumer, ConsumerBackend, Delivery, Settle, SubscriptionSpec};

/// Requests between the task and the connection.
const OUTGOING: usize = 128;
/// Events that are done are told of together: a wake-up less on either side for each. That costs nothing, as the bus
/// writes them down together as well.
const HOLD: Duration = Duration::from_millis(5);
/// Or when there are this many, or a quarter of what may be in flight.
const MOST_HELD: usize = 32;
/// How long a closing stream may take to deliver its last settles.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

enum Decision {
    Settle(u64, Settle),
    Retire,
    Close,
}

#[allow(
    clippy::large_enum_variant,
    reason = "one at a time, on the stack; a box would cost an allocation for each delivery"
)]
enum Step {
    Decided(Option<Decision>),
    Due,
    Came(Result<Option<ConsumeResponse>, Status>),
}

/// Bounded by its use: one settle for each delivery, of which `max_in_flight` are open.
struct Backend(mpsc::UnboundedSender<Decision>);

impl ConsumerBackend for Backend {
    fn settle(&self, delivery: u64, outcome: Settle) -> bool {
        // The stream has ended otherwise, and the delivery went back.
        self.0.send(Decision::Settle(delivery, outcome)).is_ok()
    }

    fn retire(&self) {
        drop(self.0.send(Decision::Retire));
    }

    fn close(&self) {
        drop(self.0.send(Decision::Close));
    }
}

/// Opens a stream and returns when the bus has confirmed the subscription.
pub(super) async fn open(
    bus: &str,
    mut client: EventBusClient<Channel>,
    spec: SubscriptionSpec,
) -> Result<Consumer, ConsumeError> {
    let (subscription, credit) = (spec.name.clone(), spec.max_in_flight);
    // An ordered one waits for each.
    let most_held = if spec.ordered { 1 } else { MOST_HELD.min(credit as usize / 4) };
    let (outgoing, requests) = mpsc::channel(OUTGOING);
    let unavailable = |reason: String| ConsumeError::Unavailable { bus: bus.to_owned(), reason };
    for kind in [consume_request::Kind::Open(spec.into()), consume_request::Kind::Credit(credit)] {
        let request = ConsumeRequest { kind: Some(kind) };
        outgoing.send(request).await.map_err(|_closed| unavailable("stream closed".to_owned()))?;
    }
    let opening = async {
        let mut responses = client.consume(ReceiverStream::new(requests)).await?.into_inner();
        let first = responses.message().await?;
        Ok::<_, Status>((first, responses))
    };
    let (first, responses) = match timeout(OPEN_TIMEOUT, opening).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(status)) => return Err(refusal(bus, &subscription, &status)),
        Err(_elapsed) => return Err(unavailable("no answer within 5 s".to_owned())),
    };
    if !matches!(first, Some(ConsumeResponse { kind: Some(consume_response::Kind::Opened(_)) })) {
        return Err(unavailable("the stream did not start with its confirmation".to_owned()));
    }
    let (decisions, decided) = mpsc::unbounded_channel();
    let (sender, deliveries) = mpsc::channel(credit as usize + 1);
    let bus = bus.to_owned();
    let held = Held { settles: Vec::new(), due: None, most: most_held };
    let stream = Stream { bus, subscription, outgoing, responses, sender, held, retired: false };
    tokio::spawn(stream.run(decided));
    Ok(Consumer::new(ReceiverStream::new(deliveries), Arc::new(Backend(decisions))))
}

fn refusal(bus: &str, subscription: &str, status: &Status) -> ConsumeError {
    let reason = describe(status);
    if [Code::InvalidArgument, Code::NotFound].contains(&status.code()) {
        return ConsumeError::Refused { subscription: subscription.to_owned(), reason };
    }
    if status.code() == Code::PermissionDenied {
        return ConsumeError::Denied { subscription: subscription.to_owned(), reason };
    }
    ConsumeError::Unavailable { bus: bus.to_owned(), reason }
}

/// Owned by its task, which ends when the consumer is dropped or the connection breaks.
struct Stream {
    bus: String,
    subscription: String,
    outgoing: mpsc::Sender<ConsumeRequest>,
    responses: Streaming<ConsumeResponse>,
    sender: mpsc::Sender<Result<Delivery, ConsumeError>>,
    held: Held,
    /// It gives no credit any more.
    retired: bool,
}

/// Decisions that the bus has not been told of.
struct Held {
    settles: Vec<proto::Settle>,
    due: Option<Instant>,
    most: usize,
}

impl Held {
    /// True if it is time to tell.
    fn add(&mut self, delivery: u64, outcome: Settle) -> bool {
        // Only what is over has time.
        let now = !matches!(outcome, Settle::Ack);
        self.settles.push(proto::Settle { delivery, outcome: Some(outcome.into()) });
        self.due.get_or_insert_with(|| Instant::now() + HOLD);
        now || self.settles.len() >= self.most
    }

    /// Completes when it is time; never without anything to tell.
    async fn due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }
}

impl Stream {
    async fn run(mut self, mut decided: mpsc::UnboundedReceiver<Decision>) {
        loop {
            let decision = async {
                // Room for all that is held and its credit first; nobody else takes it meanwhile.
                drop(self.outgoing.reserve_many(MOST_HELD + 1).await.ok()?);
                decided.recv().await
            };
            let step = tokio::select! {
                decision = decision => Step::Decided(decision),
                () = self.held.due() => Step::Due,
                response = self.responses.message() => Step::Came(response),
            };
            let goes_on = match step {
                Step::Decided(Some(Decision::Settle(delivery, outcome))) => {
                    !self.held.add(delivery, outcome) || self.tell()
                }
                Step::Decided(Some(Decision::Retire)) => self.retire(),
                Step::Due => self.tell(),
                Step::Decided(Some(Decision::Close) | None) => {
                    self.tell();
                    return self.close().await;
                }
                Step::Came(response) => {
                    let delivery = self.delivery(response);
                    let over = delivery.is_err();
                    // The channel holds all that credit allows; more than that is the bus's fault.
                    self.sender.try_send(delivery).is_ok() && !over
                }
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Tells the bus of everything held. False if it is gone.
    fn tell(&mut self) -> bool {
        self.held.due = None;
        let settles = std::mem::take(&mut self.held.settles);
        let Ok(credit @ 1..) = u32::try_from(settles.len()) else { return true };
        let mut kinds = settles.into_iter().map(consume_request::Kind::Settle);
        kinds.all(|kind| self.send(kind))
            && (self.retired || self.send(consume_request::Kind::Credit(credit)))
    }

    /// Takes back what credit there is, after telling of everything held. False if the bus is gone.
    fn retire(&mut self) -> bool {
        self.retired = true;
        self.tell() && self.send(consume_request::Kind::Credit(0))
    }

    fn send(&self, kind: consume_request::Kind) -> bool {
        self.outgoing.try_send(ConsumeRequest { kind: Some(kind) }).is_ok()
    }

    fn delivery(
        &self,
        response: Result<Option<ConsumeResponse>, Status>,
    ) -> Result<Delivery, ConsumeError> {
        let unavailable =
            |reason: String| ConsumeError::Unavailable { bus: self.bus.clone(), reason };
        let response = match response {
            Ok(Some(response)) => response,
            Ok(None) => return Err(unavailable("the bus ended the stream".to_owned())),
            Err(status) => return Err(refusal(&self.bus, &self.subscription, &status)),
        };
        let Some(consume_response::Kind::Delivery(raw)) = response.kind else {
            return Err(unavailable("the bus sent something that is no delivery".to_owned()));
        };
        let event = raw.event.unwrap_or_default().try_into();
        let event = event.map_err(|error| ConsumeError::Internal {
            subscription: self.subscription.clone(),
            reason: format!("the event at position {} is not valid: {error}", raw.position),
        })?;
        Ok(Delivery {
            id: raw.delivery,
            position: raw.position,
            attempt: raw.attempt,
            generation: raw.generation,
            event,
            path: Some(raw.path).filter(|path| !path.is_empty()),
        })
    }

    /// Ends the sending half and waits for the bus to end its own, so that the last settles arrive.
    async fn close(mut self) {
        drop(self.outgoing);
        let rest = async { while let Ok(Some(_)) = self.responses.message().await {} };
        // What did not arrive by then is delivered again.
        timeout(CLOSE_TIMEOUT, rest).await.unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn done_events_are_held_for_a_moment_and_nothing_else_is() {
        let mut held = Held { settles: Vec::new(), due: None, most: 3 };
        assert!(!held.add(1, Settle::Ack) && !held.add(2, Settle::Ack));
        let before = Instant::now();
        held.due().await;
        assert_eq!(before.elapsed(), HOLD);
        assert!(held.add(3, Settle::Ack), "as many as may be");
        let mut held = Held { settles: Vec::new(), due: None, most: 3 };
        assert!(held.add(1, Settle::Retry { delay: Duration::ZERO }));
    }
}
