//! What is remembered of a call until its end, when it is counted and logged: on success, on failure, and when
//! it is dropped because the caller left. Metric label, log field and reply come from the same outcome.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, request};
use tokio::time::Instant;

use crate::error::Failure;
use crate::http::body::BodyError;
use crate::http::headers::{TRACEPARENT, grpc_status};
use crate::http::reply::{Asked, grpc_code};
use crate::telemetry::access_log::{AccessLog, Entry};
use crate::telemetry::metrics::{Outcome, ServiceMetrics};

/// Status that is counted for a caller that left before the answer (as nginx has it).
const CLIENT_CLOSED: u16 = 499;

/// One call until its end.
#[derive(Debug)]
pub struct Record(Option<Open>);

#[derive(Debug)]
struct Open {
    started: Instant,
    direction: &'static str,
    asked: Asked,
    metrics: Arc<ServiceMetrics>,
    peer: Arc<str>,
    attempts: u32,
    status: u16,
    grpc_status: Option<u16>,
    error: Option<&'static str>,
    log: Option<Box<Logged>>,
}

/// What only the access log needs.
#[derive(Debug)]
struct Logged {
    log: AccessLog,
    service: Arc<str>,
    route: Option<Arc<str>>,
    method: http::Method,
    path: String,
    traceparent: Option<String>,
}

impl Record {
    /// Starts with a call's head. `metrics` and `service` are those of calls to nobody known, until
    /// [`Record::destination`] says more; `peer` is the other side.
    #[must_use]
    pub fn new(
        direction: &'static str,
        head: &request::Parts,
        asked: Asked,
        access_log: &AccessLog,
        (metrics, service, peer): (Arc<ServiceMetrics>, &Arc<str>, Arc<str>),
    ) -> Self {
        let log = access_log.is_on().then(|| {
            let traceparent = head.headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
            Box::new(Logged {
                log: access_log.clone(),
                service: Arc::clone(service),
                route: None,
                method: head.method.clone(),
                path: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
                traceparent: traceparent.map(str::to_owned),
            })
        });
        metrics.active.inc();
        Self(Some(Open {
            started: Instant::now(),
            direction,
            asked,
            metrics,
            peer,
            attempts: 0,
            status: CLIENT_CLOSED,
            grpc_status: None,
            error: None,
            log,
        }))
    }

    /// The call is for this service.
    pub fn destination(&mut self, metrics: &Arc<ServiceMetrics>, service: &Arc<str>) {
        if let Some(open) = &mut self.0 {
            open.metrics.active.dec();
            metrics.active.inc();
            open.metrics = Arc::clone(metrics);
            if let Some(logged) = &mut open.log {
                logged.service = Arc::clone(service);
            }
        }
    }

    /// The call matched this route.
    pub fn route(&mut self, route: &Arc<str>) {
        if let Some(logged) = self.0.as_mut().and_then(|open| open.log.as_mut()) {
            logged.route = Some(Arc::clone(route));
        }
    }

    /// Moves the call out; what stays records nothing.
    #[must_use]
    pub fn take(&mut self) -> Self {
        Self(self.0.take())
    }

    /// Whether it is a gRPC call.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        self.0.as_ref().is_some_and(|open| open.asked.is_grpc())
    }

    /// When it began.
    #[must_use]
    pub fn started(&self) -> Option<Instant> {
        self.0.as_ref().map(|open| open.started)
    }

    /// Since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.0.as_ref().map(|open| open.started.elapsed()).unwrap_or_default()
    }

    /// Tries made.
    pub fn attempts(&mut self, attempts: u32) {
        if let Some(open) = &mut self.0 {
            open.attempts = attempts;
        }
    }

    /// The response's head is on its way to the caller.
    pub fn answered(&mut self, status: http::StatusCode, headers: &HeaderMap) {
        if let Some(open) = &mut self.0 {
            open.status = status.as_u16();
            if open.asked.is_grpc() {
                open.grpc_status = grpc_status(headers);
            }
        }
    }

    /// Another sidecar failed the call; its `Proxy-Status` says why.
    pub fn failed_elsewhere(&mut self, error: &'static str) {
        if let Some(open) = &mut self.0 {
            open.error = Some(error);
        }
    }

    /// The mesh failed the call. Ends the record.
    pub fn fail(&mut self, failure: &Failure) {
        if let Some(open) = &mut self.0 {
            open.error = Some(failure.kind.name());
            open.status = if open.asked.is_grpc() { 200 } else { failure.status.as_u16() };
            open.grpc_status = open.asked.is_grpc().then(|| grpc_code(failure));
        }
        self.0.take().map(Open::end).unwrap_or_default();
    }

    /// The response's body ended. Ends the record.
    pub fn end(&mut self, end: Result<Option<&HeaderMap>, &BodyError>) {
        if let Some(open) = &mut self.0 {
            match end {
                Ok(Some(trailers)) if open.asked.is_grpc() => {
                    open.grpc_status = grpc_status(trailers).or(open.grpc_status);
                }
                Ok(_) => {}
                Err(BodyError::Timeout(_)) => open.error = Some("http_response_timeout"),
                Err(_) => open.error = Some("http_response_incomplete"),
            }
        }
        self.0.take().map(Open::end).unwrap_or_default();
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if let Some(mut open) = self.0.take() {
            // The caller left while it waited, or while it was reading.
            open.status = CLIENT_CLOSED;
            open.end();
        }
    }
}

impl Open {
    fn end(self) {
        let elapsed = self.started.elapsed();
        self.metrics.active.dec();
        let outcome =
            Outcome { status: self.status, grpc_status: self.grpc_status, error: self.error };
        self.metrics.finished(outcome, &self.peer, elapsed.as_secs_f64());
        let Some(logged) = &self.log else { return };
        logged.log.write(&Entry {
            time: jiff::Timestamp::now().to_string(),
            direction: self.direction,
            method: logged.method.as_str(),
            path: &logged.path,
            service: &logged.service,
            route: logged.route.as_deref().unwrap_or_default(),
            peer: &self.peer,
            status: self.status,
            grpc_status: self.grpc_status,
            error: self.error,
            attempts: self.attempts,
            duration_ms: elapsed.as_secs_f64() * 1000.0,
            traceparent: logged.traceparent.as_deref(),
        });
    }
}
