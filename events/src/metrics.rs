//! What the metrics of all buses have in common: names as labels, and a registration that ends. Imports nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::core::Collector;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Registry};

/// Label values of one kind before further ones become `other`.
const MAX_LABELS: usize = 200;

/// Names that have their own label.
#[derive(Clone, Debug, Default)]
pub(crate) struct Labels(Arc<Mutex<BTreeSet<String>>>);

impl Labels {
    /// The label of a name: itself, while there are few.
    pub(crate) fn bounded<'a>(&self, name: &'a str) -> &'a str {
        let mut known = self.0.lock();
        if known.contains(name) {
            return name;
        }
        if known.len() >= MAX_LABELS {
            return "other";
        }
        known.insert(name.to_owned());
        name
    }

    /// Makes room for another name.
    pub(crate) fn forget(&self, name: &str) {
        self.0.lock().remove(name);
    }
}

/// What a label can be taken from.
pub(crate) trait Forget {
    /// Removes the value of a label; it may never have had one.
    fn forget(&self, label: &str);
}

macro_rules! forget {
    ($($vector:ty),*) => { $(
        impl Forget for $vector {
            fn forget(&self, label: &str) {
                self.remove_label_values(&[label]).unwrap_or_default();
            }
        }
    )* };
}

forget!(GaugeVec, IntCounterVec, IntGaugeVec);

/// Metrics in a registry, until it ends: whoever opens the bus again needs their names.
#[derive(Clone)]
pub(crate) struct Registration(Arc<Registered>);

struct Registered {
    registry: Registry,
    metrics: Mutex<Vec<Box<dyn Collector>>>,
}

impl Registration {
    pub(crate) fn new(registry: &Registry) -> Self {
        Self(Arc::new(Registered { registry: registry.clone(), metrics: Mutex::default() }))
    }

    /// Registers one more.
    ///
    /// # Errors
    /// When the registry has one of this name and these labels.
    pub(crate) fn add<M: Collector + Clone + 'static>(&self, metric: M) -> prometheus::Result<M> {
        self.0.registry.register(Box::new(metric.clone()))?;
        self.0.metrics.lock().push(Box::new(metric.clone()));
        Ok(metric)
    }

    /// Takes them out, although somebody may still count.
    pub(crate) fn end(&self) {
        self.0.end();
    }
}

impl Registered {
    fn end(&self) {
        for metric in self.metrics.lock().drain(..) {
            // It was registered here, once.
            self.registry.unregister(metric).unwrap_or_default();
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.end();
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Registration").field(&self.0.metrics.lock().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{IntCounter, Opts};

    use super::*;

    #[test]
    fn labels_overflow_to_other() {
        let labels = Labels::default();
        for at in 0..MAX_LABELS {
            labels.bounded(&at.to_string());
        }
        assert_eq!(labels.bounded("199"), "199");
        assert_eq!(labels.bounded("200"), "other");
        labels.forget("199");
        assert_eq!(labels.bounded("200"), "200");
    }

    #[test]
    fn what_has_ended_can_be_registered_again() {
        let registry = Registry::new();
        let counter = || IntCounter::with_opts(Opts::new("a_total", "A.")).unwrap();
        let first = Registration::new(&registry);
        let old = first.add(counter()).unwrap();
        let second = Registration::new(&registry);
        assert!(second.add(counter()).is_err());
        first.end();
        second.add(counter()).unwrap().inc_by(3);
        old.inc();
        drop(first);
        let value = registry.gather().first().unwrap().get_metric().first().unwrap().clone();
        assert_eq!(value.get_counter().get_value().to_string(), "3");
        drop(second);
        assert!(registry.gather().is_empty());
    }
}
