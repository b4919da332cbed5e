//! Which deliveries of a consumer go out, and to which path.

use duet_events::bus::{Delivery, SubscriptionSpec};
use tokio::sync::Semaphore;
use tonic::Status;

use crate::expression::{Choice, Selector};
use crate::telemetry::Metrics;

/// Subscriptions that applications make at run time have names without number; their counters share one.
const TRANSIENT: &str = "transient";

/// Expressions of one subscription at a time: many consumers with long ones leave the others a processor.
static COMPILING: Semaphore = Semaphore::const_new(1);

/// A subscription's filter and routes, ready.
#[derive(Debug)]
pub(super) struct Selection {
    pub(super) spec: SubscriptionSpec,
    selector: Option<Selector>,
    /// For counters.
    label: String,
}

impl Selection {
    /// Compiles away from the runtime's own threads, which have leases to keep.
    pub(super) async fn compile(spec: SubscriptionSpec) -> Result<Self, Status> {
        if spec.filter.is_none() && spec.routes.is_empty() {
            return Ok(Self::new(spec, None));
        }
        let stopping = || Status::unavailable("the control plane is stopping");
        let turn = COMPILING.acquire().await.map_err(|_closed| stopping())?;
        let compiling = tokio::task::spawn_blocking(move || {
            // Until it is done, also where nobody waits for it any more.
            let _turn = turn;
            match Selector::of(&spec) {
                Ok(selector) => Ok(Self::new(spec, selector)),
                Err(error) => {
                    let text = format!("subscription {:?}: {error}", spec.name);
                    Err(Status::invalid_argument(text))
                }
            }
        });
        compiling.await.map_err(|_ended| stopping())?
    }

    fn new(spec: SubscriptionSpec, selector: Option<Selector>) -> Self {
        // Replicas of a broadcast count together.
        let label = match spec.name.split_once('@') {
            Some((name, _replica)) => name,
            None if spec.idle_expiry.is_some() => TRANSIENT,
            None => &spec.name,
        };
        Self { label: label.to_owned(), spec, selector }
    }

    /// Where a delivery goes: empty for the subscription's own path. None where it is done without one. An expression may
    /// take some milliseconds, after which it is the turn of others.
    pub(super) async fn path(&self, delivery: &Delivery, metrics: &Metrics) -> Option<String> {
        let Some(selector) = &self.selector else {
            return Some(String::new());
        };
        let (choice, problem) = selector.choose(&delivery.event);
        tokio::task::yield_now().await;
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
