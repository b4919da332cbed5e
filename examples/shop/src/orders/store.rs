//! All orders and how far each has come. Imports [`crate::journal`] and [`crate::model`].
//!
//! An order only ever moves forward (received, paid, placed), one line a step, so lines of two replicas that
//! work on the same order can come in any order and the result is the same.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::journal::Fold;
use crate::model::NewOrder;

/// How far an order has come. Fulfilment is the inventory's to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Step {
    /// Written down; the payment is not known to be made.
    Received,
    /// Charged; the event is not known to be published.
    Paid,
    /// The event is durable: from here on the order will be fulfilled.
    Placed,
}

/// An order as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) id: String,
    #[serde(flatten)]
    pub(crate) asked: NewOrder,
    pub(crate) total_cents: u64,
    pub(crate) at_ms: u64,
}

/// An order and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub(crate) order: Order,
    #[serde(rename = "state")]
    pub(crate) step: Step,
    /// Why it got no further, if an attempt ended so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<String>,
    /// When the last line about it was written.
    #[serde(skip)]
    pub(crate) touched_ms: u64,
}

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "lowercase")]
pub(crate) enum Line {
    /// A new order. Of two with one id the first counts.
    Received(Order),
    /// It has come that far.
    Reached { id: String, step: Step, at_ms: u64 },
    /// An attempt to bring it further failed, and the customer was told.
    Failed { id: String, problem: String, at_ms: u64 },
}

/// How many orders have come how far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) received: u64,
    pub(crate) paid: u64,
    pub(crate) placed: u64,
    /// Not paid, and the last attempt failed. Trying again with the same key can still place it.
    pub(crate) failed: u64,
}

/// All orders.
#[derive(Debug, Default)]
pub(crate) struct Book {
    records: HashMap<String, Record>,
    /// Ids as the orders came in.
    received: Vec<String>,
    /// Ids of the orders that are not placed.
    open: BTreeSet<String>,
    paid: u64,
}

impl Book {
    pub(crate) fn find(&self, id: &str) -> Option<Record> {
        self.records.get(id).cloned()
    }

    /// The newest orders, newest first.
    pub(crate) fn newest(&self, limit: usize) -> Vec<Record> {
        self.received.iter().rev().take(limit).filter_map(|id| self.find(id)).collect()
    }

    pub(crate) fn summary(&self) -> Summary {
        let received = self.received.len() as u64;
        let failed = self
            .open_records()
            .filter(|record| record.step == Step::Received && record.problem.is_some());
        Summary {
            received,
            paid: self.paid,
            placed: received - self.open.len() as u64,
            failed: failed.count() as u64,
        }
    }

    /// Orders that somebody must bring to their end although nobody asks any more: nothing was written about
    /// them since `before_ms`, and either the money is taken, or a replica died and its customer got no answer.
    pub(crate) fn abandoned(&self, before_ms: u64) -> Vec<Record> {
        self.open_records()
            .filter(|record| record.touched_ms < before_ms)
            .filter(|record| record.step == Step::Paid || record.problem.is_none())
            .cloned()
            .collect()
    }

    fn open_records(&self) -> impl Iterator<Item = &Record> {
        self.open.iter().filter_map(|id| self.records.get(id))
    }

    fn receive(&mut self, order: Order) {
        let id = order.id.clone();
        if self.records.contains_key(&id) {
            return;
        }
        let touched_ms = order.at_ms;
        let record = Record { order, step: Step::Received, problem: None, touched_ms };
        self.received.push(id.clone());
        self.open.insert(id.clone());
        self.records.insert(id, record);
    }

    fn reach(&mut self, id: &str, step: Step, at_ms: u64) {
        let Some(record) = self.records.get_mut(id) else {
            return;
        };
        record.touched_ms = at_ms;
        if step <= record.step {
            return;
        }
        self.paid += u64::from(record.step < Step::Paid);
        record.step = step;
        record.problem = None;
        if step == Step::Placed {
            self.open.remove(id);
        }
    }
}

impl Fold for Book {
    type Line = Line;

    fn apply(&mut self, line: Line) {
        match line {
            Line::Received(order) => self.receive(order),
            Line::Reached { id, step, at_ms } => self.reach(&id, step, at_ms),
            Line::Failed { id, problem, at_ms } => {
                let record = self.records.get_mut(&id);
                if let Some(record) = record.filter(|record| record.step < Step::Placed) {
                    record.problem = Some(problem);
                    record.touched_ms = at_ms;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(lines: Vec<Line>) -> Book {
        let mut book = Book::default();
        for line in lines {
            // Through JSON, as in the file.
            book.apply(serde_json::from_str(&serde_json::to_string(&line).unwrap()).unwrap());
        }
        book
    }

    fn received(id: &str) -> Line {
        let asked = NewOrder { product: "mug".into(), quantity: 1 };
        Line::Received(Order { id: id.into(), asked, total_cents: 1450, at_ms: 10 })
    }

    fn reached(id: &str, step: Step) -> Line {
        Line::Reached { id: id.into(), step, at_ms: 20 }
    }

    fn failed(id: &str) -> Line {
        Line::Failed { id: id.into(), problem: "bank".into(), at_ms: 20 }
    }

    #[test]
    fn an_order_never_moves_back_whichever_replica_writes_last() {
        let lines = [Step::Placed, Step::Paid].map(|step| reached("a", step));
        let late = [received("a"), failed("a")];
        let book = book([&[received("a")], &lines[..], &late[..]].concat());
        let record = book.find("a").unwrap();
        assert_eq!((record.step, record.problem), (Step::Placed, None));
        assert_eq!(book.summary(), Summary { received: 1, paid: 1, placed: 1, failed: 0 });
    }

    #[test]
    fn lines_about_an_order_that_nobody_received_change_nothing() {
        let book = book(vec![reached("ghost", Step::Placed), failed("ghost")]);
        assert_eq!(book.summary(), Summary::default());
    }

    #[test]
    fn only_orders_that_nobody_answers_for_are_abandoned() {
        let book = book(vec![
            received("fresh-crash"),
            received("refused"),
            failed("refused"),
            received("paid"),
            reached("paid", Step::Paid),
            failed("paid"),
            received("placed"),
            reached("placed", Step::Placed),
        ]);
        let ids = |before| -> Vec<String> {
            book.abandoned(before).into_iter().map(|record| record.order.id).collect()
        };
        assert_eq!(ids(10), Vec::<String>::new());
        assert_eq!(ids(15), ["fresh-crash"]);
        assert_eq!(ids(25), ["fresh-crash", "paid"]);
        assert_eq!(book.summary(), Summary { received: 4, paid: 2, placed: 1, failed: 1 });
    }

    #[test]
    fn a_failed_order_can_still_be_placed() {
        let book = book(vec![received("a"), failed("a"), reached("a", Step::Paid)]);
        assert_eq!(book.find("a").unwrap().problem, None);
        assert_eq!(book.summary().failed, 0);
    }
}
