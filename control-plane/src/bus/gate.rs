//! Who is asking, and whether policies let them.

use std::sync::Arc;

use duet_api::resource::Operation;
use duet_api::spiffe::SpiffeId;

use crate::compile;
use crate::store::Store;
use crate::telemetry::Metrics;

/// One peer.
pub(super) struct Gate {
    pub(super) who: SpiffeId,
    pub(super) store: Arc<Store>,
    pub(super) metrics: Metrics,
}

impl Gate {
    /// Counts and logs what policies have to say.
    pub(super) fn check(&self, operation: Operation, topic: &str) -> Result<(), String> {
        let decision =
            self.store.read(|view| compile::authorize(view.index, &self.who, operation, topic));
        let count = |decision| {
            self.metrics.authorizations.with_label_values(&[operation.name(), decision]).inc();
        };
        if !decision.audited.is_empty() {
            count("audited");
            let (operation, policies) = (operation.name(), decision.audited.join(", "));
            tracing::info!(peer = %self.who, operation, topic, policies, "matched by an audit policy");
        }
        match decision.denied {
            None => Ok(()),
            Some(why) => {
                count("denied");
                Err(why)
            }
        }
    }
}
