//! The consumers of one subscription, and what each has in hand. Pure, but for the channels.

use std::collections::{BTreeSet, HashMap};

use tokio::sync::mpsc;

use super::LogDelivery;
use super::record::Record;

/// Bytes of events with which a consumer has its hands full, however few they are. It always gets one, so that it has the
/// largest event besides.
pub(super) const FULL_HANDS: u64 = 16 << 20;

/// Everyone who consumes one subscription.
#[derive(Debug, Default)]
pub(super) struct Consumers {
    by_id: HashMap<u64, Consumer>,
    /// Those with room. The first is next: it has the least to do; among equals it was served longest ago.
    with_room: BTreeSet<Turn>,
    /// Counts hand-outs, to take turns.
    clock: u64,
    in_flight: usize,
}

/// Deliveries in hand, when it was served last, and its id.
type Turn = (usize, u64, u64);

#[derive(Debug)]
struct Consumer {
    sender: mpsc::Sender<LogDelivery>,
    max_in_flight: usize,
    open: HashMap<u64, Open>,
    /// Of all that are open.
    bytes: u64,
    last_delivery: u64,
    served: u64,
}

/// A delivery without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Open {
    pub(super) position: u64,
    /// Of its subscription when it was handed out: a subscription that was moved since has nothing to settle.
    pub(super) epoch: u32,
    /// What it takes in the store.
    pub(super) bytes: u64,
}

impl Consumers {
    pub(super) fn add(&mut self, id: u64, max_in_flight: usize, sender: mpsc::Sender<LogDelivery>) {
        let consumer = Consumer {
            sender,
            max_in_flight,
            open: HashMap::new(),
            bytes: 0,
            last_delivery: 0,
            served: 0,
        };
        self.by_id.insert(id, consumer);
        self.enter(id);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Deliveries without an answer.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Who gets the next event, if anyone has room.
    pub(super) fn pick(&self) -> Option<u64> {
        self.with_room.first().map(|(_, _, id)| *id)
    }

    /// False: it is gone.
    pub(super) fn send(&mut self, member: u64, open: Open, attempt: u32, record: Record) -> bool {
        self.leave(member);
        self.clock += 1;
        let Some(consumer) = self.by_id.get_mut(&member) else {
            return false;
        };
        consumer.last_delivery += 1;
        consumer.served = self.clock;
        let Open { position, epoch, bytes } = open;
        let id = consumer.last_delivery;
        let delivery = LogDelivery { id, position, attempt, generation: epoch.into(), record };
        let sent = consumer.sender.try_send(delivery).is_ok();
        if sent {
            consumer.open.insert(consumer.last_delivery, open);
            consumer.bytes += bytes;
            self.in_flight += 1;
        }
        self.enter(member);
        sent
    }

    /// What a delivery was of; nothing if it is settled already.
    pub(super) fn settle(&mut self, id: u64, delivery: u64) -> Option<Open> {
        self.leave(id);
        let open = self.by_id.get_mut(&id).and_then(|consumer| {
            let open = consumer.open.remove(&delivery)?;
            consumer.bytes -= open.bytes;
            Some(open)
        });
        self.in_flight -= usize::from(open.is_some());
        self.enter(id);
        open
    }

    /// What a delivery takes in the store; 0 of one that is settled.
    pub(super) fn bytes(&self, id: u64, delivery: u64) -> u64 {
        let open = self.by_id.get(&id).and_then(|consumer| consumer.open.get(&delivery));
        open.map_or(0, |open| open.bytes)
    }

    /// It gets nothing any more; what it has stays open.
    pub(super) fn retire(&mut self, id: u64) {
        self.leave(id);
        if let Some(consumer) = self.by_id.get_mut(&id) {
            consumer.max_in_flight = 0;
        }
    }

    /// Forgets a consumer; returns what it had.
    pub(super) fn remove(&mut self, id: u64) -> Vec<Open> {
        self.leave(id);
        let open = self.by_id.remove(&id).map(|consumer| consumer.open).unwrap_or_default();
        self.in_flight -= open.len();
        open.into_values().collect()
    }

    fn turn(&self, id: u64) -> Option<Turn> {
        let consumer = self.by_id.get(&id)?;
        let room = consumer.open.len() < consumer.max_in_flight && consumer.bytes < FULL_HANDS;
        room.then_some((consumer.open.len(), consumer.served, id))
    }

    fn leave(&mut self, id: u64) {
        if let Some(turn) = self.turn(id) {
            self.with_room.remove(&turn);
        }
    }

    fn enter(&mut self, id: u64) {
        if let Some(turn) = self.turn(id) {
            self.with_room.insert(turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_events_fill_a_consumers_hands_before_their_number_does() {
        let mut consumers = Consumers::default();
        let (sender, _deliveries) = mpsc::channel(128);
        consumers.add(1, 64, sender);
        let hand_out = |consumers: &mut Consumers, bytes| {
            let Some(id) = consumers.pick() else { return false };
            consumers.send(id, Open { position: 1, epoch: 0, bytes }, 1, Record::default())
        };
        for _ in 0..4 {
            assert!(hand_out(&mut consumers, FULL_HANDS / 4));
        }
        assert!(!hand_out(&mut consumers, 1));
        assert!(consumers.settle(1, 4).is_some());
        assert!(hand_out(&mut consumers, 2 * FULL_HANDS), "larger than all the room there is");
        assert!(!hand_out(&mut consumers, 1));
        for delivery in [1, 2, 3, 5] {
            consumers.settle(1, delivery);
        }
        let small = (0..64).take_while(|_| hand_out(&mut consumers, 100)).count();
        assert_eq!((small, consumers.pick()), (64, None), "of small ones, as many as it asked for");
    }
}
