//! What was delivered, and so what was fulfilled and what is in stock. Imports [`crate::journal`] and
//! [`crate::model`].
//!
//! Every delivery of an event is a line. The first line of an event id fulfils the order and takes the goods;
//! later lines of that id only count as duplicates. There is no moment between "fulfilled" and "recorded": the
//! line is both, so a process that dies before it wrote the line has done nothing, and one that dies after it
//! has done everything but answer, which the next delivery finds out.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::journal::Fold;
use crate::model::{CATALOGUE, Fulfilment, FulfilmentSummary, Product, Stock};

/// Of each product, at the beginning.
const INITIAL: u64 = 120;
/// When fewer than this are left, a delivery of goods arrives.
const LOW: u64 = 5;
/// How many goods arrive.
const REFILL: u64 = 120;
/// Names of newest fulfilments that can be listed without asking for one by name.
const NEWEST: usize = 1000;

/// One delivery of one event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Delivered {
    /// The event's id, which is the order's.
    pub(crate) event: String,
    pub(crate) product: String,
    pub(crate) quantity: u32,
    pub(crate) at_ms: u64,
}

/// The sum of all deliveries.
#[derive(Debug, Default)]
pub(crate) struct Shelves {
    fulfilments: HashMap<String, Fulfilment>,
    newest: VecDeque<String>,
    stock: HashMap<String, u64>,
    duplicates: u64,
}

impl Shelves {
    pub(crate) fn stock(&self) -> Vec<Stock> {
        let line = |product: &Product| Stock {
            id: product.id.to_owned(),
            name: product.name.to_owned(),
            price_cents: product.price_cents,
            stock: self.stock.get(product.id).copied().unwrap_or(INITIAL),
        };
        CATALOGUE.iter().map(line).collect()
    }

    pub(crate) fn summary(&self) -> FulfilmentSummary {
        let fulfilled = self.fulfilments.len() as u64;
        FulfilmentSummary { fulfilled, duplicates: self.duplicates }
    }

    /// Those of the given orders that are fulfilled.
    pub(crate) fn of<'a>(&self, orders: impl Iterator<Item = &'a str>) -> Vec<Fulfilment> {
        orders.filter_map(|order| self.fulfilments.get(order).cloned()).collect()
    }

    /// The newest, newest first.
    pub(crate) fn newest(&self, limit: usize) -> Vec<Fulfilment> {
        self.of(self.newest.iter().rev().take(limit).map(String::as_str))
    }
}

impl Fold for Shelves {
    type Line = Delivered;

    fn apply(&mut self, line: Delivered) {
        if let Some(known) = self.fulfilments.get_mut(&line.event) {
            known.deliveries += 1;
            self.duplicates += 1;
            return;
        }
        let stock = self.stock.entry(line.product).or_insert(INITIAL);
        let taken = u64::from(line.quantity);
        if *stock < taken {
            // Sold more than was there, since several orders looked at the same shelf: more goods come first.
            *stock += REFILL.max(taken);
        }
        *stock -= taken;
        if *stock < LOW {
            *stock += REFILL;
        }
        self.newest.push_back(line.event.clone());
        if self.newest.len() > NEWEST {
            self.newest.pop_front();
        }
        let fulfilment = Fulfilment { order: line.event.clone(), deliveries: 1, at_ms: line.at_ms };
        self.fulfilments.insert(line.event, fulfilment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Journal;
    use crate::journal::tests::Folder;

    fn delivered(event: &str, quantity: u32) -> Delivered {
        Delivered { event: event.into(), product: "mug".into(), quantity, at_ms: 1 }
    }

    fn mugs(shelves: &Shelves) -> u64 {
        shelves.stock().iter().find(|line| line.id == "mug").unwrap().stock
    }

    #[test]
    fn an_event_takes_goods_once_however_often_it_is_delivered() {
        let mut shelves = Shelves::default();
        for event in ["a", "b", "a", "a"] {
            shelves.apply(delivered(event, 2));
        }
        assert_eq!(shelves.summary(), FulfilmentSummary { fulfilled: 2, duplicates: 2 });
        assert_eq!(mugs(&shelves), INITIAL - 4);
        assert_eq!(shelves.of(["a"].into_iter())[0].deliveries, 3);
        assert_eq!(shelves.newest(1)[0].order, "b");
    }

    #[test]
    fn shelves_are_filled_up_before_they_are_empty() {
        let mut shelves = Shelves::default();
        for order in 0..1000 {
            shelves.apply(delivered(&order.to_string(), 7));
            assert!((LOW..=INITIAL + REFILL).contains(&mugs(&shelves)));
        }
        assert_eq!(shelves.newest(usize::MAX).len(), NEWEST);
    }

    #[tokio::test]
    async fn two_replicas_that_get_the_same_event_fulfil_it_once() {
        let folder = Folder::new();
        let open = || Journal::<Shelves>::open(&folder.0, "inventory").unwrap();
        let (one, two) = (open(), open());
        let both = tokio::join!(one.append(delivered("a", 3)), two.append(delivered("a", 3)));
        both.0.unwrap();
        both.1.unwrap();
        for replica in [one, two, open()] {
            let seen = replica.read(|shelves| (shelves.summary(), mugs(shelves))).await.unwrap();
            let once = FulfilmentSummary { fulfilled: 1, duplicates: 1 };
            assert_eq!(seen, (once, INITIAL - 3));
        }
    }
}
