//! Metrics of relayed tables, by source.

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

/// The metric families.
#[derive(Clone, Debug)]
pub struct SourceMetrics {
    /// Rows published and deleted or marked.
    pub(crate) relayed: IntCounterVec,
    /// Rows whose event the bus had already.
    pub(crate) duplicates: IntCounterVec,
    /// What went wrong, by reason: `database`, `bus` or `row`.
    pub(crate) errors: IntCounterVec,
    /// Rows that cannot be published.
    pub(crate) bad: IntGaugeVec,
    /// Rows that wait.
    pub(crate) waiting: IntGaugeVec,
    /// 1 in the one replica that relays.
    pub(crate) active: IntGaugeVec,
}

impl SourceMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When the registry has them already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        let gauge = |name: &str, help: &str| {
            let family = IntGaugeVec::new(Opts::new(name, help), &["source"])?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        Ok(Self {
            relayed: counter(
                "duet_outbox_source_relayed_rows_total",
                "Rows of an application's table that were published and deleted or marked.",
                &["source"],
            )?,
            duplicates: counter(
                "duet_outbox_source_duplicate_rows_total",
                "Rows whose event the bus already had: an id used twice, or published before a sidecar died.",
                &["source"],
            )?,
            errors: counter(
                "duet_outbox_source_errors_total",
                "Failures of an outbox source, by reason: database, bus or row (found bad for the first time).",
                &["source", "reason"],
            )?,
            bad: gauge(
                "duet_outbox_source_bad_rows",
                "Rows found that cannot be published; they stay in the table.",
            )?,
            waiting: gauge(
                "duet_outbox_source_waiting_rows",
                "Rows in the table that are not published yet, counted every 5 s up to 100000.",
            )?,
            active: gauge(
                "duet_outbox_source_active_replicas",
                "1 while this replica relays the table, 0 while it stands by.",
            )?,
        })
    }

    /// Of a source that this replica does not relay now: what it counted is no longer known.
    pub(crate) fn rest(&self, source: &str) {
        self.active.with_label_values(&[source]).set(0);
        for gauge in [&self.bad, &self.waiting] {
            // One that was never set is fine.
            gauge.remove_label_values(&[source]).unwrap_or_default();
        }
    }

    /// Of a source that this replica no longer has anything to do with.
    pub fn forget(&self, source: &str) {
        for gauge in [&self.bad, &self.waiting, &self.active] {
            // One that was never set is fine.
            gauge.remove_label_values(&[source]).unwrap_or_default();
        }
    }
}
