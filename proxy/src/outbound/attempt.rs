//! One try of a call: backend -> endpoint -> connection -> response head; and what becomes of its answer.

use std::sync::Arc;
use std::time::Duration;

use duet_api::proto::Protocol;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Request, Response, StatusCode, Version, request};
use http_body::Body as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::destination::{Backend, Destination, InFlight, Replica, Rule};
use super::{Call, CallBody};
use crate::balance::{peak_ewma, pick};
use crate::connect::Transport;
use crate::error::{ErrorType, Failure, Progress};
use crate::filter::Filters;
use crate::http::body::{Body, BodyError, Watch, Watched};
use crate::http::headers;
use crate::http::upgrade::{self, Upgrade};
use crate::record::Record;

/// Endpoints that a call has tried.
#[derive(Debug, Default)]
pub(super) struct Tried(Vec<Arc<Replica>>);

impl Tried {
    /// How many tries were made.
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    fn has(&self, replica: &Arc<Replica>) -> bool {
        self.0.iter().any(|tried| Arc::ptr_eq(tried, replica))
    }
}

/// A response whose body has not been read yet, with all that has to live as long as it.
#[derive(Debug)]
pub(super) struct Answer<'r> {
    response: Response<Body>,
    in_flight: InFlight,
    filters: &'r Filters,
    tasks: TaskTracker,
}

impl Answer<'_> {
    /// Joins the two sides of an upgrade, where the application agreed to it.
    pub(super) fn switch(&mut self, upgrade: Upgrade, force: &CancellationToken) {
        if self.response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let tunnel = upgrade.accepted(hyper::upgrade::on(&mut self.response));
            self.tasks.spawn(tunnel.run(force.clone()));
        }
    }
}

/// Makes one try.
pub(super) async fn run<'r>(
    call: &mut Call,
    destination: &Destination,
    rule: &'r Rule,
    tried: &mut Tried,
) -> Result<Answer<'r>, Failure> {
    let (index, filters) = rule.choose()?;
    let Some((backend, replicas)) = destination.backend(index) else {
        return Err(Failure::new(ErrorType::ProxyInternalError, "the backend is gone"));
    };
    let replica = choose(destination, replicas, tried).ok_or_else(|| {
        let text = format!("{} has no endpoint that is ready", backend.name());
        Failure::new(ErrorType::DestinationUnavailable, text)
    })?;
    tried.0.push(Arc::clone(&replica));
    call.record.attempts(tried.count());
    let in_flight = replica.enter();
    let started = Instant::now();
    let exchange = exchange(call, backend, &replica, filters, tried.count());
    let outcome = match rule.try_timeout {
        Some(limit) => tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_elapsed| {
            let text =
                format!("{} did not answer a try within {limit:?}", replica.pool.target().address);
            let failure = Failure::new(ErrorType::HttpResponseTimeout, text);
            Err(failure.with_progress(Progress::Unknown))
        }),
        None => exchange.await,
    };
    let failed = match &outcome {
        Ok(response) => response.status().is_server_error() || response.status() == 429,
        Err(failure) => failure.progress != Progress::Final,
    };
    let took = started.elapsed();
    let sample = if failed { took.max(peak_ewma::PENALTY) } else { took };
    replica.observe(sample, destination.clock());
    let tasks = replica.pool.tasks().clone();
    outcome.map(|response| Answer { response, in_flight, filters, tasks })
}

/// An endpoint that this call has not tried; one that it has, where there is no other.
fn choose(
    destination: &Destination,
    replicas: &[Arc<Replica>],
    tried: &Tried,
) -> Option<Arc<Replica>> {
    let now = destination.clock();
    let cost = |index: usize| replicas.get(index).map_or(f64::MAX, |replica| replica.cost(now));
    let fresh = |index: usize| replicas.get(index).is_some_and(|replica| !tried.has(replica));
    let index = pick(replicas.len(), &mut rand::rng(), cost, fresh)
        .or_else(|| pick(replicas.len(), &mut rand::rng(), cost, |_| true))?;
    replicas.get(index).map(Arc::clone)
}

