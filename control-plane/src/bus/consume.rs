//! One consumer of one subscription. Deliveries go out as the client gives credit, never more than the subscription's
//! bound; when the stream ends, what is unsettled goes back to the bus, unspent.

use std::sync::Arc;
use std::time::Duration;

use duet_api::proto;
use duet_api::proto::consume_request::Kind as Ask;
use duet_api::proto::consume_response::Kind as Tell;
use duet_api::resource::Operation;
use duet_events::bus::{ConsumeError, Consumer, Delivery, Settle, Settler, SubscriptionSpec};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::in_flight::{InFlight, Space};
use super::selection::Selection;
use super::{BusError, Buses, Gate, SERVICE};
use crate::compile;
use crate::store::View;
use crate::telemetry::Counted;

/// Deliveries written and not sent; what the client's credit allows can be more.
pub(super) const QUEUE: usize = 16;
/// Credit beyond this is not needed: a subscription has at most 10 000 in flight.
const MAX_CREDIT: u32 = 20_000;

type Answer = Result<proto::ConsumeResponse, Status>;

pub(super) struct Session {
    pub(super) gate: Gate,
    pub(super) buses: Arc<Buses>,
    pub(super) deliveries: mpsc::Sender<Answer>,
    /// Of the connection, for bytes of events.
    pub(super) room: Arc<Semaphore>,
}

impl Session {
    pub(super) async fn run(
        self,
        mut requests: Streaming<proto::ConsumeRequest>,
        stop: CancellationToken,
    ) {
        let served = tokio::select! {
            served = self.serve(&mut requests) => served,
            () = stop.cancelled() => Err(Status::unavailable("the control plane is stopping")),
        };
        if let Err(status) = served {
            tracing::info!(peer = %self.gate.who, "consumer ended: {}", status.message());
            // Nobody reads it if the connection is gone.
            drop(self.deliveries.try_send(Err(status)));
        }
    }

    async fn serve(&self, requests: &mut Streaming<proto::ConsumeRequest>) -> Result<(), Status> {
        let Some(first) = requests.message().await? else {
            return Ok(());
        };
        let Some(Ask::Open(wanted)) = first.kind else {
            return Err(self
                .refuse("invalid", Status::invalid_argument("the first request must be `open`")));
        };
        let mut changes = self.gate.store.changes();
        // Before the resources are read: what changes meanwhile counts as new.
        let mut seen = self.gate.store.read(|view| view.generation);
        let (mut consumer, selection) = self.open(wanted.clone()).await?;
        let _counted = Counted::new(&self.gate.metrics.consumers);
        self.tell(Tell::Opened(proto::Opened {})).await?;
        let settler = consumer.settler();
        let mut credit: u32 = 0;
        let mut in_flight = InFlight::new(Arc::clone(&self.room));
        // Waits for room.
        let mut waiting = None;
        loop {
            tokio::select! {
                // Settling makes room, so it goes first.
                biased;
                request = requests.message() => match request? {
                    Some(proto::ConsumeRequest { kind: Some(Ask::Credit(0)) }) => {
                        return self.retire(requests, consumer, waiting, in_flight).await;
                    }
                    Some(request) => {
                        self.take(request, &settler, &mut credit, &mut in_flight)?;
                    }
                    None => return Ok(()),
                },
                Ok(()) = changes.changed() => self.still(&wanted, &selection.spec, &mut seen)?,
                next = self.next(&mut consumer, &mut waiting, &in_flight), if credit > 0 => {
                    let (permit, delivery, space) = next?;
                    let Some(path) = selection.path(&delivery, &self.gate.metrics).await else {
                        settler.settle(delivery.id, Settle::Ack);
                        continue;
                    };
                    credit -= 1;
                    in_flight.add(delivery.id, space);
                    let delivery = proto::Delivery {
                        delivery: delivery.id,
                        position: delivery.position,
                        attempt: delivery.attempt,
                        generation: delivery.generation,
                        event: Some(delivery.event.into()),
                        path,
                    };
                    permit.send(Ok(proto::ConsumeResponse { kind: Some(Tell::Delivery(delivery)) }));
                }
            }
        }
    }

    /// The client takes nothing more: others get it, and what this one has is still settled here until the stream ends.
    async fn retire(
        &self,
        requests: &mut Streaming<proto::ConsumeRequest>,
        mut consumer: Consumer,
        waiting: Option<Delivery>,
        mut in_flight: InFlight,
    ) -> Result<(), Status> {
        consumer.retire();
        let settler = consumer.settler();
        let back = |delivery: Delivery| {
            settler.settle(delivery.id, Settle::Release { delay: Duration::ZERO });
        };
        waiting.into_iter().for_each(back);
        let mut credit = 0;
        loop {
            tokio::select! {
                biased;
                request = requests.message() => match request? {
                    Some(request) => self.take(request, &settler, &mut credit, &mut in_flight)?,
                    None => return Ok(()),
                },
                delivery = consumer.next() => match delivery {
                    Some(Ok(delivery)) => back(delivery),
                    Some(Err(error)) => return Err(status(&error)),
                    None => return Err(Status::unavailable("the bus ended the consumer")),
                },
            }
        }
    }

