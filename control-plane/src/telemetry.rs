//! Set-up of the process's own log, and every metric of the control plane in one place, so that their names can be
//! read together. Imports nothing of this crate.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use prometheus::{
    IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, core::Collector,
};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends `tracing` events to standard error. A log that is set up already stays.
///
/// # Errors
/// When the filter does not parse.
pub fn init_log(format: Option<LogFormat>, filter: &str) -> anyhow::Result<()> {
    let filter: Targets = filter.parse().with_context(|| format!("--log-level {filter}"))?;
    let terminal = std::io::stderr().is_terminal();
    let default = if terminal { LogFormat::Text } else { LogFormat::Json };
    let builder =
        tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_writer(std::io::stderr);
    let outcome = match format.unwrap_or(default) {
        LogFormat::Text => {
            builder.with_ansi(terminal).with_target(false).finish().with(filter).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).finish().with(filter).try_init(),
    };
    if outcome.is_err() {
        tracing::debug!("the log was set up before");
    }
    Ok(())
}

/// Every metric of the control plane, except the event bus's own. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Errors in the configuration as it stands.
    pub config_errors: IntGauge,
    /// Changes of configuration that were applied.
    pub config_applied: IntCounter,
    /// Reads of configuration that found errors.
    pub config_rejected: IntCounter,
    /// Resources in use, by kind.
    pub resources: IntGaugeVec,
    /// Open connections of the gRPC port.
    pub connections: IntGauge,
    /// Connections that ended before the first request, by reason.
    pub refused_connections: IntCounterVec,
    /// Open `Watch` streams.
    pub watches: IntGauge,
    /// Destinations subscribed on all streams.
    pub subscriptions: IntGauge,
    /// Updates sent, by kind: `workload`, `config`, `not_found`, `endpoints`.
    pub updates: IntCounterVec,
    /// Updates acknowledged.
    pub acks: IntCounter,
    /// Updates that a sidecar could not use.
    pub rejects: IntCounter,
    /// Replicas registered, by readiness.
    pub replicas: IntGaugeVec,
    /// Registrations that ended, by cause: `closed`, `lease`.
    pub registrations_ended: IntCounterVec,
    /// Certificates signed, by how the caller proved who it is: `token`, `renewal`.
    pub certificates: IntCounterVec,
    /// Requests refused, by service and reason.
    pub refused: IntCounterVec,
    /// By bus: 1 if it is open, 0 if it cannot be opened.
    pub open_buses: IntGaugeVec,
    /// Open consumers of the event bus.
    pub consumers: IntGauge,
    /// Events that a subscription's filter or routes leave out.
    pub filtered: IntCounterVec,
    /// Expressions that could not be evaluated on an event.
    pub filter_errors: IntCounterVec,
    /// What policies have to say on topics, by operation and decision: `denied`, `audited`.
    pub authorizations: IntCounterVec,
}

impl Metrics {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When one of the names is registered already.
    #[expect(clippy::too_many_lines, reason = "a list of all metrics")]
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        register_process(registry)?;
        let r = Register(registry);
        Ok(Self {
            config_errors: r.gauge("config_errors", "Errors in the configuration as it stands.")?,
            config_applied: r.counter("config_applied_total", "Configuration changes applied.")?,
            config_rejected: r
                .counter("config_rejected_total", "Reads of configuration that found errors.")?,
            resources: r.gauges("config_resources", "Resources in use.", &["kind"])?,
            connections: r
                .gauge("control_plane_connections", "Open connections of the gRPC port.")?,
            refused_connections: r.counters(
                "control_plane_refused_connections_total",
                "Connections that ended before the first request.",
                &["reason"],
            )?,
            watches: r.gauge("control_plane_watches", "Open watch streams.")?,
            subscriptions: r
                .gauge("control_plane_subscriptions", "Destinations subscribed, all streams.")?,
            updates: r.counters(
                "control_plane_updates_total",
                "Updates sent to sidecars.",
                &["kind"],
            )?,
            acks: r.counter("control_plane_acks_total", "Updates acknowledged by sidecars.")?,
            rejects: r
                .counter("control_plane_rejects_total", "Updates that a sidecar could not use.")?,
            replicas: r.gauges("control_plane_replicas", "Registered replicas.", &["ready"])?,
            registrations_ended: r.counters(
                "control_plane_registrations_ended_total",
                "Registrations that ended.",
                &["cause"],
            )?,
            certificates: r.counters(
                "control_plane_certificates_total",
                "Certificates signed.",
                &["method"],
            )?,
            refused: r.counters(
                "control_plane_refused_requests_total",
                "Requests refused.",
                &["service", "reason"],
            )?,
            open_buses: r.gauges(
                "open_buses",
                "1 for a bus that is open, 0 for one that cannot be opened.",
                &["bus"],
            )?,
            consumers: r.gauge("control_plane_consumers", "Open consumers of the event bus.")?,
            filtered: r.counters(
                "bus_filtered_total",
                "Events that a subscription's filter or routes left out.",
                &["subscription"],
            )?,
            filter_errors: r.counters(
                "bus_filter_errors_total",
                "Events on which a subscription's filter or routes could not be evaluated.",
                &["subscription"],
            )?,
            authorizations: r.counters(
                "bus_authorizations_total",
                "Publishes and subscriptions that policies denied or took note of.",
                &["operation", "decision"],
            )?,
        })
    }
}

/// Process facts under the names that Prometheus clients share.
fn register_process(registry: &Registry) -> prometheus::Result<()> {
    let build = IntGaugeVec::new(
        Opts::new("duet_build_info", "Always 1; the version is in the label."),
        &["version", "component"],
    )?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION"), "control-plane"]).set(1);
    registry.register(Box::new(build))?;
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    Ok(())
}

/// Puts the prefix in front and registers.
struct Register<'a>(&'a Registry);

impl Register<'_> {
    fn add<C: Collector + Clone + 'static>(&self, metric: C) -> prometheus::Result<C> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::with_opts(Opts::new(format!("duet_{name}"), help))?)
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(Opts::new(format!("duet_{name}"), help), labels)?)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::with_opts(Opts::new(format!("duet_{name}"), help))?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(format!("duet_{name}"), help), labels)?)
    }
}

/// Raises a gauge for as long as it lives.
#[derive(Debug)]
pub struct Counted(IntGauge);

impl Counted {
    /// One more now, one less when dropped.
    #[must_use]
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
