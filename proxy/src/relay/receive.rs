//! What takes events of a subscription and answers for them: the application, in one of the ways that it can be
//! reached. Imports nothing of the relay.

use duet_events::bus::{AppAnswer, Delivery};
use futures::future::BoxFuture;

/// Deliveries that are handed over at once: one, or several in bulk.
#[derive(Debug)]
pub(super) struct Work {
    /// Names this work to the application, for asking for more time. Not guessable.
    pub(super) token: String,
    /// Never empty. In bulk, all of them go to the same path.
    pub(super) deliveries: Vec<Delivery>,
}

/// Takes deliveries of one subscription.
pub(super) trait Receiver: Send + Sync + std::fmt::Debug {
    /// Hands the work over and waits for the answers: one for each delivery, in their order. Whoever calls this bounds
    /// the time by dropping the future.
    fn deliver<'a>(&'a self, work: &'a Work) -> BoxFuture<'a, Vec<AppAnswer>>;
}
