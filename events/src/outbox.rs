//! The sidecar's durable spool.
use std::path::PathBuf;
use std::sync::Arc;
use crate::bus::{EventBus, PublishError, Published};
use crate::cloudevent::Event;
use crate::log::LogError;
/// Where the outbox lives and how much it takes.
#[derive(Clone, Debug)]
pub struct OutboxOptions {
    /// Its folder; created when first needed.
    pub dir: PathBuf,
    /// Most bytes of waiting events.
    pub capacity_bytes: u64,
}
/// Events that wait on this machine's disk for their bus.
#[derive(Debug)]
pub struct Outbox {}
impl Outbox {
    /// Opens the store if it exists; otherwise it is made when first needed.
    /// # Errors
    /// When the store exists and cannot be opened.
    pub async fn open(options: OutboxOptions, registry: &prometheus::Registry) -> Result<Arc<Self>, LogError> { let _ = (options, registry); unimplemented!() }
    /// A publisher to one bus, with this outbox behind it. Starts the task that forwards what waits for that bus;
    /// it ends with the publisher (keep one publisher for each bus). Must be called within a tokio runtime.
    pub fn relay(self: &Arc<Self>, bus_name: &str, bus: Arc<dyn EventBus>) -> RelayPublisher { let _ = (bus_name, bus); unimplemented!() }
    /// Events that wait for any bus.
    pub fn depth(&self) -> u64 { unimplemented!() }
    /// Flushes and closes the store. Publishing afterwards fails.
    pub async fn close(&self) { unimplemented!() }
}
/// How a publish was made safe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// By the bus.
    Stored(Vec<Published>),
    /// By the outbox; it follows in order.
    Spooled,
}
/// Publishes to one bus directly while it is there, through the outbox while it is not.
#[derive(Debug)]
pub struct RelayPublisher {}
impl RelayPublisher {
    /// Success means: flushed to disk somewhere. `Full`: neither the bus nor the outbox has room (429).
    /// # Errors
    /// When the bus refuses, or it is away and the outbox is full or failed.
    pub async fn publish(&self, topic: &str, events: Vec<Event>) -> Result<Accepted, PublishError> { let _ = (topic, events); unimplemented!() }
}
