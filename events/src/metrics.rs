//! What the metrics of all buses have in common: names as labels, what subscriptions wait for, and a registration that ends.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::core::Collector;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::bus::SubscriptionStatus;

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

/// How each subscription of a bus is, by its label.
#[derive(Clone, Debug)]
pub(crate) struct SubscriptionGauges {
    lag: IntGaugeVec,
    scheduled: IntGaugeVec,
    oldest_seconds: GaugeVec,
    in_flight: IntGaugeVec,
    retrying: IntGaugeVec,
    consumers: IntGaugeVec,
    paused: IntGaugeVec,
}

impl SubscriptionGauges {
    /// Of the bus of this name.
    pub(crate) fn new(bus: &str) -> prometheus::Result<Self> {
        let opts = |metric: &str, help: &str| Opts::new(metric, help).const_label("bus", bus);
        let gauges = |metric, help| IntGaugeVec::new(opts(metric, help), &["subscription"]);
        let oldest = opts(
            "duet_bus_subscription_oldest_event_seconds",
            "How long the oldest event waits that is due and not handled yet; 0 if there is none.",
        );
        Ok(Self {
            lag: gauges(
                "duet_bus_subscription_lag_events",
                "Events that are due and not handled yet.",
            )?,
            scheduled: gauges(
                "duet_bus_subscription_scheduled_events",
                "Events that were published for a later time, which has not come.",
            )?,
            oldest_seconds: GaugeVec::new(oldest, &["subscription"])?,
            in_flight: gauges(
                "duet_bus_subscription_in_flight_events",
                "Events that a consumer has now.",
            )?,
            retrying: gauges(
                "duet_bus_subscription_retrying_events",
                "Events that wait after a failed attempt.",
            )?,
            consumers: gauges("duet_bus_subscription_consumers", "Connected consumers.")?,
            paused: gauges(
                "duet_bus_paused_subscriptions",
                "1 for a subscription that an operator has paused, else 0.",
            )?,
        })
    }

    /// # Errors
    /// When the registry has those of this bus already.
    pub(crate) fn add_to(&self, registration: &Registration) -> prometheus::Result<()> {
        registration.add(self.oldest_seconds.clone())?;
        for gauge in self.whole_numbers() {
            registration.add(gauge.clone())?;
        }
        Ok(())
    }

    fn whole_numbers(&self) -> [&IntGaugeVec; 6] {
        let Self { lag, scheduled, in_flight, retrying, consumers, paused, .. } = self;
        [lag, scheduled, in_flight, retrying, consumers, paused]
    }

    /// `age_ms` is how long the oldest event of the lag waits, 0 without one.
    pub(crate) fn set(&self, label: &str, status: &SubscriptionStatus, age_ms: u64) {
        let numbers = [
            Some(status.lag),
            status.scheduled,
            Some(status.in_flight),
            Some(status.retrying),
            Some(status.consumers),
            Some(u64::from(status.paused)),
        ];
        for (gauge, number) in self.whole_numbers().into_iter().zip(numbers) {
            let Some(number) = number else { continue };
            gauge.with_label_values(&[label]).set(i64::try_from(number).unwrap_or(i64::MAX));
        }
        self.oldest_seconds.with_label_values(&[label]).set(age_ms as f64 / 1e3);
    }
}

impl Forget for SubscriptionGauges {
    fn forget(&self, label: &str) {
        self.oldest_seconds.forget(label);
        self.whole_numbers().into_iter().for_each(|gauge| gauge.forget(label));
    }
}

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
    fn a_subscription_is_shown_until_it_is_forgotten() {
        let registry = Registry::new();
        let gauges = SubscriptionGauges::new("default").unwrap();
        let registration = Registration::new(&registry);
        gauges.add_to(&registration).unwrap();
        let status = SubscriptionStatus {
            name: "a/b".to_owned(),
            topic: "t".to_owned(),
            dead_letter_topic: "d".to_owned(),
            lag: 6,
            scheduled: Some(7),
            oldest_ms: Some(1),
            first: None,
            in_flight: 2,
            retrying: 3,
            attempts: 4,
            consumers: 5,
            paused: true,
            declared: true,
            idle_expiry: None,
        };
        gauges.set("a/b", &status, 1500);
        let shown = || {
            let families = registry.gather().into_iter();
            let shown = families.map(|family| {
                (family.name().to_owned(), family.get_metric()[0].get_gauge().get_value())
            });
            shown.collect::<Vec<_>>()
        };
        let expected = [
            ("duet_bus_paused_subscriptions", 1.0),
            ("duet_bus_subscription_consumers", 5.0),
            ("duet_bus_subscription_in_flight_events", 2.0),
            ("duet_bus_subscription_lag_events", 6.0),
            ("duet_bus_subscription_oldest_event_seconds", 1.5),
            ("duet_bus_subscription_retrying_events", 3.0),
            ("duet_bus_subscription_scheduled_events", 7.0),
        ];
        assert_eq!(shown(), expected.map(|(name, value)| (name.to_owned(), value)));
        gauges.forget("a/b");
        assert_eq!(shown(), []);
    }

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
