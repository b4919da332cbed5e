//! Numbers of a log. Labels are names that operators declare, and still bounded.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

use crate::bus::SubscriptionStatus;
use crate::metrics::{Forget as _, Labels, Registration, SubscriptionGauges};

const EXPIRED: (&str, &str) = (
    "duet_bus_expired_events_total",
    "Events done without a delivery because their expirytime had passed.",
);
const DROPPED: (&str, &str) = (
    "duet_bus_dropped_events_total",
    "Events that retention took before they were handled, once for each subscription.",
);

/// Counters of one log.
#[derive(Clone, Debug)]
pub(crate) struct LogMetrics {
    published: IntCounterVec,
    duplicates: IntCounterVec,
    dead_letters: IntCounterVec,
    expired: IntCounterVec,
    dropped: IntCounterVec,
    waiting: SubscriptionGauges,
    pub(super) flush_seconds: Histogram,
    pub(super) group_events: Histogram,
    pub(super) damaged_records: IntCounter,
    pub(super) store_failures: IntCounter,
    pub(super) refused_events: IntCounter,
    topics: Labels,
    subscriptions: Labels,
    registration: Option<Registration>,
}

impl LogMetrics {
    /// Registers the metrics of the bus of this name.
    ///
    /// # Errors
    /// When the registry has them already.
    pub(crate) fn register(registry: &Registry, bus: &str) -> prometheus::Result<Self> {
        let (metrics, registration) = (Self::new(bus)?, Registration::new(registry));
        registration.add(metrics.published.clone())?;
        registration.add(metrics.duplicates.clone())?;
        registration.add(metrics.dead_letters.clone())?;
        registration.add(metrics.expired.clone())?;
        registration.add(metrics.dropped.clone())?;
        metrics.waiting.add_to(&registration)?;
        metrics.add_own(&registration)?;
        Ok(Self { registration: Some(registration), ..metrics })
    }

    /// Registers only what concerns the store, for a log that is no bus.
    pub(crate) fn register_store(registry: &Registry, log: &str) -> prometheus::Result<Self> {
        let metrics = Self::new(log)?;
        let registration = Registration::new(registry);
        metrics.add_own(&registration)?;
        Ok(Self { registration: Some(registration), ..metrics })
    }

    /// Leaves the registry, for another log of the same name.
    pub(crate) fn end(&self) {
        if let Some(registration) = &self.registration {
            registration.end();
        }
    }

    fn add_own(&self, registration: &Registration) -> prometheus::Result<()> {
        registration.add(self.flush_seconds.clone())?;
        registration.add(self.group_events.clone())?;
        registration.add(self.damaged_records.clone())?;
        registration.add(self.store_failures.clone())?;
        registration.add(self.refused_events.clone())?;
        Ok(())
    }

    fn new(name: &str) -> prometheus::Result<Self> {
        let bus = |metric: &str, help: &str| Opts::new(metric, help).const_label("bus", name);
        let counters = |metric, help, label| IntCounterVec::new(bus(metric, help), &[label]);
        let log = |metric: &str, help: &str| Opts::new(metric, help).const_label("log", name);
        let counter = |metric, help| IntCounter::with_opts(log(metric, help));
        let histogram = |metric, help, buckets: prometheus::Result<Vec<f64>>| {
            let common_opts = log(metric, help);
            Histogram::with_opts(HistogramOpts { common_opts, buckets: buckets? })
        };
        Ok(Self {
            published: counters(
                "duet_bus_published_events_total",
                "Events stored, without duplicates.",
                "topic",
            )?,
            duplicates: counters(
                "duet_bus_duplicate_events_total",
                "Events not stored because the deduplication window held them already.",
                "topic",
            )?,
            dead_letters: counters(
                "duet_bus_dead_letters_total",
                "Events moved to a dead-letter topic.",
                "subscription",
            )?,
            expired: counters(EXPIRED.0, EXPIRED.1, "subscription")?,
            dropped: counters(DROPPED.0, DROPPED.1, "topic")?,
            waiting: SubscriptionGauges::new(name)?,
            flush_seconds: histogram(
                "duet_log_flush_duration_seconds",
                "Time of one commit, with its flush to disk.",
                prometheus::exponential_buckets(0.000_1, 2.0, 15),
            )?,
            group_events: histogram(
                "duet_log_flush_group_events",
                "Events that shared one flush.",
                prometheus::exponential_buckets(1.0, 4.0, 7),
            )?,
            damaged_records: counter(
                "duet_log_damaged_records_total",
                "Records skipped because their checksum was wrong or they were missing.",
            )?,
            store_failures: counter(
                "duet_log_store_failures_total",
                "Times that the store failed and was opened anew.",
            )?,
            refused_events: counter(
                "duet_log_refused_events_total",
                "Events, and dead letters, refused because the disk was nearly full.",
            )?,
            topics: Labels::default(),
            subscriptions: Labels::default(),
            registration: None,
        })
    }

    /// Metrics that nobody reads.
    #[cfg(test)]
    pub(crate) fn unregistered() -> Self {
        Self::new("test").unwrap()
    }

    /// Commits so far.
    #[cfg(test)]
    pub(crate) fn flushes(&self) -> u64 {
        self.flush_seconds.get_sample_count()
    }

    /// Damaged records so far.
    #[cfg(test)]
    pub(crate) fn damaged(&self) -> u64 {
        self.damaged_records.get()
    }

    /// Expired events of a subscription so far.
    #[cfg(test)]
    pub(crate) fn expired_of(&self, subscription: &str) -> u64 {
        self.expired.with_label_values(&[subscription]).get()
    }

    /// Dropped events of a topic so far.
    #[cfg(test)]
    pub(crate) fn dropped_of(&self, topic: &str) -> u64 {
        self.dropped.with_label_values(&[topic]).get()
    }

    /// Counts one acknowledged publish.
    pub(crate) fn published(&self, topic: &str, stored: u64, duplicates: u64) {
        let label = self.topics.bounded(topic);
        self.published.with_label_values(&[label]).inc_by(stored);
        if duplicates > 0 {
            self.duplicates.with_label_values(&[label]).inc_by(duplicates);
        }
    }

    pub(super) fn dead_letter(&self, subscription: &str) {
        let label = self.subscriptions.bounded(subscription);
        self.dead_letters.with_label_values(&[label]).inc();
    }

    pub(super) fn expired(&self, subscription: &str) {
        let label = self.subscriptions.bounded(subscription);
        self.expired.with_label_values(&[label]).inc();
    }

    pub(super) fn dropped(&self, topic: &str, events: u64) {
        let label = self.topics.bounded(topic);
        self.dropped.with_label_values(&[label]).inc_by(events);
    }

    pub(super) fn subscription(&self, status: &SubscriptionStatus, age_ms: u64) {
        self.waiting.set(self.subscriptions.bounded(&status.name), status, age_ms);
    }

    pub(super) fn forget_subscription(&self, name: &str) {
        self.waiting.forget(name);
        self.dead_letters.forget(name);
        self.expired.forget(name);
        self.subscriptions.forget(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_buses_share_a_registry() {
        let registry = Registry::new();
        let _default = LogMetrics::register(&registry, "default").unwrap();
        let _audit = LogMetrics::register(&registry, "audit").unwrap();
        assert!(LogMetrics::register(&registry, "audit").is_err());
    }
}
