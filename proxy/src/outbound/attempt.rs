//! One try of a call: backend -> endpoint -> connection -> response head; and what becomes of its answer.

use std::sync::Arc;
use std::time::Duration;

use duet_api::proto::Protocol;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Request, Response, StatusCode, Version, request};
use http_body::Body as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::choose::{Choice, choose};
use super::destination::{Backend, Destination};
use super::replica::{InFlight, Replica};
use super::rule::Rule;
use super::{Call, CallBody, in_time};
use crate::balance::peak_ewma;
use crate::connect::Transport;
use crate::error::{ErrorType, Failure, Progress};
use crate::filter::Filters;
use crate::http::body::{Body, BodyError, Watch, Watched};
use crate::http::upgrade::{self, Upgrade};
use crate::http::{deadline, headers};
use crate::record::Record;

/// Endpoints that a call has tried. The first one is apart, as most calls try no other and then need no list.
#[derive(Debug, Default)]
pub(super) struct Tried<'d> {
    first: Option<&'d Arc<Replica>>,
    others: Vec<&'d Arc<Replica>>,
}

impl<'d> Tried<'d> {
    /// How many tries were made.
    pub(super) fn count(&self) -> u32 {
        let count = usize::from(self.first.is_some()) + self.others.len();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    pub(super) fn has(&self, replica: &Arc<Replica>) -> bool {
        self.first.iter().chain(&self.others).any(|tried| Arc::ptr_eq(tried, replica))
    }

    fn add(&mut self, replica: &'d Arc<Replica>) {
        match self.first {
            None => self.first = Some(replica),
            Some(_) => self.others.push(replica),
        }
    }
}

/// A try that is ready to go. It borrows nothing of the call, so that two can be under way.
#[derive(Debug)]
pub(super) struct Try<'d> {
    destination: &'d Arc<Destination>,
    choice: Choice<'d>,
    transport: Transport,
    /// Boxed, as it is moved from stage to stage.
    head: Box<request::Parts>,
    body: CallBody,
    started: Instant,
    limit: Option<Duration>,
    grpc: bool,
}

/// A try without an answer, and the body where it is untouched.
#[derive(Debug)]
pub(super) struct Failed {
    pub failure: Failure,
    pub body: Option<CallBody>,
}

/// A response whose body has not been read yet, with all that has to live as long as it.
#[derive(Debug)]
pub(super) struct Answer<'d> {
    response: Response<Body>,
    in_flight: InFlight,
    filters: &'d Filters,
    /// When its head was there.
    at: Instant,
    /// Some of its headers are the mesh's own.
    ours: bool,
    /// Another endpoint has not been tried.
    others: bool,
    /// It probed an ejected endpoint.
    probe: bool,
    /// gRPC tells in its trailers.
    later: Option<Later>,
}

impl Answer<'_> {
    /// Joins the two sides of an upgrade, where the application agreed to it.
    pub(super) fn switch(&mut self, upgrade: Upgrade, force: &CancellationToken) {
        if self.response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let tunnel = upgrade.accepted(hyper::upgrade::on(&mut self.response));
            self.in_flight.replica().pool.tasks().spawn(tunnel.run(force.clone()));
        }
    }

    /// Whether it is worth more than waiting for another try's answer.
    pub(super) fn is_good(&self) -> bool {
        !self.response.status().is_server_error()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    fn elsewhere(&self) -> Option<&HeaderValue> {
        elsewhere(self.response.headers(), self.ours)
    }
}

/// Chooses an endpoint and makes everything ready, for a try that starts now.
pub(super) fn prepare<'d>(
    call: &mut Call,
    (destination, rule): (&'d Arc<Destination>, &'d Rule),
    tried: &mut Tried<'d>,
    started: Instant,
) -> Result<Try<'d>, Failure> {
    let now = destination.at(started);
    let choice = choose((destination, rule), &call.head, call.session, tried, now)?;
    tried.add(choice.replica);
    call.record.attempts(tried.count());
    // An upgrade takes a connection of its own.
    let transport = match call.upgrade {
        Some(_) => Transport::Upgrade,
        None => transport(choice.replica, choice.backend.protocol, call.head.version),
    };
    let mesh = choice.replica.pool.target().identity.is_some();
    let head = head(call, choice.filters, transport, mesh, tried.count());
    let grpc = call.grpc;
    let body = match &call.body {
        // Every try can have it.
        Some(CallBody::None) => CallBody::None,
        _ => call.body.take().unwrap_or(CallBody::None),
    };
    Ok(Try { destination, choice, transport, head, body, started, limit: rule.try_timeout, grpc })
}

