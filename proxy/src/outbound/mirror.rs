//! Copies of requests, sent elsewhere; nobody waits for the answers.

use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderValue;
use http::uri::Authority;
use http::{Request, Version, request};
use http_body_util::BodyExt as _;
use rand::Rng as _;

use super::attempt::transport;
use super::destination::Destination;
use super::replica::millis;
use super::rule::Rule;
use super::{Call, CallBody};
use crate::balance::pick;
use crate::connect::Transport;
use crate::http::body::{Body, Replay};
use crate::http::headers;

/// Bound on a copy's exchange.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The copies of one call that are to be made.
#[derive(Debug)]
pub(super) struct Copies {
    /// Indexes of backends.
    backends: Vec<usize>,
    head: request::Parts,
    authority: Authority,
    body: Option<Replay>,
}

impl Copies {
    /// Decides by chance which there are; `None`: none.
    pub(super) fn of(call: &Call, rule: &Rule) -> Option<Box<Self>> {
        if rule.mirrors.is_empty() {
            return None;
        }
        let drawn = rule.mirrors.iter().filter(|(_, numerator, denominator)| {
            *numerator >= *denominator || rand::rng().random_range(0..*denominator) < *numerator
        });
        let backends: Vec<usize> = drawn.map(|(backend, ..)| *backend).collect();
        if backends.is_empty() || call.upgrade.is_some() {
            return None;
        }
        let body = match &call.body {
            Some(CallBody::Replay(replay)) => Some(replay.handle()),
            Some(CallBody::None) => None,
            // Nothing is kept of it.
            Some(CallBody::Once(_)) | None => return None,
        };
        let (head, authority) = (call.head.clone(), call.authority.clone());
        Some(Box::new(Self { backends, head, authority, body }))
    }

    /// Without a body there is nothing to wait for.
    pub(super) fn is_ready(&self) -> bool {
        self.body.is_none()
    }

    /// Sends them. To be called when the call's own exchange has read the body; a body that was too large, or of which
    /// not all has come, is not mirrored.
    pub(super) fn send(self, destination: &Arc<Destination>) {
        let body = match self.body.map(|body| body.copy()) {
            None => Body::Empty,
            Some(Some(copy)) => Body::Full(copy),
            Some(None) => return destination.metrics.policy("mirror_skipped"),
        };
        for index in self.backends {
            let (head, body) = (self.head.clone(), copy_of(&body));
            send(destination, index, (head, &self.authority), body);
        }
    }
}

/// Of a body that is whole.
fn copy_of(body: &Body) -> Body {
    if let Body::Full(bytes) = body { Body::Full(bytes.clone()) } else { Body::Empty }
}

fn send(
    destination: &Arc<Destination>,
    index: usize,
    (mut head, authority): (request::Parts, &Authority),
    body: Body,
) {
    let Some((backend, endpoints)) = destination.backend(index) else { return };
    let now = destination.now();
    let (now, millis) = (now.as_secs_f64(), millis(now));
    let replica = |index: usize| endpoints.replicas.get(index);
    let cost = |index: usize| replica(index).map_or(f64::MAX, |one| one.cost(now));
    let well = |index: usize| replica(index).is_some_and(|one| one.health.is_usable(millis));
    let count = endpoints.replicas.len();
    let chosen = pick(count, &mut rand::rng(), cost, well).and_then(replica);
    let Some(replica) = chosen.map(Arc::clone) else {
        return destination.metrics.policy("mirror_failed");
    };
    let transport = transport(&replica, backend.protocol, head.version);
    if replica.pool.target().identity.is_some() && head.version != Version::HTTP_2 {
        head.headers.insert(headers::ORIGINAL_VERSION, HeaderValue::from_static("1.1"));
    }
    match transport {
        Transport::Http2 => headers::for_http2(&mut head, authority),
        Transport::Http1 | Transport::Upgrade => headers::for_http1(&mut head, authority),
    }
    let tasks = replica.pool.tasks().clone();
    let (timeout, metrics) = (backend.connect_timeout, Arc::clone(&destination.metrics));
    let exchange = async move {
        let _in_flight = replica.enter(false);
        let mut sender = replica.pool.sender(transport, timeout).await.map_err(drop)?;
        let response = sender.send(Request::from_parts(head, body)).await.map_err(drop)?;
        // Read to its end, so that the connection can be used again.
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            frame.map_err(drop)?;
        }
        Ok::<(), ()>(())
    };
    tasks.spawn(async move {
        let sent = tokio::time::timeout(TIMEOUT, exchange).await;
        metrics.policy(if matches!(sent, Ok(Ok(()))) { "mirrored" } else { "mirror_failed" });
    });
}
