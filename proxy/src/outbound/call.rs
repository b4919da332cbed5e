//! What the stages of one call share.

use std::time::Duration;

use http::uri::Authority;
use http::{HeaderMap, Response, StatusCode, Version, request};
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::attempt::{self, Answer, Tried};
use super::destination::Destination;
use super::rule::Rule;
use super::session::Token;
use super::{DEFAULT_TIMEOUT, timed_out};
use crate::error::{ErrorType, Failure, Progress};
use crate::http::body::{Body, Replay, Upload};
use crate::http::upgrade::Upgrade;
use crate::http::{deadline, headers};
use crate::policy::fault::Fate;
use crate::policy::retry::is_safe;
use crate::record::Record;

/// One call.
#[derive(Debug)]
pub(super) struct Call {
    pub head: request::Parts,
    pub authority: Authority,
    pub body: Option<CallBody>,
    /// The body of the newest try, where it is kept for others.
    pub replay: Option<Replay>,
    pub deadline: Option<Instant>,
    /// The deadline bounds the response's body too, and travels on.
    pub bounds_body: bool,
    pub grpc: bool,
    /// The caller wants another protocol on this connection.
    pub upgrade: Option<Upgrade>,
    /// What the response says besides to a cross-origin request.
    pub cross_origin: Option<Box<HeaderMap>>,
    /// The endpoint that the client got before.
    pub session: Option<Token>,
    pub record: Record,
}

/// The request's body, by whether another try may need it.
#[derive(Debug)]
pub(super) enum CallBody {
    None,
    Once(Incoming),
    Replay(Replay),
}

impl From<Upload> for CallBody {
    fn from(body: Upload) -> Self {
        match body {
            body if body.is_empty() => Self::None,
            Upload::Stream(body) => Self::Once(body),
            Upload::Whole(bytes) => Self::Replay(Replay::whole(bytes)),
        }
    }
}

impl From<CallBody> for Body {
    fn from(body: CallBody) -> Self {
        match body {
            CallBody::Once(body) => Self::Incoming(body),
            CallBody::Replay(body) => Self::Replay(body),
            CallBody::None => Self::Empty,
        }
    }
}

impl Call {
    pub(super) fn new(
        mut head: request::Parts,
        authority: Authority,
        body: CallBody,
        rule: &Rule,
        record: Record,
    ) -> Self {
        let kept = match rule.mirrors.is_empty() {
            true if rule.retry.attempts == 0 => 0,
            _ => rule.retry.max_body_bytes,
        };
        let body = match body {
            // Of one that came by HTTP/1 it has to be known how much was read, even where nothing is kept.
            CallBody::Once(body) if kept > 0 || head.version < Version::HTTP_2 => {
                CallBody::Replay(Replay::new(body, kept))
            }
            CallBody::None | CallBody::Once(_) | CallBody::Replay(_) => body,
        };
        let grpc = record.is_grpc();
        let (limit, bounds_body) = limit(&head, rule, grpc);
        let started = record.started().unwrap_or_else(Instant::now);
        let deadline = limit.map(|limit| started + limit);
        if let Some(limit) = limit.filter(|_| bounds_body) {
            // Once for all tries, which then have room for it in their copies of the head.
            deadline::write(&mut head.headers, limit, grpc);
        }
        Self {
            head,
            authority,
            body: Some(body),
            replay: None,
            deadline,
            bounds_body,
            grpc,
            upgrade: None,
            cross_origin: None,
            session: None,
            record,
        }
    }

    /// Before a try takes the body.
    pub(super) fn keep_handle(&mut self) {
        self.replay = match &self.body {
            Some(CallBody::Replay(replay)) => Some(replay.handle()),
            _ => None,
        };
    }

    pub(super) fn fail(&mut self, failure: Failure) -> Failure {
        self.record.fail(&failure);
        failure
    }

    /// A second try beside the first is safe, and has a body to send.
    pub(super) fn may_hedge(&self) -> bool {
        let bodiless = matches!(self.body, Some(CallBody::None));
        bodiless
            && self.upgrade.is_none()
            && headers::is_idempotent(&self.head.method, &self.head.headers)
    }

    /// Whether a wait leaves time for another try.
    pub(super) fn has_time_for(&self, wait: Duration) -> bool {
        self.deadline.is_none_or(|deadline| Instant::now() + wait < deadline)
    }

    /// What a policy does to it on purpose.
    pub(super) async fn suffer(
        &mut self,
        fate: Fate,
        rule: &Rule,
        destination: &Destination,
    ) -> Result<(), Failure> {
        if let Some(delay) = fate.delay {
            destination.metrics.policy("fault_delay");
            let until = Instant::now() + delay;
            let deadline = self.deadline.filter(|deadline| *deadline < until);
            tokio::time::sleep_until(deadline.unwrap_or(until)).await;
            if deadline.is_some() {
                let failure = timed_out(self, destination);
                return Err(self.fail(failure));
            }
        }
        let Some((fault, _)) = rule.fault.as_ref().filter(|_| fate.abort) else {
            return Ok(());
        };
        destination.metrics.policy("fault_abort");
        let status = StatusCode::from_u16(fault.abort_status);
        let text = "a policy makes this call fail on purpose (fault injection)";
        let mut failure = Failure::new(ErrorType::ProxyInternalResponse, text)
            .with_status(status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE));
        failure.grpc_status = Some(fault.abort_grpc_status).filter(|code| *code != 0);
        Err(self.fail(failure))
    }

    /// The body for another try, if there is to be one.
    pub(super) fn again(
        &mut self,
        progress: Progress,
        destination: &Destination,
        rule: &Rule,
        tried: &Tried<'_>,
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
        let has_all = match (&self.body, &self.replay) {
            // Left in place when the try failed before it took the body.
            (Some(_), _) => true,
            (None, Some(replay)) => replay.has_all(),
            (None, None) => false,
        };
        if !has_all {
            return refuse("body_too_large");
        }
        // Before the body is taken from the former try, which may be the last one.
        if !destination.budget().retry(destination.seconds()) {
            return refuse("budget");
        }
        self.body.take().or_else(|| self.replay.as_ref()?.again().map(CallBody::Replay))
    }

    pub(super) fn finish(
        &mut self,
        mut answer: Answer<'_>,
        rule: &Rule,
        force: &CancellationToken,
    ) -> Response<Body> {
        if let Some(upgrade) = self.upgrade.take() {
            answer.switch(upgrade, force);
        }
        attempt::respond(answer, self, rule)
    }
}

/// How long a call may take, and whether that bounds the response's body: as the route says, or as the caller's own
/// deadline leaves, whichever is shorter; else the default, which nobody asked for and which cuts no stream.
fn limit(head: &request::Parts, rule: &Rule, grpc: bool) -> (Option<Duration>, bool) {
    let own = rule.request_timeout.filter(|limit| !limit.is_zero());
    let left = deadline::read(&head.headers, grpc);
    match (own.into_iter().chain(left).min(), rule.request_timeout) {
        (Some(limit), _) => (Some(limit), true),
        (None, Some(_none)) => (None, true),
        // gRPC has deadlines of its own, and a stream's headers may come with its first message only.
        (None, None) => (Some(DEFAULT_TIMEOUT).filter(|_| !grpc), false),
    }
}
