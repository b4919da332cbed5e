//! The bus on the other side of a gRPC channel (service `duet.v1.EventBus`).
//!
//! - `publish`: one long-lived stream for all publishers, pipelined, matched by correlation.
//! - `consume`: one stream for each consumer.
//!
//! Neither tries again by itself: a publish that fails with `Unavailable` belongs to the outbox, and a consumer that ends
//! is opened again by its owner. Imports [`crate::bus`].

mod consume;
mod publish;

use std::time::Duration;

use duet_api::proto::event_bus_client::EventBusClient;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tonic::transport::Channel;

use crate::bus::{
    ConsumeError, Consumer, EventBus, PublishError, PublishErrorKind, Published, SubscriptionSpec,
};
use crate::cloudevent::Event;
use publish::Job;

/// Bound on one publish, from the call to the acknowledgement.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound on opening a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Publishes that wait for the stream; further publishers wait in line.
const QUEUED_PUBLISHES: usize = 256;
/// Largest gRPC message; the server has to allow as much.
pub const MAX_MESSAGE_BYTES: usize = 32 << 20;

/// A bus served by `duet.v1.EventBus`.
#[derive(Debug)]
pub struct RemoteBus {
    bus: String,
    channel: watch::Receiver<Option<Channel>>,
    jobs: mpsc::Sender<Job>,
    task: AbortHandle,
}

impl RemoteBus {
    /// The bus of this name behind whatever channel is current; `None` means that there is no control plane now.
    /// Must be called within a tokio runtime; its task ends with the value.
    #[must_use]
    pub fn new(bus: &str, channel: watch::Receiver<Option<Channel>>) -> Self {
        let (jobs, queue) = mpsc::channel(QUEUED_PUBLISHES);
        let task = tokio::spawn(publish::run(bus.to_owned(), channel.clone(), queue));
        Self { bus: bus.to_owned(), channel, jobs, task: task.abort_handle() }
    }

    async fn send(&self, job: Job) -> Option<()> {
        self.jobs.send(job).await.ok()
    }
}

impl Drop for RemoteBus {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl EventBus for RemoteBus {
    fn publish<'a>(
        &'a self,
        topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        Box::pin(async move {
            if events.is_empty() {
                return Ok(Vec::new());
            }
            if self.channel.borrow().is_none() {
                return Err(unavailable(&self.bus, "not connected to the control plane"));
            }
            let (answer, answered) = oneshot::channel();
            let now = jiff::Timestamp::now();
            let events = events.into_iter().map(|event| event.sent(now)).collect::<Vec<_>>().into();
            let job = Job { topic: topic.to_owned(), events, answer };
            let exchange = async {
                self.send(job).await?;
                answered.await.ok()
            };
            match tokio::time::timeout(PUBLISH_TIMEOUT, exchange).await {
                Ok(Some(answer)) => answer,
                Ok(None) => Err(unavailable(&self.bus, "the publisher's task has ended")),
                Err(_elapsed) => Err(unavailable(&self.bus, "no acknowledgement within 5 s")),
            }
        })
    }

    fn consume(
        &self,
        subscription: SubscriptionSpec,
    ) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        let channel = self.channel.borrow().clone();
        Box::pin(async move {
            let Some(channel) = channel else {
                let reason = "not connected to the control plane".to_owned();
                return Err(ConsumeError::Unavailable { bus: self.bus.clone(), reason });
            };
            consume::open(&self.bus, client(channel), subscription).await
        })
    }
}

fn client(channel: Channel) -> EventBusClient<Channel> {
    EventBusClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

fn unavailable(bus: &str, reason: &str) -> PublishError {
    let message = format!("bus {bus} is unavailable: {reason}");
    PublishError::new(PublishErrorKind::Unavailable, message)
}

/// What a gRPC status says, short enough for a message.
fn describe(status: &tonic::Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

#[cfg(test)]
mod tests;