    /// Checks who asks for what, and becomes a consumer. What resources declare counts, not what the client says of it.
    async fn open(&self, wanted: proto::Subscription) -> Result<(Consumer, Selection), Status> {
        let spec = self.counts(wanted)?;
        let bus = self.buses.get(&spec.bus).await.map_err(|error| match error {
            BusError::Unknown(_) => {
                self.refuse("unknown_bus", Status::not_found(error.to_string()))
            }
            BusError::Open { .. } | BusError::Nats { .. } => {
                let text = format!("{:#}", anyhow::Error::new(error));
                self.refuse("internal", Status::unavailable(text))
            }
        })?;
        let selection = Selection::compile(spec.clone());
        let selection = selection.await.map_err(|status| self.refuse("invalid", status))?;
        let (name, topic) = (spec.name.clone(), spec.topic.clone());
        let consumer =
            bus.consume(spec).await.map_err(|error| self.refuse("bus", status(&error)))?;
        tracing::info!(peer = %self.gate.who, subscription = name, topic, "consumer connected");
        Ok((consumer, selection))
    }

    /// The subscription as it counts for this peer.
    fn counts(&self, wanted: proto::Subscription) -> Result<SubscriptionSpec, Status> {
        let denied = |why: String| self.refuse("permission_denied", Status::permission_denied(why));
        let compile::Consumable { subscription, declared } = self
            .gate
            .store
            .read(|view| compile::consumable(view.index, &self.gate.who, wanted))
            .map_err(denied)?;
        self.gate.check(Operation::Subscribe, &subscription.topic).map_err(denied)?;
        SubscriptionSpec::try_from(subscription)
            .map(|spec| SubscriptionSpec { declared, ..spec })
            .map_err(|error| self.refuse("invalid", Status::invalid_argument(error.to_string())))
    }

    /// Ends the stream where resources say something else now: the client comes back, and gets what counts then.
    fn still(
        &self,
        wanted: &proto::Subscription,
        spec: &SubscriptionSpec,
        seen: &mut u64,
    ) -> Result<(), Status> {
        let view = |view: View<'_>| (view.events_touched_after(*seen), view.generation);
        let (touched, generation) = self.gate.store.read(view);
        *seen = generation;
        if touched && self.counts(wanted.clone())? != *spec {
            return Err(Status::unavailable("the subscription changed"));
        }
        Ok(())
    }

    fn take(
        &self,
        request: proto::ConsumeRequest,
        settler: &Settler,
        credit: &mut u32,
        in_flight: &mut InFlight,
    ) -> Result<(), Status> {
        match request.kind {
            Some(Ask::Credit(more)) => *credit = credit.saturating_add(more).min(MAX_CREDIT),
            Some(Ask::Settle(proto::Settle { delivery, outcome: Some(outcome) })) => {
                in_flight.remove(delivery);
                // False when it was settled before; the client may well say it twice.
                if !settler.settle(delivery, outcome.into()) {
                    tracing::debug!(peer = %self.gate.who, delivery, "settled twice or unknown");
                }
            }
            Some(Ask::Open(_)) => {
                let text = "a stream consumes one subscription; open another for another";
                return Err(self.refuse("invalid", Status::invalid_argument(text)));
            }
            Some(Ask::Settle(proto::Settle { outcome: None, .. })) | None => {
                let text = "a request without content, or of a kind that is not known here";
                return Err(self.refuse("invalid", Status::invalid_argument(text)));
            }
        }
        Ok(())
    }

    /// The next delivery together with room to send it.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: what has no room yet stays in `waiting`.
    async fn next(
        &self,
        consumer: &mut Consumer,
        waiting: &mut Option<Delivery>,
        in_flight: &InFlight,
    ) -> Result<(mpsc::Permit<'_, Answer>, Delivery, Space), Status> {
        let permit = self.deliveries.reserve().await.map_err(|_closed| closed())?;
        let delivery = match waiting {
            Some(delivery) => delivery,
            None => match consumer.next().await {
                Some(Ok(delivery)) => waiting.insert(delivery),
                Some(Err(error)) => return Err(status(&error)),
                None => return Err(Status::unavailable("the bus ended the consumer")),
            },
        };
        let space = in_flight.space(delivery.event.size()).await;
        let delivery = waiting.take().ok_or_else(closed)?;
        Ok((permit, delivery, space))
    }

    async fn tell(&self, tell: Tell) -> Result<(), Status> {
        let response = proto::ConsumeResponse { kind: Some(tell) };
        self.deliveries.send(Ok(response)).await.map_err(|_closed| closed())
    }

    fn refuse(&self, reason: &str, status: Status) -> Status {
        self.gate.metrics.refused.with_label_values(&[SERVICE, reason]).inc();
        status
    }
}

fn closed() -> Status {
    Status::cancelled("the client is gone")
}

fn status(error: &ConsumeError) -> Status {
    match error {
        ConsumeError::Refused { .. } => Status::failed_precondition(error.to_string()),
        ConsumeError::Denied { .. } => Status::permission_denied(error.to_string()),
        ConsumeError::Unavailable { .. } => Status::unavailable(error.to_string()),
        ConsumeError::Internal { .. } => Status::internal(error.to_string()),
    }
}
