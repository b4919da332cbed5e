//! What takes events of a subscription and answers for them: the application, in one of the ways that it can be
//! reached. Imports nothing of the relay.

use duet_events::bus::{AppAnswer, Delivery};
use futures::future::BoxFuture;
use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

use crate::http::headers::{TRACEPARENT, TRACESTATE};

/// Number of the try, from 1.
pub(super) const ATTEMPT: HeaderName = HeaderName::from_static("duet-delivery-attempt");
/// Names the work, for asking for more time.
pub(super) const DELIVERY: HeaderName = HeaderName::from_static("duet-delivery");

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
        // One that cannot be a header stays in the envelope only; it must not cost the event.
        for name in [TRACEPARENT, TRACESTATE] {
            let attribute = delivery.event.attribute(name.as_str());
            if let Some(Ok(trace)) = attribute.map(HeaderValue::from_str) {
                headers.insert(name, trace);
            }
        }
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
