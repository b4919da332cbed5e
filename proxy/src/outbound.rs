//! The life of an outgoing call: authority -> destination -> route -> filters -> { endpoint, connection, try }
//! with retries and hedges -> response filters. Each stage knows only its own part; this file knows their order.
//!
//! Imports the stages (rank 5 and lower), never `inbound` or `relay`.

pub mod attempt;
mod call;
pub mod choose;
pub mod destination;
mod left;
mod mirror;
pub mod replica;
mod resolve;
pub mod rule;
pub mod session;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Authority;
use http::{Method, Request, Response, request};
use rand::Rng as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::discovery::Discovery;
use crate::error::{ErrorType, Failure, Progress};
use crate::http::body::{Body, Upload};
use crate::http::headers;
use crate::http::reply::{self, Asked};
use crate::http::upgrade::Upgrade;
use crate::policy::retry::Pushback;
use crate::record::Record;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::metrics::{CallMetrics, ServiceMetrics};

use attempt::{Answer, Failed, Tried, Try};
use call::{Call, CallBody};
use destination::{Config, Context, Destination};
use left::Left;
use mirror::Copies;
use resolve::Destinations;
use rule::Rule;

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
    /// Reads what nobody wanted.
    tasks: TaskTracker,
}

impl Outbound {
    /// One per worker; `context` is what its destinations share, `force` ends upgraded connections.
    #[must_use]
    pub fn new(
        discovery: Discovery<Config>,
        context: Context,
        (metrics, access_log): (CallMetrics, AccessLog),
        force: CancellationToken,
    ) -> Self {
        let unknown = (Arc::new(metrics.service("outbound", "unknown")), Arc::from("unknown"));
        let tasks = context.connector.tasks().clone();
        let destinations = Destinations::new(discovery, Arc::new(context), metrics);
        Self { destinations, access_log, unknown, nobody: Arc::from(""), force, tasks }
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
    pub async fn call(&self, request: Request<Upload>) -> Response<Body> {
        let asked = Asked::of(request.headers());
        let (head, body) = request.into_parts();
        let (metrics, service) = &self.unknown;
        let of = (Arc::clone(metrics), service, Arc::clone(&self.nobody));
        let mut record = Record::new("outbound", &head, asked, &self.access_log, of);
        let mut left = Left::of(&head, body);
        let mut response = match self.route(head, &mut left, &mut record).await {
            Ok(response) => response,
            Err(failure) => {
                tracing::debug!(error = %failure, "outbound call failed");
                let response = reply::failure(&failure, asked);
                record.fail(&failure);
                response
            }
        };
        if left.holds_up() {
            // Boxed, as the rare path, so that the common one's future stays small.
            Box::pin(left.settle(&mut response, &self.tasks)).await;
        }
        response
    }

    async fn route(
        &self,
        mut head: request::Parts,
        left: &mut Left,
        record: &mut Record,
    ) -> Result<Response<Body>, Failure> {
        if head.method == Method::CONNECT {
            let text =
                "CONNECT is for destinations outside the mesh, which this sidecar does not dial";
            return Err(Failure::new(ErrorType::HttpRequestDenied, text));
        }
        let mut authority = headers::authority(&head)?;
        let dialled = headers::destination(&head.headers)?;
        let destination = self.destinations.get(dialled.as_ref().unwrap_or(&authority)).await?;
        record.destination(&destination.metrics, destination.service());
        let upgrade = Upgrade::take(&mut head);
        headers::strip_all(&mut head.headers);
        let rule = destination.find(&head)?;
        record.route(&rule.route);
        if let Some(answer) = without_calling(&head, &authority, rule) {
            record.answered(answer.status(), answer.headers());
            record.end(Ok(None));
            return Ok(answer);
        }
        let cross_origin = rule.filters.cors().and_then(|cors| cors.response(&head));
        let session = rule.session.as_ref().and_then(|session| session.read(&head));
        let fate = fate(rule, &head);
        rule.filters.apply_request(&mut head, &mut authority);
        let mut call = Call::new(head, authority, left.take(), rule, record.take());
        call.upgrade = upgrade;
        call.cross_origin = cross_origin.map(Box::new);
        call.session = session;
        let suffered = match fate {
            Some(fate) => call.suffer(fate, rule, &destination).await,
            None => Ok(()),
        };
        let answer = match suffered {
            Ok(()) => self.copied(&mut call, &destination, rule).await,
            Err(failure) => Err(failure),
        };
        left.back(&mut call, answer.is_ok());
        answer
    }

    /// The tries, and copies beside them.
    async fn copied(
        &self,
        call: &mut Call,
        destination: &Arc<Destination>,
        rule: &Rule,
    ) -> Result<Response<Body>, Failure> {
        let copies = Copies::of(call, rule);
        let (now, later) = match copies {
            Some(copies) if copies.is_ready() => (Some(copies), None),
            copies => (None, copies),
        };
        if let Some(copies) = now {
            copies.send(destination);
        }
        let answer = self.tries(call, destination, rule).await;
        if let Some(copies) = later {
            copies.send(destination);
        }
        answer
    }

    /// The retry loop. One owner of retries: nobody behind this sidecar repeats anything.
    async fn tries(
        &self,
        call: &mut Call,
        destination: &Arc<Destination>,
        rule: &Rule,
    ) -> Result<Response<Body>, Failure> {
        let mut started = Instant::now();
        destination.budget().request(destination.at(started).as_secs());
        let mut tried = Tried::default();
        loop {
            call.keep_handle();
            let deadline = call.deadline;
            let outcome = {
                let attempt = std::pin::pin!(one(call, (destination, rule), &mut tried, started));
                in_time(attempt, deadline).await
            };
            let Some(outcome) = outcome else {
                let failure = timed_out(call, destination);
                return Err(call.fail(failure));
            };
            let progress = match &outcome {
                Ok(answer) => attempt::progress(answer, rule),
                Err(failure) => Some(failure.progress),
            };
            let again = progress.and_then(|progress| {
                let wait = wait(progress, &outcome, rule, &tried);
                let wait = wait.filter(|wait| call.has_time_for(*wait))?;
                let body = call.again(progress, destination, rule, &tried)?;
                Some((body, wait))
            });
            let Some((body, wait)) = again else {
                return match outcome {
                    Ok(answer) => Ok(call.finish(answer, rule, &self.force)),
                    Err(failure) => Err(call.fail(failure)),
                };
            };
            let unprocessed = progress == Some(Progress::Unprocessed);
            drop(outcome);
            // What was not processed goes to another endpoint at once, the first time.
            if !(unprocessed && tried.count() == 1) {
                tokio::time::sleep(wait).await;
            }
            call.body = Some(body);
            destination.metrics.retried.inc();
            started = Instant::now();
        }
    }
}

/// Answers that need nobody else: to a browser's preflight, and redirects.
fn without_calling(
    head: &request::Parts,
    authority: &Authority,
    rule: &Rule,
) -> Option<Response<Body>> {
    let preflight = rule.filters.cors().and_then(|cors| cors.preflight(head));
    preflight.or_else(|| rule.filters.redirect(head, authority))
}

/// What a policy does to the call on purpose.
fn fate(rule: &Rule, head: &request::Parts) -> Option<crate::policy::fault::Fate> {
    let (fault, condition) = rule.fault.as_ref()?;
    condition.find(head)?;
    let mut rng = rand::rng();
    Some(fault.decide((rng.random_range(0..1_000_000), rng.random_range(0..1_000_000))))
}

/// One try, or two where the first is slow and a policy says so. Leaves the body where it is untouched.
async fn one<'d>(
    call: &mut Call,
    (destination, rule): (&'d Arc<Destination>, &'d Rule),
    tried: &mut Tried<'d>,
    started: Instant,
) -> Result<Answer<'d>, Failure> {
    let first = attempt::prepare(call, (destination, rule), tried, started)?;
    let hedging = rule.hedging.as_ref().filter(|_| call.may_hedge());
    let second = destination.at(started).as_secs();
    let outcome = match hedging.and_then(|hedging| hedging.request(second)) {
        // Boxed, as the rare path, so that the common one's future stays small.
        Some(after) => Box::pin(hedged(call, (destination, rule), tried, (first, after))).await,
        None => first.run().await,
    };
    if let (Some(hedging), Ok(answer)) = (hedging, &outcome)
        && answer.is_good()
    {
        hedging.answered(started.elapsed(), destination.seconds());
    }
    outcome.map_err(|Failed { failure, body }| {
        if body.is_some() {
            call.body = body;
        }
        failure
    })
}

