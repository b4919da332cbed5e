//! What takes events of a subscription and answers for them: the application, in one of the ways that it can be
//! reached. Imports nothing of the relay.

use duet_events::bus::{AppAnswer, Delivery};
use futures::future::BoxFuture;
use http::HeaderMap;
use http::header::HeaderValue;

pub(super) use crate::http::headers::{DELIVERY, DELIVERY_ATTEMPT as ATTEMPT};

/// Deliveries that are handed over at once: one, or several in bulk.
#[derive(Debug)]
pub(super) struct Work {
    /// Names this work to the application, for asking for more time. Not guessable.
    pub(super) token: String,
    /// Never empty. In bulk, all of them go to the same path.
    pub(super) deliveries: Vec<Delivery>,
}

impl Work {
    /// What an application is told of one delivery beside the event: headers over HTTP, metadata over gRPC.
    pub(super) fn describe(&self, delivery: &Delivery, headers: &mut HeaderMap) {
        headers.insert(ATTEMPT, HeaderValue::from(delivery.attempt));
        self.name(headers);
        headers.extend(delivery.event.trace_headers());
    }

    /// What an application is told of all of it, whatever each delivery is.
    pub(super) fn name(&self, headers: &mut HeaderMap) {
        if let Ok(token) = HeaderValue::from_str(&self.token) {
            headers.insert(DELIVERY, token);
        }
    }
}

/// Takes deliveries of one subscription.
pub(super) trait Receiver: Send + Sync + std::fmt::Debug {
    /// Hands the work over and puts the answers into `answers`: one for each delivery, in their order. Whoever calls this
    /// bounds the time by dropping the future; what is there by then counts, and whoever has none did not answer.
    fn deliver<'a>(&'a self, work: &'a Work, answers: &'a mut Vec<AppAnswer>) -> BoxFuture<'a, ()>;
}
