//! One publish stream. Requests are started in the order they came and answered as they are flushed: many share a
//! flush.

use std::sync::Arc;
use std::time::Duration;

use duet_api::proto;
use duet_api::resource::Operation;
use duet_events::Event;
use duet_events::bus::{PublishError, PublishErrorKind, dead_letter};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::receive::{Admitted, Held, Room};
use super::{BusError, Buses, Gate, SERVICE};

/// Requests of one stream that wait for their flush; more are not read.
pub(super) const MAX_OPEN: usize = 256;
/// Between two lines of the log on publishes that a bus has no room for, and between two on those for which it is away:
/// applications cause as many as they like, and the log is often on the disk that is full. The metric counts them all.
const QUIET: Duration = Duration::from_secs(10);
static LAST_FULL: Mutex<Option<Instant>> = Mutex::new(None);
static LAST_AWAY: Mutex<Option<Instant>> = Mutex::new(None);

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
        let correlation = request.correlation;
        let answer = match self.store(request).await {
            Ok(events) => proto::PublishResponse { correlation, events, error: None },
            Err(error) => {
                let reason = reason(error.kind);
                self.gate.metrics.refused.with_label_values(&[SERVICE, reason]).inc();
                if last_line(error.kind).is_none_or(is_due) {
                    tracing::info!(peer = %self.gate.who, reason, "publish refused: {error}");
                }
                proto::PublishResponse { correlation, events: vec![], error: Some(error.into()) }
            }
        };
        (answer, held)
    }

    async fn store(
        &self,
        request: proto::PublishRequest,
    ) -> Result<Vec<proto::Published>, PublishError> {
        let bus = self.buses.get(&request.bus).await.map_err(|error| {
            let kind = match error {
                BusError::Unknown(_) => PublishErrorKind::UnknownBus,
                // Until whoever operates it has mended that, outboxes keep the events.
                BusError::Open { .. } | BusError::Nats { .. } => PublishErrorKind::Unavailable,
            };
            PublishError::new(kind, format!("{:#}", anyhow::Error::new(error)))
        })?;
        self.gate
            .check(Operation::Publish, &request.topic)
            .map_err(|why| PublishError::new(PublishErrorKind::Denied, why))?;
        self.buses.takes(&request.bus, &request.topic)?;
        let now = jiff::Timestamp::now();
        let (events, _room) = self.room.decode(request.events).await?;
        let events = events.into_iter().enumerate().map(|(number, event)| {
            Event::arrived(event, now).map(dead_letter::unmarked).map_err(|error| {
                PublishError::new(PublishErrorKind::Invalid, format!("event {number}: {error}"))
            })
        });
        let events = events.collect::<Result<Vec<_>, _>>()?;
        let published = bus.publish(&request.topic, events).await?;
        Ok(published.into_iter().map(Into::into).collect())
    }
}

/// When a line on such a refusal was written last; none where each is worth one.
fn last_line(kind: PublishErrorKind) -> Option<&'static Mutex<Option<Instant>>> {
    match kind {
        PublishErrorKind::Full => Some(&LAST_FULL),
        PublishErrorKind::Unavailable => Some(&LAST_AWAY),
        PublishErrorKind::UnknownBus
        | PublishErrorKind::UnknownTopic
        | PublishErrorKind::Invalid
        | PublishErrorKind::Denied
        | PublishErrorKind::Internal => None,
    }
}

/// Whether a line may be written again, which then counts as written.
fn is_due(last: &Mutex<Option<Instant>>) -> bool {
    let (now, mut last) = (Instant::now(), last.lock());
    let due = last.is_none_or(|last| now.duration_since(last) >= QUIET);
    if due {
        *last = Some(now);
    }
    due
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
    async fn a_full_bus_is_a_line_in_ten_seconds() {
        let last = Mutex::new(None);
        let lines = || (0..1000).filter(|_publish| is_due(&last)).count();
        assert_eq!((lines(), lines()), (1, 0));
        tokio::time::advance(QUIET).await;
        assert_eq!((lines(), lines()), (1, 0));
    }
}
