//! Which deliveries of a consumer go out, and to which path.

use duet_events::bus::{Delivery, SubscriptionSpec};

use crate::expression::{Choice, Selector, SelectorError};
use crate::telemetry::Metrics;

/// Subscriptions that applications make at run time have names without number; their counters share one.
const TRANSIENT: &str = "transient";

/// A subscription's filter and routes, ready.
#[derive(Debug)]
pub(super) struct Selection {
    pub(super) spec: SubscriptionSpec,
    selector: Option<Selector>,
    /// For counters.
    label: String,
}

impl Selection {
    pub(super) fn new(spec: SubscriptionSpec) -> Result<Self, SelectorError> {
        let selector = Selector::of(&spec)?;
        // Replicas of a broadcast count together.
        let label = match spec.name.split_once('@') {
            Some((name, _replica)) => name,
            None if spec.idle_expiry.is_some() => TRANSIENT,
            None => &spec.name,
        };
        Ok(Self { label: label.to_owned(), spec, selector })
    }

    /// Where a delivery goes: empty for the subscription's own path. None where it is done without one.
    pub(super) fn path(&self, delivery: &Delivery, metrics: &Metrics) -> Option<String> {
        let Some(selector) = &self.selector else {
            return Some(String::new());
        };
        let (choice, problem) = selector.choose(&delivery.event);
        if let Some(problem) = problem {
            metrics.filter_errors.with_label_values(&[&self.label]).inc();
            let (subscription, position) = (&self.spec.name, delivery.position);
            tracing::debug!(subscription, position, "an expression failed: {problem}");
        }
        match choice {
            Choice::Deliver(path) => Some(path.unwrap_or_default()),
            Choice::Skip => {
                metrics.filtered.with_label_values(&[&self.label]).inc();
                None
            }
        }
    }
}
