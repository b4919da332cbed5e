//! Looks at every subscription now and then. Keeps their gauges, which JetStream tells only when it is asked, tells hubs
//! what other control planes may have done, and removes the records of subscriptions that JetStream forgot: each reader of
//! a stream leaves one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;

use super::Hubs;
use super::hub::{Command, now_ms};
use super::payload::payload_warning;
use super::record::Recorded;
use super::shared::{NatsError, Shared};

/// How often it is asked.
const EVERY: Duration = Duration::from_secs(5);

/// Asks until the bus is closed or gone.
pub(super) fn start(shared: &Arc<Shared>, hubs: &Arc<Hubs>) {
    let (weak, hubs) = (Arc::downgrade(shared), Arc::downgrade(hubs));
    tokio::spawn(judge_connections(Weak::clone(&weak), shared.connects.clone()));
    let closed = shared.closed.subscribe();
    tokio::spawn(async move {
        let mut known = Known::default();
        while !*closed.borrow() {
            tokio::time::sleep(EVERY).await;
            if !look(&weak, &hubs, &mut known).await {
                return;
            }
        }
    });
}

/// Says of each server that it is connected to whether it takes less than sidecars do.
async fn judge_connections(shared: Weak<Shared>, mut connects: watch::Receiver<u64>) {
    while connects.changed().await.is_ok() {
        let Some(shared) = shared.upgrade() else { return };
        let max_payload = shared.client.max_payload() as u64;
        if let Some(warning) = payload_warning(max_payload) {
            tracing::warn!(bus = shared.name, "{warning}");
        }
    }
}

/// What the last look saw.
#[derive(Debug, Default)]
struct Known {
    measured: BTreeSet<String>,
    /// Subscriptions without a consumer, and the revision of their record.
    gone: BTreeMap<String, u64>,
}

async fn look(shared: &Weak<Shared>, hubs: &Weak<Hubs>, known: &mut Known) -> bool {
    let (Some(shared), Some(hubs)) = (shared.upgrade(), hubs.upgrade()) else { return false };
    match measure(&shared, &hubs, &known.gone).await {
        Ok(now) => {
            for gone in known.measured.difference(&now.measured) {
                shared.metrics.forget_subscription(gone);
                // One of this name that is made later does not rest.
                shared.wanted.lock().pause(gone, false);
            }
            *known = now;
        }
        // The last values stay: that the cluster is away is said elsewhere.
        Err(error) => tracing::debug!(bus = shared.name, %error, "subscriptions are not measured"),
    }
    true
}

async fn measure(
    shared: &Shared,
    hubs: &Hubs,
    gone: &BTreeMap<String, u64>,
) -> Result<Known, NatsError> {
    let mut now = Known::default();
    let records = shared.records().await?;
    Box::pin(remake(shared, &records)).await?;
    for recorded in records {
        let name = recorded.record.name.clone();
        match shared.status(recorded.record.clone()).await? {
            Some((status, born)) => {
                if let Some(hub) = hubs.lock().get(&name) {
                    // One that ended just now needs no word.
                    hub.commands.send(Command::Seen { born, paused: status.paused }).ok();
                }
                shared.wanted.lock().pause(&name, status.paused);
                let age_ms = status.oldest_ms.map_or(0, |oldest| now_ms().saturating_sub(oldest));
                shared.metrics.subscription(&status, age_ms);
                now.measured.insert(name);
            }
            // At the second look only: one that is being moved has no consumer for a moment.
            None if gone.get(&name) == Some(&recorded.revision) => {
                shared.forget_expired(&recorded).await?;
            }
            None if !recorded.record.is_kept() => {
                now.gone.insert(name, recorded.revision);
            }
            None => {}
        }
    }
    Ok(now)
}

/// Makes what the cluster has lost.
async fn remake(shared: &Shared, records: &[Recorded]) -> Result<(), NatsError> {
    let there = records.iter().map(|recorded| recorded.record.name.as_str()).collect();
    let missing = shared.wanted.lock().missing(&there);
    for spec in missing {
        // It may have been forgotten meanwhile.
        if shared.wanted.lock().subscription(&spec.name).is_some() {
            shared.ensure(&spec).await?;
        }
    }
    Ok(())
}
