//! The life of an outgoing call: authority -> destination -> route -> filters -> { endpoint, connection, try }
//! with retries -> response filters. Each stage knows only its own part; this file knows their order.
//!
//! Imports the stages (rank 5 and lower), never `inbound` or `relay`.

pub mod attempt;
pub mod destination;
mod resolve;

use std::sync::Arc;
use std::time::Duration;

use http::uri::Authority;
use http::{Method, Request, Response, request};
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::discovery::Discovery;
use crate::error::{ErrorType, Failure, Progress};
use crate::http::body::{Body, Replay};
use crate::http::headers;
use crate::http::reply::{self, Asked};
use crate::http::upgrade::Upgrade;
use crate::policy::retry::is_safe;
use crate::record::Record;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::metrics::{CallMetrics, ServiceMetrics};

use attempt::Tried;
use destination::{Config, Destination, Rule};
use resolve::Destinations;

/// Bound on the wait for response headers where no policy says anything.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// The outgoing side of one worker. Also used by the API server, for invocations.
#[derive(Debug)]
pub struct Outbound {
    destinations: Destinations,
    access_log: AccessLog,
    /// Counts calls to names that nobody knows.
    unknown: (Arc<ServiceMetrics>, Arc<str>),
    nobody: Arc<str>,
    /// Ends upgraded connections.
    force: CancellationToken,
}

/// What the stages of one call share.
struct Call {
    head: request::Parts,
    authority: Authority,
    body: Option<CallBody>,
    deadline: Option<Instant>,
    /// The deadline bounds the response's body too.
    bounds_body: bool,
    /// The caller wants another protocol on this connection.
    upgrade: Option<Upgrade>,
    record: Record,
}

/// The request's body, by whether another try may need it.
enum CallBody {
    None,
    Once(Incoming),
    Replay(Replay),
}

impl Outbound {
    /// One per worker; `connector` makes its connections, `force` ends upgraded ones.
    #[must_use]
    pub fn new(
        discovery: Discovery<Config>,
        connector: crate::connect::SharedConnector,
        (metrics, access_log): (CallMetrics, AccessLog),
        force: CancellationToken,
    ) -> Self {
        let unknown = (Arc::new(metrics.service("outbound", "unknown")), Arc::from("unknown"));
        let destinations = Destinations::new(discovery, connector, metrics);
        Self { destinations, access_log, unknown, nobody: Arc::from(""), force }
    }

    /// Lets go of destinations that were not used for long; to be called about once a minute.
    pub fn sweep(&self) {
        self.destinations.sweep();
    }

    /// Closes idle connections of no more use; to be called every few seconds.
    pub fn sweep_idle(&self) {
        self.destinations.sweep_idle();
    }

    /// Carries one request to where it belongs. Always answers: failures become responses.
    pub async fn call(&self, request: Request<Incoming>) -> Response<Body> {
        let asked = Asked::of(request.headers());
        let (head, body) = request.into_parts();
        let (metrics, service) = self.unknown.clone();
        let of = (metrics, service, Arc::clone(&self.nobody));
        let mut record = Record::new("outbound", &head, asked, &self.access_log, of);
        match self.route(head, body, &mut record).await {
            Ok(response) => response,
            Err(failure) => {
                tracing::debug!(error = %failure, "outbound call failed");
                let response = reply::failure(&failure, asked);
                record.fail(&failure);
                response
            }
        }
    }

    async fn route(
        &self,
        mut head: request::Parts,
        body: Incoming,
        record: &mut Record,
    ) -> Result<Response<Body>, Failure> {
        if head.method == Method::CONNECT {
            let text =
                "CONNECT is for destinations outside the mesh, which this sidecar does not dial";
            return Err(Failure::new(ErrorType::HttpRequestDenied, text));
        }
        let mut authority = headers::authority(&head)?;
        let destination = self.destinations.get(&authority).await?;
        record.destination(&destination.metrics, destination.service());
        let upgrade = Upgrade::take(&mut head);
        headers::strip_all(&mut head.headers);
        let rule = destination.find(&head)?;
        record.route(&rule.route);
        if let Some(redirect) = rule.filters.redirect(&head, &authority) {
            record.answered(redirect.status(), redirect.headers());
            record.end(Ok(None));
            return Ok(redirect);
        }
        rule.filters.apply_request(&mut head, &mut authority);
        let mut call = Call::new(head, authority, body, rule, record.take());
        call.upgrade = upgrade;
        self.tries(call, &destination, rule).await
    }

