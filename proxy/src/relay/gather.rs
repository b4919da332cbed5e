//! Several events in one request: waits until there are enough, or long enough.

use duet_events::bus::{Bulk, Delivery, SubscriptionSpec};
use tokio::time::Instant;

/// What comes from the bus on its way into one request: one event, or, in bulk, as many as come in time.
#[derive(Debug)]
pub(super) struct Gathered {
    bulk: Option<Bulk>,
    events: Vec<Delivery>,
    /// When waiting for more is over.
    pub(super) due: Option<Instant>,
}

impl Gathered {
    pub(super) fn new(spec: &SubscriptionSpec) -> Self {
        // More than may be in flight never comes.
        let bulk = spec.bulk.map(|bulk| Bulk { max: bulk.max.min(spec.max_in_flight), ..bulk });
        Self { bulk, events: Vec::new(), due: None }
    }

    /// Returns what is to be handed over now.
    pub(super) fn add(&mut self, delivery: Delivery) -> Vec<Vec<Delivery>> {
        self.events.push(delivery);
        match self.bulk {
            Some(bulk) if self.events.len() < bulk.max as usize => {
                self.due = self.due.or_else(|| Some(Instant::now() + bulk.wait));
                Vec::new()
            }
            _ => self.take(),
        }
    }

    /// Everything, in a group for each path, in order.
    pub(super) fn take(&mut self) -> Vec<Vec<Delivery>> {
        self.due = None;
        let mut groups: Vec<Vec<Delivery>> = Vec::new();
        for delivery in self.events.drain(..) {
            let same = |group: &&mut Vec<Delivery>| {
                group.first().is_some_and(|first| first.path == delivery.path)
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.push(delivery),
                None => groups.push(vec![delivery]),
            }
        }
        groups
    }
}