impl<'d> Try<'d> {
    /// Makes the try.
    pub(super) async fn run(self) -> Result<Answer<'d>, Failed> {
        let Self { destination, choice, transport, head, body, started, limit, grpc } = self;
        let Choice { backend, endpoints, filters, replica, mut in_flight } = choice;
        let exchange = std::pin::pin!(exchange(backend, replica, transport, head, body));
        let deadline = limit.map(|limit| started + limit);
        let outcome = in_time(exchange, deadline).await;
        let outcome = outcome.unwrap_or_else(|| Err(timed_out(replica, limit.unwrap_or_default())));
        let at = Instant::now();
        let took = at.saturating_duration_since(started);
        let ours = outcome.as_ref().is_ok_and(|answer| headers::has_ours(answer.headers()));
        let verdict = match &outcome {
            Ok(response) => judge(response, ours, grpc),
            Err(failed) => Judged::of(failed.failure.progress == Progress::Final),
        };
        let slow = verdict.penalty || matches!(&outcome, Ok(answer) if answer.status() == 429);
        let sample = if slow { took.max(peak_ewma::PENALTY) } else { took };
        let now = destination.at(at);
        replica.observe(sample, now.as_secs_f64());
        let probe = in_flight.take_probe();
        let mut later = None;
        match verdict.good {
            Some(good) => {
                destination.answered((backend, endpoints), replica, (good, probe), now);
            }
            // A probe is not left open for as long as a stream may take.
            None if verdict.in_trailers && !probe => {
                let index = destination.position(backend);
                later = Some(Later {
                    destination: Arc::clone(destination),
                    index,
                    replica: Arc::clone(replica),
                });
            }
            None if probe && verdict.in_trailers => {
                destination.answered((backend, endpoints), replica, (true, true), now);
            }
            None if probe => replica.health.abandoned(),
            None => {}
        }
        let others = endpoints.replicas.len() > 1;
        outcome.map(|response| Answer {
            response,
            in_flight,
            filters,
            at,
            ours,
            others,
            probe,
            later,
        })
    }
}

fn timed_out(replica: &Replica, limit: Duration) -> Failed {
    let text = format!("{} did not answer a try within {limit:?}", replica.pool.target().address);
    let failure = Failure::new(ErrorType::HttpResponseTimeout, text);
    Failed { failure: failure.with_progress(Progress::Unknown), body: None }
}

/// What an answer says of the endpoint that gave it.
#[derive(Clone, Copy, Debug)]
struct Judged {
    /// `None`: nothing, or nothing yet.
    good: Option<bool>,
    /// Its trailers will say.
    in_trailers: bool,
    /// Its latency says nothing good either.
    penalty: bool,
}

impl Judged {
    fn of(good: bool) -> Self {
        Self { good: Some(good), in_trailers: false, penalty: !good }
    }
}

fn judge(response: &Response<Body>, ours: bool, grpc: bool) -> Judged {
    let headers = response.headers();
    let progress = elsewhere(headers, ours);
    // Busy is not broken: ejecting it would leave the others with even more.
    if progress.is_some_and(|progress| progress == "shed") {
        return Judged { good: None, in_trailers: false, penalty: true };
    }
    // A gRPC failure has its status in a header, and 200.
    if response.status().is_server_error() || (grpc && progress.is_some()) {
        return Judged::of(false);
    }
    if !grpc {
        return Judged::of(true);
    }
    match headers::grpc_status(headers) {
        Some(code) => Judged::of(!is_server_fault(code)),
        None => Judged { good: None, in_trailers: true, penalty: false },
    }
}

/// How far the request had come where the other sidecar failed it; `ours`: some headers are the mesh's own.
fn elsewhere(headers: &HeaderMap, ours: bool) -> Option<&HeaderValue> {
    if ours { headers.get(headers::PROGRESS) } else { None }
}

/// gRPC statuses that say that the server, not the request, was the trouble.
fn is_server_fault(code: u16) -> bool {
    // UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS
    matches!(code, 2 | 4 | 13 | 14 | 15)
}