    /// The retry loop. One owner of retries: nobody behind this sidecar repeats anything.
    async fn tries(
        &self,
        mut call: Call,
        destination: &Arc<Destination>,
        rule: &Rule,
    ) -> Result<Response<Body>, Failure> {
        let now = destination.seconds();
        destination.budget().request(now);
        let mut tried = Tried::default();
        loop {
            let replay = call.replay_handle();
            let outcome = match call.deadline {
                Some(deadline) => {
                    let attempt = attempt::run(&mut call, destination, rule, &mut tried);
                    match tokio::time::timeout_at(deadline, attempt).await {
                        Ok(outcome) => outcome,
                        Err(_elapsed) => {
                            let failure = timed_out(&call, destination);
                            return Err(call.fail(failure));
                        }
                    }
                }
                None => attempt::run(&mut call, destination, rule, &mut tried).await,
            };
            let progress = match &outcome {
                Ok(response) => attempt::progress(response, rule),
                Err(failure) => Some(failure.progress),
            };
            let again = match progress {
                Some(progress) => call.again(progress, destination, rule, &tried, replay.as_ref()),
                None => None,
            };
            let Some(body) = again else {
                return match outcome {
                    Ok(answer) => Ok(call.finish(answer, rule, &self.force)),
                    Err(failure) => Err(call.fail(failure)),
                };
            };
            let unprocessed = progress == Some(Progress::Unprocessed);
            let wait = rule.retry.wait(tried.count(), rand::random());
            drop(outcome);
            // What was not processed goes to another endpoint at once, the first time.
            if !(unprocessed && tried.count() == 1) {
                tokio::time::sleep(wait).await;
            }
            call.body = Some(body);
            destination.metrics.retried.inc();
        }
    }
}

fn timed_out(call: &Call, destination: &Destination) -> Failure {
    let waited = call.record.elapsed();
    let text = format!("{} did not answer within {:.1?}", destination.service(), waited);
    Failure::new(ErrorType::HttpResponseTimeout, text)
}

impl Call {
    fn new(
        head: request::Parts,
        authority: Authority,
        body: Incoming,
        rule: &Rule,
        record: Record,
    ) -> Self {
        use http_body::Body as _;
        let body = if body.is_end_stream() {
            CallBody::None
        } else if rule.retry.attempts == 0 || rule.retry.max_body_bytes == 0 {
            CallBody::Once(body)
        } else {
            CallBody::Replay(Replay::new(body, rule.retry.max_body_bytes))
        };
        let (limit, bounds_body) = match rule.request_timeout {
            Some(limit) => (Some(limit).filter(|limit| !limit.is_zero()), true),
            // gRPC has deadlines of its own, and a stream's headers may come with its first message only: a
            // bound that nobody asked for must not cut it.
            None => (Some(DEFAULT_TIMEOUT).filter(|_| !headers::is_grpc(&head.headers)), false),
        };
        let deadline = limit.map(|limit| Instant::now() + limit);
        Self { head, authority, body: Some(body), deadline, bounds_body, upgrade: None, record }
    }

    fn replay_handle(&self) -> Option<Replay> {
        match &self.body {
            Some(CallBody::Replay(replay)) => Some(replay.handle()),
            _ => None,
        }
    }

    fn fail(&mut self, failure: Failure) -> Failure {
        self.record.fail(&failure);
        failure
    }

    /// The body for another try, if there is to be one.
    fn again(
        &mut self,
        progress: Progress,
        destination: &Destination,
        rule: &Rule,
        tried: &Tried,
        replay: Option<&Replay>,
    ) -> Option<CallBody> {
        if progress == Progress::Final || tried.count() > rule.retry.attempts {
            return None;
        }
        let refuse = |reason| {
            destination.metrics.retry_refused(reason);
            None
        };
        if !is_safe(progress, &self.head.method, &self.head.headers) {
            return refuse("unsafe");
        }
        // Left in place when the try failed before it took the body.
        let body = match (self.body.take(), replay) {
            (Some(body), _) => Some(body),
            (None, Some(replay)) => replay.again().map(CallBody::Replay),
            (None, None) => None,
        };
        let Some(body) = body else {
            return refuse("body_too_large");
        };
        if !destination.budget().retry(destination.seconds()) {
            return refuse("budget");
        }
        Some(body)
    }

    fn finish(
        self,
        mut answer: attempt::Answer<'_>,
        rule: &Rule,
        force: &CancellationToken,
    ) -> Response<Body> {
        if let Some(upgrade) = self.upgrade {
            answer.switch(upgrade, force);
        }
        let deadline = self.deadline.filter(|_| self.bounds_body);
        attempt::respond(answer, self.record, rule, (deadline, rule.idle_timeout))
    }
}
