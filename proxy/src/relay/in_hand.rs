//! What the application has in hand of one subscription, whichever consumer it came by. When a consumer's stream breaks,
//! the bus hands out again what was open: the answer to the first delivery counts for the second, and the application
//! sees the event once.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher as _;
use std::time::{Duration, Instant};

use duet_events::bus::{Delivery, Settle, Settler};
use parking_lot::Mutex;

/// How long an answer waits for its event to come again; another replica may get it.
const COMES_AGAIN: Duration = Duration::from_secs(60);

/// One try of one event. The hash of source and id tells events apart of which buses say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    position: u64,
    generation: u64,
    attempt: u32,
    event: u64,
}

#[derive(Debug)]
enum Slot {
    /// The application has it; and these came meanwhile.
    Busy(Vec<(Settler, u64)>),
    /// It has answered, and the consumer that was to be told was gone.
    Answered(Settle, Instant),
}

/// What is in hand.
#[derive(Debug, Default)]
pub(super) struct InHand {
    slots: Mutex<HashMap<Key, Slot>>,
    hasher: RandomState,
}

/// A delivery that goes to the application. Dropped without an answer, it goes back to the bus.
#[derive(Debug)]
pub(super) struct Taken<'h> {
    in_hand: &'h InHand,
    key: Key,
    settler: Settler,
    delivery: u64,
    answered: bool,
}

impl InHand {
    /// Takes a delivery for the application. None: it has the event already, or had it; the delivery is settled by that
    /// answer.
    pub(super) fn take(&self, delivery: &Delivery, settler: &Settler) -> Option<Taken<'_>> {
        let event = &delivery.event;
        let key = Key {
            position: delivery.position,
            generation: delivery.generation,
            attempt: delivery.attempt,
            event: self.hasher.hash_one((event.source(), event.id())),
        };
        let mut slots = self.slots.lock();
        match slots.entry(key) {
            Entry::Vacant(slot) => drop(slot.insert(Slot::Busy(Vec::new()))),
            Entry::Occupied(mut slot) => match slot.get_mut() {
                Slot::Busy(others) => {
                    others.push((settler.clone(), delivery.id));
                    return None;
                }
                Slot::Answered(..) => {
                    if let Slot::Answered(answer, at) = slot.insert(Slot::Busy(Vec::new()))
                        && at.elapsed() < COMES_AGAIN
                    {
                        slot.remove();
                        settler.settle(delivery.id, answer);
                        return None;
                    }
                }
            },
        }
        let settler = settler.clone();
        Some(Taken { in_hand: self, key, settler, delivery: delivery.id, answered: false })
    }

    /// Ends a busy slot, and tells every consumer that waits for it.
    fn answer(&self, taken: &Taken<'_>, answer: Settle, remember: bool) {
        let mut slots = self.slots.lock();
        let mut told = taken.settler.settle(taken.delivery, answer.clone());
        if let Some(Slot::Busy(others)) = slots.remove(&taken.key) {
            for (settler, delivery) in others {
                told |= settler.settle(delivery, answer.clone());
            }
        }
        if !told && remember {
            let now = Instant::now();
            slots.retain(|_key, slot| match slot {
                Slot::Busy(_) => true,
                Slot::Answered(_, at) => now.duration_since(*at) < COMES_AGAIN,
            });
            slots.insert(taken.key, Slot::Answered(answer, now));
        }
    }
}

impl Taken<'_> {
    /// Tells the bus what the application answered.
    pub(super) fn settle(mut self, answer: Settle) {
        self.answered = true;
        self.in_hand.answer(&self, answer, true);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.in_hand.answer(self, Settle::Release { delay: Duration::ZERO }, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use duet_events::Event;
    use duet_events::bus::{Consumer, ConsumerBackend};
    use futures::stream;

    use super::*;

    /// A bus that hands out one event, and notes what becomes of it.
    #[derive(Default)]
    struct Bus(Mutex<Vec<String>>);

    impl ConsumerBackend for Bus {
        fn settle(&self, delivery: u64, outcome: Settle) {
            self.0.lock().push(format!("{delivery} {outcome:?}"));
        }
        fn close(&self) {}
    }

    async fn consumer(bus: &Arc<Bus>, delivery: &Delivery) -> Consumer {
        let backend: Arc<dyn ConsumerBackend> = Arc::<Bus>::clone(bus);
        let mut consumer = Consumer::new(stream::iter([Ok(delivery.clone())]), backend);
        consumer.next().await.unwrap().unwrap();
        consumer
    }

    fn delivery(id: u64, attempt: u32) -> Delivery {
        let event = Event::new("1", "/s", "t").unwrap();
        Delivery { id, position: 7, attempt, generation: 0, event, path: None }
    }

    #[tokio::test]
    async fn an_event_that_comes_again_while_the_application_has_it_gets_its_answer() {
        let (in_hand, bus) = (InHand::default(), Arc::new(Bus::default()));
        let (first, again) = (delivery(1, 1), delivery(9, 1));
        let broken = consumer(&bus, &first).await;
        let taken = in_hand.take(&first, &broken.settler()).unwrap();
        drop(broken);
        let next = consumer(&bus, &again).await;
        assert!(in_hand.take(&again, &next.settler()).is_none());
        taken.settle(Settle::Ack);
        assert_eq!(*bus.0.lock(), ["9 Ack"]);
        assert!(in_hand.slots.lock().is_empty());
    }

    #[tokio::test]
    async fn an_answer_without_a_consumer_waits_for_the_event_to_come_again() {
        let (in_hand, bus) = (InHand::default(), Arc::new(Bus::default()));
        let (first, again) = (delivery(1, 2), delivery(9, 2));
        let broken = consumer(&bus, &first).await;
        let taken = in_hand.take(&first, &broken.settler()).unwrap();
        drop(broken);
        taken.settle(Settle::Ack);
        assert!(bus.0.lock().is_empty());
        // Another try of it is another thing: somebody else had it in between.
        let third = consumer(&bus, &delivery(5, 3)).await;
        in_hand.take(&delivery(5, 3), &third.settler()).unwrap().settle(Settle::Ack);
        let next = consumer(&bus, &again).await;
        assert!(in_hand.take(&again, &next.settler()).is_none());
        assert_eq!(*bus.0.lock(), ["5 Ack", "9 Ack"]);
        let next = consumer(&bus, &again).await;
        assert!(in_hand.take(&again, &next.settler()).is_some(), "once");
    }

    #[tokio::test]
    async fn what_is_dropped_goes_back_and_is_not_remembered() {
        let (in_hand, bus) = (InHand::default(), Arc::new(Bus::default()));
        let only = consumer(&bus, &delivery(1, 1)).await;
        drop(in_hand.take(&delivery(1, 1), &only.settler()).unwrap());
        assert_eq!(*bus.0.lock(), ["1 Release { delay: 0ns }"]);
        assert!(in_hand.slots.lock().is_empty());
    }
}
