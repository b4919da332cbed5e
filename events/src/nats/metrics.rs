//! Numbers of a NATS bus, under the names that the embedded bus has for them.

use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::metrics::{Forget as _, Labels, Registration};

/// Counters of one bus.
#[derive(Clone, Debug)]
pub(super) struct NatsMetrics {
    published: IntCounterVec,
    duplicates: IntCounterVec,
    dead_letters: IntCounterVec,
    expired: IntCounterVec,
    lag: IntGaugeVec,
    oldest_seconds: GaugeVec,
    in_flight: IntGaugeVec,
    pub(super) unreadable: IntCounter,
    pub(super) connects: IntCounter,
    topics: Labels,
    subscriptions: Labels,
    registration: Registration,
}

impl NatsMetrics {
    pub(super) fn register(registry: &Registry, bus: &str) -> prometheus::Result<Self> {
        let registration = Registration::new(registry);
        let opts = |metric: &str, help: &str| Opts::new(metric, help).const_label("bus", bus);
        let counters = |metric, help, label| {
            registration.add(IntCounterVec::new(opts(metric, help), &[label])?)
        };
        let counter = |metric, help| registration.add(IntCounter::with_opts(opts(metric, help))?);
        let gauges = |metric, help| {
            registration.add(IntGaugeVec::new(opts(metric, help), &["subscription"])?)
        };
        let oldest = opts(
            "duet_bus_subscription_oldest_event_seconds",
            "Age of the oldest event not handled yet; 0 if there is none.",
        );
        Ok(Self {
            lag: gauges("duet_bus_subscription_lag_events", "Events not handled yet.")?,
            oldest_seconds: registration.add(GaugeVec::new(oldest, &["subscription"])?)?,
            in_flight: gauges(
                "duet_bus_subscription_in_flight_events",
                "Events that a consumer has now.",
            )?,
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
            expired: counters(
                "duet_bus_nats_expired_events_total",
                "Events not delivered because their expirytime had passed.",
                "subscription",
            )?,
            unreadable: counter(
                "duet_bus_nats_unreadable_messages_total",
                "Messages of a topic's stream that hold no valid event; they are dead-lettered.",
            )?,
            connects: counter(
                "duet_bus_nats_connects_total",
                "Connections to a NATS server, the first one included.",
            )?,
            topics: Labels::default(),
            subscriptions: Labels::default(),
            registration,
        })
    }

    /// Leaves the registry, for another bus of the same name.
    pub(super) fn end(&self) {
        self.registration.end();
    }

    pub(super) fn published(&self, topic: &str, stored: u64, duplicates: u64) {
        let label = self.topics.bounded(topic);
        self.published.with_label_values(&[label]).inc_by(stored);
        if duplicates > 0 {
            self.duplicates.with_label_values(&[label]).inc_by(duplicates);
        }
    }

    pub(super) fn dead_letter(&self, subscription: &str) {
        self.dead_letters.with_label_values(&[self.subscriptions.bounded(subscription)]).inc();
    }

    pub(super) fn expired(&self, subscription: &str) {
        self.expired.with_label_values(&[self.subscriptions.bounded(subscription)]).inc();
    }

    pub(super) fn subscription(&self, name: &str, lag: u64, age_ms: u64, in_flight: u64) {
        let labels = &[self.subscriptions.bounded(name)];
        self.lag.with_label_values(labels).set(i64::try_from(lag).unwrap_or(i64::MAX));
        self.oldest_seconds.with_label_values(labels).set(age_ms as f64 / 1e3);
        let in_flight = i64::try_from(in_flight).unwrap_or(i64::MAX);
        self.in_flight.with_label_values(labels).set(in_flight);
    }

    pub(super) fn forget_subscription(&self, name: &str) {
        self.lag.forget(name);
        self.in_flight.forget(name);
        self.oldest_seconds.forget(name);
        self.dead_letters.forget(name);
        self.expired.forget(name);
        self.subscriptions.forget(name);
    }
}
