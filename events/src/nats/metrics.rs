//! Numbers of a NATS bus, under the names that the embedded bus has for them.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

use crate::bus::SubscriptionStatus;
use crate::metrics::{Forget as _, Labels, Registration, SubscriptionGauges};

/// Counters of one bus.
#[derive(Clone, Debug)]
pub(super) struct NatsMetrics {
    published: IntCounterVec,
    duplicates: IntCounterVec,
    dead_letters: IntCounterVec,
    expired: IntCounterVec,
    waiting: SubscriptionGauges,
    pub(super) unreadable: IntCounter,
    pub(super) connects: IntCounter,
    remade: IntCounterVec,
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
        let waiting = SubscriptionGauges::new(bus)?;
        waiting.add_to(&registration)?;
        Ok(Self {
            waiting,
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
                "duet_bus_expired_events_total",
                "Events done without a delivery because their expirytime had passed.",
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
            remade: counters(
                "duet_bus_nats_remade_total",
                "Streams and subscriptions that the cluster had lost, made anew.",
                "kind",
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

    /// `kind` is one of two.
    pub(super) fn remade(&self, kind: &str) {
        self.remade.with_label_values(&[kind]).inc();
    }

    pub(super) fn dead_letter(&self, subscription: &str) {
        self.dead_letters.with_label_values(&[self.subscriptions.bounded(subscription)]).inc();
    }

    pub(super) fn expired(&self, subscription: &str) {
        self.expired.with_label_values(&[self.subscriptions.bounded(subscription)]).inc();
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
