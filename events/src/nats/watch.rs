//! Keeps the gauges of subscriptions: JetStream tells them only when it is asked.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::hub::now_ms;
use super::shared::{NatsError, Shared};

/// How often it is asked.
const EVERY: Duration = Duration::from_secs(5);

/// Asks until the bus is closed or gone.
pub(super) fn start(shared: &Arc<Shared>) {
    let weak = Arc::downgrade(shared);
    let closed = shared.closed.subscribe();
    tokio::spawn(async move {
        let mut known = BTreeSet::new();
        while !*closed.borrow() {
            tokio::time::sleep(EVERY).await;
            if !look(&weak, &mut known).await {
                return;
            }
        }
    });
}

async fn look(shared: &Weak<Shared>, known: &mut BTreeSet<String>) -> bool {
    let Some(shared) = shared.upgrade() else { return false };
    match measure(&shared).await {
        Ok(seen) => {
            for gone in known.difference(&seen) {
                shared.metrics.forget_subscription(gone);
            }
            *known = seen;
        }
        // The last values stay: that the cluster is away is said elsewhere.
        Err(error) => tracing::debug!(bus = shared.name, %error, "subscriptions are not measured"),
    }
    true
}

async fn measure(shared: &Shared) -> Result<BTreeSet<String>, NatsError> {
    let mut seen = BTreeSet::new();
    for record in shared.records().await? {
        if let Some(status) = shared.status(record).await? {
            let age_ms = status.oldest_ms.map_or(0, |oldest| now_ms().saturating_sub(oldest));
            shared.metrics.subscription(&status.name, status.lag, age_ms, status.in_flight);
            seen.insert(status.name);
        }
    }
    Ok(seen)
}
