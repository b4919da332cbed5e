//! Metrics of events. Topics come from outside, so their number as labels is bounded.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};

/// Topics with a label of their own; the rest is `other`.
const MAX_TOPICS: usize = 200;

/// The metric families of events.
#[derive(Clone, Debug)]
pub(super) struct EventMetrics {
    published: IntCounterVec,
    /// Deliveries, by subscription and outcome: `ack`, `retry`, `release`, `dead_letter`, `duplicate`.
    pub(super) delivered: IntCounterVec,
    /// From the POST to the application's answer, by subscription.
    pub(super) duration: HistogramVec,
    /// Deliveries waiting for the application, by subscription.
    pub(super) in_flight: IntGaugeVec,
    /// Subscriptions that could not be started, by reason.
    pub(super) refused: IntCounterVec,
    topics: Arc<Mutex<HashSet<String>>>,
}

impl EventMetrics {
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        let options = HistogramOpts::new(
            "duet_event_delivery_duration_seconds",
            "Time from the delivery of an event to the application's answer.",
        );
        let duration = HistogramVec::new(options, &["subscription"])?;
        registry.register(Box::new(duration.clone()))?;
        let in_flight = IntGaugeVec::new(
            Opts::new(
                "duet_event_in_flight_deliveries",
                "Deliveries in hand: on their way to the application, or waiting for its answer.",
            ),
            &["subscription"],
        )?;
        registry.register(Box::new(in_flight.clone()))?;
        Ok(Self {
            published: counter(
                "duet_event_publishes_total",
                "Publish requests, by bus, topic and outcome: bus, outbox, or why it was refused.",
                &["bus", "topic", "outcome"],
            )?,
            delivered: counter(
                "duet_event_deliveries_total",
                "Deliveries, by subscription and outcome: ack, retry, release, dead_letter or duplicate (handled before, not delivered again).",
                &["subscription", "outcome"],
            )?,
            duration,
            in_flight,
            refused: counter(
                "duet_event_subscription_errors_total",
                "Subscriptions that could not be started or broke, by reason.",
                &["reason"],
            )?,
            topics: Arc::default(),
        })
    }

    /// Counts a publish. A bus or topic that does not exist is not a label.
    pub(super) fn published(&self, bus: &str, topic: &str, outcome: &'static str) {
        let mut topics = self.topics.lock();
        let known = topics.contains(topic);
        let room = topics.len() < MAX_TOPICS && matches!(outcome, "bus" | "outbox");
        let topic = if known || room { topic } else { "other" };
        if room && !known {
            topics.insert(topic.to_owned());
        }
        drop(topics);
        self.published.with_label_values(&[bus, topic, outcome]).inc();
    }
}
