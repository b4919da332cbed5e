//! One publish stream. Requests are started in the order they came and answered as they are flushed: many share a
//! flush.

use std::sync::Arc;

use duet_api::proto;
use duet_api::publish::EncodedEvents;
use duet_api::resource::Operation;
use duet_events::Event;
use duet_events::bus::{PublishError, PublishErrorKind, dead_letter};
use duet_events::sparse::Sparse;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::receive::{Admitted, Held, Room};
use super::{BusError, Buses, Gate, SERVICE};

/// Requests of one stream that wait for their flush; more are not read.
pub(super) const MAX_OPEN: usize = 256;

/// What a publish needs.
pub(super) struct Publisher {
    pub(super) gate: Gate,
    pub(super) buses: Arc<Buses>,
    pub(super) room: Room,
    pub(super) admitted: Admitted,
}

pub(super) async fn run(
    publisher: Publisher,
    mut requests: Streaming<proto::PublishRequest>,
    answers: mpsc::Sender<Result<proto::PublishResponse, Status>>,
    stop: CancellationToken,
) {
    let mut open = FuturesUnordered::new();
    let mut reading = true;
    let mut broken = None;
    while reading || !open.is_empty() {
        tokio::select! {
            // What was taken is answered; nothing more is taken.
            () = stop.cancelled(), if reading => reading = false,
            Some((answer, held)) = open.next() => {
                if answers.send(Ok(answer)).await.is_err() {
                    return;
                }
                drop(held);
            }
            request = requests.message(), if reading && open.len() < MAX_OPEN => match request {
                Ok(Some(request)) => open.push(publisher.publish(request, publisher.admitted.next())),
                Ok(None) => reading = false,
                Err(status) => (reading, broken) = (false, Some(status)),
            },
        }
    }
    if let Some(status) = broken {
        // Nobody reads it if it is the connection that broke.
        drop(answers.try_send(Err(status)));
    }
}

impl Publisher {
    /// The answer, with the room that the request has until it is sent.
    async fn publish(
        &self,
        request: proto::PublishRequest,
        held: Option<Held>,
    ) -> (proto::PublishResponse, Option<Held>) {
        let proto::PublishRequest { correlation, bus, topic, events } = request;
        let answer = match self.store(&bus, &topic, events).await {
            Ok(events) => proto::PublishResponse { correlation, events, error: None },
            Err(error) => {
                let reason = reason(error.kind);
                self.gate.metrics.refused.with_label_values(&[SERVICE, reason]).inc();
                if let Some(left_out) = line(&self.buses.refusals, &bus, error.kind) {
                    let peer = &self.gate.who;
                    tracing::info!(%peer, reason, left_out, "publish refused: {error}");
                }
                proto::PublishResponse { correlation, events: vec![], error: Some(error.into()) }
            }
        };
        (answer, held)
    }

    async fn store(
        &self,
        name: &str,
        topic: &str,
        events: EncodedEvents,
    ) -> Result<Vec<proto::Published>, PublishError> {
        let bus = self.buses.get(name).await.map_err(|error| {
            let kind = match error {
                BusError::Unknown(_) => PublishErrorKind::UnknownBus,
                // Until whoever operates it has mended that, outboxes keep the events.
                BusError::Open { .. } | BusError::Nats { .. } => PublishErrorKind::Unavailable,
            };
            PublishError::new(kind, format!("{:#}", anyhow::Error::new(error)))
        })?;
        self.gate
            .check(Operation::Publish, topic)
            .map_err(|why| PublishError::new(PublishErrorKind::Denied, why))?;
        self.buses.takes(name, topic)?;
        let now = jiff::Timestamp::now();
        let (events, _room) = self.room.decode(events).await?;
        let events = events.into_iter().enumerate().map(|(number, event)| {
            Event::arrived(event, now).map(dead_letter::unmarked).map_err(|error| {
                PublishError::new(PublishErrorKind::Invalid, format!("event {number}: {error}"))
            })
        });
        let events = events.collect::<Result<Vec<_>, _>>()?;
        let published = bus.publish(topic, events).await?;
        Ok(published.into_iter().map(Into::into).collect())
    }
}

/// Whether a refusal is worth a line, and how many were not since the last one.
fn line(refusals: &Sparse, bus: &str, kind: PublishErrorKind) -> Option<u64> {
    match kind {
        PublishErrorKind::Full | PublishErrorKind::Unavailable => {
            refusals.pass(&format!("{bus} {kind:?}"))
        }
        PublishErrorKind::UnknownBus
        | PublishErrorKind::UnknownTopic
        | PublishErrorKind::Invalid
        | PublishErrorKind::Denied
        | PublishErrorKind::Internal => Some(0),
    }
}

fn reason(kind: PublishErrorKind) -> &'static str {
    match kind {
        PublishErrorKind::UnknownBus => "unknown_bus",
        PublishErrorKind::UnknownTopic => "unknown_topic",
        PublishErrorKind::Invalid => "invalid",
        PublishErrorKind::Full => "full",
        PublishErrorKind::Denied => "denied",
        PublishErrorKind::Unavailable | PublishErrorKind::Internal => "internal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_full_bus_is_a_line_in_ten_seconds_and_hides_no_other_bus() {
        let refusals = Sparse::default();
        let full = |bus| line(&refusals, bus, PublishErrorKind::Full);
        assert_eq!(full("a"), Some(0));
        assert!((1..1000).all(|_publish| full("a").is_none()));
        assert_eq!(full("b"), Some(0));
        assert_eq!(line(&refusals, "a", PublishErrorKind::Unavailable), Some(0));
        tokio::time::advance(std::time::Duration::from_secs(10)).await;
        assert_eq!(full("a"), Some(999));
        for _each in 0..2 {
            assert_eq!(line(&refusals, "a", PublishErrorKind::Denied), Some(0));
        }
    }
}