/// The first try, and another one beside it when that takes long; the first good answer counts.
async fn hedged<'d>(
    call: &mut Call,
    (destination, rule): (&'d Arc<Destination>, &'d Rule),
    tried: &mut Tried<'d>,
    (first, after): (Try<'d>, Duration),
) -> Result<Answer<'d>, Failed> {
    let mut first = std::pin::pin!(first.run());
    tokio::select! {
        biased;
        outcome = &mut first => return outcome,
        () = tokio::time::sleep(after) => {}
    }
    let now = Instant::now();
    let second = destination.at(now).as_secs();
    let granted = rule.hedging.as_ref().is_some_and(|hedging| hedging.take(second))
        && destination.budget().retry(second);
    let Some(Ok(second)) = granted.then(|| attempt::prepare(call, (destination, rule), tried, now))
    else {
        return first.await;
    };
    destination.metrics.policy("hedged");
    let mut second = std::pin::pin!(second.run());
    let good = |outcome: &Result<Answer<'_>, Failed>| outcome.as_ref().is_ok_and(Answer::is_good);
    tokio::select! {
        outcome = &mut first => if good(&outcome) { outcome } else { second.await },
        outcome = &mut second => {
            if good(&outcome) {
                destination.metrics.policy("hedge_won");
                outcome
            } else {
                first.await
            }
        }
    }
}

/// The wait before another try; `None`: the server wants none.
fn wait(
    progress: Progress,
    outcome: &Result<Answer<'_>, Failure>,
    rule: &Rule,
    tried: &Tried<'_>,
) -> Option<Duration> {
    let own = rule.retry.wait(tried.count(), rand::random());
    let answer = outcome.as_ref().ok().filter(|_| progress != Progress::Unprocessed);
    match answer.and_then(|answer| Pushback::of(answer.headers())) {
        Some(pushback) => pushback.wait(own),
        None => Some(own),
    }
}

/// The outcome; `None` when the deadline comes first.
async fn in_time<F: Future>(work: Pin<&mut F>, deadline: Option<Instant>) -> Option<F::Output> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}

fn timed_out(call: &Call, destination: &Destination) -> Failure {
    let waited = call.record.elapsed();
    let text = format!("{} did not answer within {:.1?}", destination.service(), waited);
    Failure::new(ErrorType::HttpResponseTimeout, text)
}
