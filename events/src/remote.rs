//! The bus on the other side of a gRPC channel.
use futures::future::BoxFuture;
use tokio::sync::watch;
use tonic::transport::Channel;
use crate::bus::{Consumer, ConsumeError, EventBus, PublishError, Published, SubscriptionSpec};
use crate::cloudevent::Event;
/// A bus served by `duet.v1.EventBus`.
#[derive(Debug)]
pub struct RemoteBus {}
impl RemoteBus {
    /// The bus of this name behind whatever channel is current; `None` means that there is no control plane now.
    /// Must be called within a tokio runtime; its task ends with the value.
    #[must_use]
    pub fn new(bus: &str, channel: watch::Receiver<Option<Channel>>) -> Self { let _ = (bus, channel); unimplemented!() }
}
impl EventBus for RemoteBus {
    fn publish<'a>(&'a self, _topic: &'a str, _events: Vec<Event>) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> { unimplemented!() }
    fn consume(&self, _subscription: SubscriptionSpec) -> BoxFuture<'_, Result<Consumer, ConsumeError>> { unimplemented!() }
}
