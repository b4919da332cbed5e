//! Numbers of the outbox. Label `bus` is the name of a declared bus.

use prometheus::core::Collector;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};

#[derive(Clone, Debug)]
pub(super) struct OutboxMetrics {
    events: IntGaugeVec,
    bytes: IntGaugeVec,
    pub(super) oldest_seconds: GaugeVec,
    pub(super) spooled: IntCounterVec,
    pub(super) forwarded: IntCounterVec,
    pub(super) rejected: IntCounterVec,
    pub(super) full: IntCounterVec,
}

impl OutboxMetrics {
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), &["bus"])?)
        };
        let gauge = |name: &str, help: &str| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), &["bus"])?)
        };
        let oldest = Opts::new(
            "duet_outbox_oldest_event_seconds",
            "Age of the event that is forwarded next; 0 if none waits.",
        );
        Ok(Self {
            events: gauge("duet_outbox_events", "Events that wait for their bus.")?,
            bytes: gauge("duet_outbox_size_bytes", "Bytes of events that wait for their bus.")?,
            oldest_seconds: registered(registry, GaugeVec::new(oldest, &["bus"])?)?,
            spooled: counter("duet_outbox_spooled_events_total", "Events put on disk.")?,
            forwarded: counter(
                "duet_outbox_forwarded_events_total",
                "Events that the bus acknowledged after they had waited here.",
            )?,
            rejected: counter(
                "duet_outbox_rejected_events_total",
                "Events that the bus will never take, moved aside.",
            )?,
            full: counter(
                "duet_outbox_full_total",
                "Publishes refused because the outbox had no room.",
            )?,
        })
    }

    pub(super) fn waiting(&self, bus: &str, events: u64, bytes: u64) {
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.events.with_label_values(&[bus]).set(gauge(events));
        self.bytes.with_label_values(&[bus]).set(gauge(bytes));
        if events == 0 {
            self.oldest_seconds.with_label_values(&[bus]).set(0.0);
        }
    }
}

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
