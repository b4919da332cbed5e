//! Events: what they are, where they wait, and how they get there.
//!
//! # The life of an event
//!
//! 1. An app posts it to its sidecar. [`cloudevent`] turns headers and body into checked [`Event`]s, or into an
//!    error that names the attribute.
//! 2. [`outbox::RelayPublisher`] offers it to the bus ([`bus::EventBus`], usually [`remote::RemoteBus`]). If the bus
//!    is away, or if older events still wait, it goes to the [`outbox::Outbox`] on disk instead and follows in order.
//! 3. On the control plane [`embedded::EmbeddedBus`] gives it to the durable [`log`]: one batch with everything that
//!    queued meanwhile, one flush, and only then the acknowledgement.
//! 4. The log hands it to one consumer of every subscription, bounded by that consumer's credit
//!    ([`bus::Consumer`]). The sidecar posts it to its app and turns the answer into a [`bus::Settle`] with
//!    [`bus::on_answer`]: done, again later, not my fault, or to the dead-letter topic.
//! 5. When every subscription is done with it, the topic's retention may remove it.
//!
//! [`nats::NatsBus`] is the other bus: the same promises, kept on a JetStream cluster.
//!
//! Imports nothing of the workspace but `duet_api`.

mod any_case;
pub mod bus;
pub mod cloudevent;
mod database_file;
pub mod embedded;
pub mod inbox;
pub mod log;
mod metrics;
#[cfg(feature = "nats")]
pub mod nats;
pub mod outbox;
mod private;
pub mod remote;
pub mod sparse;

pub use any_case::AnyCase;
pub use cloudevent::Event;