async fn exchange(
    backend: &Backend,
    replica: &Replica,
    transport: Transport,
    head: Box<request::Parts>,
    body: CallBody,
) -> Result<Response<Body>, Failed> {
    let mut sender = match replica.pool.sender(transport, backend.connect_timeout).await {
        Ok(sender) => sender,
        Err(failure) => return Err(Failed { failure, body: Some(body) }),
    };
    let sent = sender.send(Request::from_parts(*head, body.into())).await;
    sent.map_err(|failure| Failed { failure, body: None })
}

/// Sidecars speak HTTP/2 with each other; an application gets what it speaks.
pub(super) fn transport(replica: &Replica, protocol: Protocol, version: Version) -> Transport {
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
) -> Box<request::Parts> {
    let (mut head, mut authority) = (Box::new(call.head.clone()), call.authority.clone());
    filters.apply_request(&mut head, &mut authority);
    if mesh && head.version != Version::HTTP_2 {
        head.headers.insert(headers::ORIGINAL_VERSION, HeaderValue::from_static("1.1"));
    }
    if let Some(upgrade) = &call.upgrade {
        upgrade.ask(&mut head.headers);
    }
    if attempt > 1 {
        head.headers.insert(headers::ATTEMPT, HeaderValue::from(attempt));
        if let Some(limit) = call.deadline.filter(|_| call.bounds_body) {
            let left = limit.saturating_duration_since(Instant::now());
            deadline::write(&mut head.headers, left, call.grpc);
        }
    }
    match transport {
        Transport::Http1 | Transport::Upgrade => headers::for_http1(&mut head, &authority),
        Transport::Http2 => headers::for_http2(&mut head, &authority),
    }
    head
}

/// What an answer means for the retry decision; `None`: it is the answer.
pub(super) fn progress(answer: &Answer<'_>, rule: &Rule) -> Option<Progress> {
    // The other sidecar failed, and knows how far the request had come.
    if let Some(value) = answer.elsewhere() {
        return match value.as_bytes() {
            b"unprocessed" => Some(Progress::Unprocessed),
            b"unknown" => Some(Progress::Unknown),
            // Somebody else may have room; the same one has not.
            b"shed" if answer.others => Some(Progress::Unprocessed),
            _ => None,
        };
    }
    let status = answer.response.status();
    // The probe was the mesh's idea, not the caller's: it should not be the one to pay.
    if rule.retry.codes.contains(&status.as_u16()) || (answer.probe && status.is_server_error()) {
        return Some(Progress::Unknown);
    }
    rule.retry.wants(status.as_u16(), answer.headers()).then_some(Progress::Allowed)
}

/// The response to the caller, watched until its last byte.
pub(super) fn respond(answer: Answer<'_>, call: &mut Call, rule: &Rule) -> Response<Body> {
    let Answer { response, in_flight, filters, at, ours, later, .. } = answer;
    let mut record = call.record.take();
    let (mut head, body) = response.into_parts();
    head.version = Version::HTTP_11;
    if elsewhere(&head.headers, ours).is_some()
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
    if let Some(more) = call.cross_origin.take() {
        headers::replace(&mut head.headers, *more);
    }
    if let Some(session) = &rule.session {
        session.write(call.session, in_flight.replica().token, &mut head.headers);
    }
    record.answered(head.status, &head.headers);
    let mut end = End { record, later, _in_flight: in_flight };
    if body.is_end_stream() {
        end.end(Ok(None));
        return Response::from_parts(head, body);
    }
    let deadline = call.deadline.filter(|_| call.bounds_body);
    let idle = rule.idle_timeout.map(|limit| (limit, at));
    let watched = Watched::new(body, Box::new(end), deadline, idle);
    Response::from_parts(head, Body::Watched(Box::new(watched)))
}

/// Where a gRPC status goes that comes in trailers.
#[derive(Debug)]
struct Later {
    destination: Arc<Destination>,
    index: usize,
    replica: Arc<Replica>,
}

/// What happens when the response's last byte is through.
#[derive(Debug)]
struct End {
    record: Record,
    later: Option<Later>,
    _in_flight: InFlight,
}

impl Watch for End {
    fn end(&mut self, end: Result<Option<&HeaderMap>, &BodyError>) {
        if let Some(Later { destination, index, replica }) = self.later.take()
            && let Some(backend) = destination.backend(index)
            && let Ok(Some(trailers)) = end
            && let Some(code) = headers::grpc_status(trailers)
        {
            let verdict = (!is_server_fault(code), false);
            destination.answered(backend, &replica, verdict, destination.now());
        }
        self.record.end(end);
    }
}
