//! Metrics of the call path. Handles are resolved when configuration changes, never per request.

use parking_lot::Mutex;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// Upper bounds in seconds, as OpenTelemetry's semantic conventions advise, with finer steps below 5 ms.
const BUCKETS: [f64; 16] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    10.0,
];

/// The metric families of the call path.
#[derive(Clone, Debug)]
pub struct CallMetrics {
    requests: IntCounterVec,
    duration: HistogramVec,
    active: IntGaugeVec,
    /// Retries by service and what became of the wish: `sent`, `budget`, `body_too_large`, `unsafe`.
    retries: IntCounterVec,
    /// What policies did, by service and action.
    policies: IntCounterVec,
    /// Connections opened by us, by direction.
    pub connections: IntCounterVec,
    /// Connections accepted, by listener.
    pub accepted: IntCounterVec,
    /// Connections open now, by listener.
    pub open: IntGaugeVec,
    /// Connections refused or dropped, by listener and reason.
    pub refused: IntCounterVec,
    /// Endpoints known, by service.
    endpoints: IntGaugeVec,
}

impl CallMetrics {
    /// Registers the families.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str, labels: &[&str]| counter(registry, name, help, labels);
        let gauge = |name: &str, help: &str, labels: &[&str]| gauge(registry, name, help, labels);
        Ok(Self {
            duration: duration(registry)?,
            requests: counter(
                "duet_requests_total",
                "Finished calls. `error` is the RFC 9209 type where the mesh itself failed the call.",
                &["direction", "service", "peer", "status", "grpc_status", "error"],
            )?,
            active: gauge("duet_active_requests", "Calls in flight.", &["direction", "service"])?,
            retries: counter(
                "duet_retries_total",
                "Wishes to try again, by outcome: sent, budget, body_too_large, unsafe.",
                &["service", "outcome"],
            )?,
            policies: counter(
                "duet_policy_actions_total",
                "What policies did to calls, by direction, service and action.",
                &["direction", "service", "action"],
            )?,
            connections: counter(
                "duet_connections_opened_total",
                "Connections that this sidecar opened, by target: mesh or plaintext.",
                &["target"],
            )?,
            accepted: counter(
                "duet_connections_accepted_total",
                "Connections accepted, by listener.",
                &["listener"],
            )?,
            open: gauge("duet_open_connections", "Accepted connections open now.", &["listener"])?,
            refused: counter(
                "duet_connections_refused_total",
                "Accepted connections refused or dropped, by listener and reason.",
                &["listener", "reason"],
            )?,
            endpoints: gauge("duet_endpoints", "Endpoints known, by service.", &["service"])?,
        })
    }

    /// Counts a connection that ended because its peer sent what is not HTTP, with the reason if there is one.
    pub fn malformed(&self, listener: &'static str, reason: Option<&'static str>) {
        if let Some(reason) = reason {
            self.refused.with_label_values(&[listener, reason]).inc();
        }
    }

    /// Handles for calls to one service.
    #[must_use]
    pub fn service(&self, direction: &'static str, service: &str) -> ServiceMetrics {
        ServiceMetrics {
            direction,
            duration: self.duration.with_label_values(&[direction, service]),
            active: self.active.with_label_values(&[direction, service]),
            retried: self.retries.with_label_values(&[service, "sent"]),
            endpoints: self.endpoints.with_label_values(&[service]),
            outcomes: Mutex::new(Vec::new()),
            family: self.clone(),
            service: service.to_owned(),
        }
    }
}

fn counter(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntCounterVec> {
    let family = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

fn gauge(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntGaugeVec> {
    let family = IntGaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

fn duration(registry: &Registry) -> prometheus::Result<HistogramVec> {
    let options = HistogramOpts::new(
        "duet_request_duration_seconds",
        "Time from a call's first to its last byte, by direction and service.",
    );
    let family = HistogramVec::new(options.buckets(BUCKETS.to_vec()), &["direction", "service"])?;
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

/// How a call ended, as the labels of `duet_requests_total` say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Status sent to the caller.
    pub status: u16,
    /// gRPC status, where it was a gRPC call.
    pub grpc_status: Option<u16>,
    /// RFC 9209 error type, where the mesh failed.
    pub error: Option<&'static str>,
}

/// An outcome, the peer, and their counter.
type Seen = (Outcome, Box<str>, IntCounter);

/// Handles for calls to one service.
#[derive(Debug)]
pub struct ServiceMetrics {
    direction: &'static str,
    service: String,
    family: CallMetrics,
    /// Time to the last byte.
    pub duration: Histogram,
    /// In flight.
    pub active: IntGauge,
    /// Retries sent.
    pub retried: IntCounter,
    /// Endpoints known.
    pub endpoints: IntGauge,
    /// Few entries: outcomes seen, with their counters. A scan beats a hash at this size.
    outcomes: Mutex<Vec<Seen>>,
}

impl ServiceMetrics {
    /// Counts a finished call. `peer` is the other side's `namespace/account`.
    pub fn finished(&self, outcome: Outcome, peer: &str, seconds: f64) {
        self.duration.observe(seconds);
        let mut outcomes = self.outcomes.lock();
        let known = |(o, p, _): &&Seen| *o == outcome && **p == *peer;
        if let Some((_, _, counter)) = outcomes.iter().find(known) {
            counter.inc();
            return;
        }
        let grpc = outcome.grpc_status.map(|code| code.to_string()).unwrap_or_default();
        let counter = self.family.requests.with_label_values(&[
            self.direction,
            &self.service,
            peer,
            &outcome.status.to_string(),
            &grpc,
            outcome.error.unwrap_or_default(),
        ]);
        counter.inc();
        outcomes.push((outcome, peer.into(), counter));
    }

    /// Counts something that a policy did: `ejected`, `shed` and so on, from a fixed list.
    pub fn policy(&self, action: &'static str) {
        self.family.policies.with_label_values(&[self.direction, &self.service, action]).inc();
    }

    /// Counts a wish to retry that was not granted.
    pub fn retry_refused(&self, reason: &'static str) {
        self.family.retries.with_label_values(&[&self.service, reason]).inc();
    }
}