async fn exchange(
    call: &mut Call,
    backend: &Backend,
    replica: &Replica,
    filters: &Filters,
    attempt: u32,
) -> Result<Response<Body>, Failure> {
    // An upgrade takes a connection of its own.
    let transport = match call.upgrade {
        Some(_) => Transport::Upgrade,
        None => transport(replica, backend.protocol, call.head.version),
    };
    let mut sender = replica.pool.sender(transport, backend.connect_timeout).await?;
    let head = head(call, filters, transport, replica.pool.target().identity.is_some(), attempt);
    let body = match call.body.take() {
        Some(CallBody::Once(body)) => Body::Incoming(body),
        Some(CallBody::Replay(body)) => Body::Replay(body),
        Some(CallBody::None) | None => Body::Empty,
    };
    if matches!(body, Body::Empty) {
        // Nothing is lost by sending it: the next try can have it again.
        call.body = Some(CallBody::None);
    }
    sender.send(Request::from_parts(head, body)).await
}

/// Sidecars speak HTTP/2 with each other; an application gets what it speaks.
fn transport(replica: &Replica, protocol: Protocol, version: Version) -> Transport {
    let mesh = replica.pool.target().identity.is_some();
    match protocol {
        _ if mesh => Transport::Http2,
        Protocol::H2c => Transport::Http2,
        Protocol::Http1 => Transport::Http1,
        Protocol::Auto if version == Version::HTTP_2 => Transport::Http2,
        Protocol::Auto => Transport::Http1,
    }
}

fn head(
    call: &Call,
    filters: &Filters,
    transport: Transport,
    mesh: bool,
    attempt: u32,
) -> request::Parts {
    let (mut head, mut authority) = (call.head.clone(), call.authority.clone());
    filters.apply_request(&mut head, &mut authority);
    if mesh && head.version != Version::HTTP_2 {
        head.headers.insert(headers::ORIGINAL_VERSION, HeaderValue::from_static("1.1"));
    }
    if let Some(upgrade) = &call.upgrade {
        upgrade.ask(&mut head.headers);
    }
    if attempt > 1 {
        head.headers.insert(headers::ATTEMPT, HeaderValue::from(attempt));
    }
    match transport {
        Transport::Http1 | Transport::Upgrade => headers::for_http1(&mut head, &authority),
        Transport::Http2 => headers::for_http2(&mut head, &authority),
    }
    head
}

/// What an answer means for the retry decision; `None`: it is the answer.
pub(super) fn progress(answer: &Answer<'_>, rule: &Rule) -> Option<Progress> {
    let headers = answer.response.headers();
    // The other sidecar failed, and knows how far the request had come.
    if let Some(value) = headers.get(headers::PROGRESS) {
        return Some(match value.as_bytes() {
            b"unprocessed" => Progress::Unprocessed,
            b"unknown" => Progress::Unknown,
            _ => Progress::Final,
        });
    }
    let status = answer.response.status().as_u16();
    if rule.retry.codes.contains(&status) {
        return Some(Progress::Unknown);
    }
    rule.retry.wants(status, headers).then_some(Progress::Allowed)
}

/// The response to the caller, watched until its last byte.
pub(super) fn respond(
    answer: Answer<'_>,
    mut record: Record,
    rule: &Rule,
    (deadline, idle): (Option<Instant>, Option<Duration>),
) -> Response<Body> {
    let Answer { response, in_flight, filters, tasks: _ } = answer;
    let (mut head, body) = response.into_parts();
    head.version = Version::HTTP_11;
    if head.headers.contains_key(headers::PROGRESS)
        && let Some(value) = head.headers.get(headers::PROXY_STATUS)
        && let Some(kind) = value.to_str().ok().and_then(ErrorType::of_proxy_status)
    {
        record.failed_elsewhere(kind.name());
    }
    let switched = head.status == StatusCode::SWITCHING_PROTOCOLS;
    let upgraded = if switched { head.headers.get(header::UPGRADE).cloned() } else { None };
    headers::strip_all(&mut head.headers);
    if switched {
        upgrade::switched(&mut head.headers, upgraded);
    }
    filters.apply_response(&mut head.headers);
    rule.filters.apply_response(&mut head.headers);
    record.answered(head.status, &head.headers);
    let mut end = End { record, _in_flight: in_flight };
    if body.is_end_stream() {
        end.end(Ok(None));
        return Response::from_parts(head, body);
    }
    let watched = Watched::new(body, Box::new(end), deadline, idle);
    Response::from_parts(head, Body::Watched(Box::new(watched)))
}

/// What happens when the response's last byte is through.
#[derive(Debug)]
struct End {
    record: Record,
    _in_flight: InFlight,
}

impl Watch for End {
    fn end(&mut self, end: Result<Option<&HeaderMap>, &BodyError>) {
        self.record.end(end);
    }
}
