//! What the application has in hand of one subscription, whichever consumer it came by. When a consumer's stream breaks,
//! the bus hands out again what was open: the answer to the first delivery counts for the second, and the application
//! sees the event once.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher as _;
use std::time::{Duration, Instant};

use duet_events::bus::{Delivery, Settle, Settler};
use parking_lot::Mutex;

/// How long an answer waits for its event to come again: it may have to wait for long jobs before it, and another replica
/// may get it.
const COMES_AGAIN: Duration = Duration::from_secs(3600);
/// Answers that wait; without room for another, its event goes to the application again.
const MOST_ANSWERS: usize = 10_000;

/// One event. The hash of source and id tells events apart of which buses say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    position: u64,
    generation: u64,
    event: u64,
}

#[derive(Debug)]
enum Slot {
    /// The application has it; and these came meanwhile.
    Busy(Vec<Other>),
    /// It has answered to this attempt, and the consumer that was to be told was gone.
    Answered(Settle, u32, Instant),
}

/// A delivery of an event that the application has.
#[derive(Debug)]
struct Other {
    settler: Settler,
    delivery: u64,
    attempt: u32,
}

impl Other {
    /// True if the bus hears of it.
    fn settle(&self, answer: &Settle, attempt: u32) -> bool {
        let answer = match applies(answer, attempt, self.attempt) {
            true => answer.clone(),
            // Somebody else had it in between: it is for this try to decide.
            false => Settle::Release { delay: Duration::ZERO },
        };
        self.settler.settle(self.delivery, answer)
    }
}

/// Whether an answer to one attempt counts for another: what is handled is handled.
fn applies(answer: &Settle, attempt: u32, other: u32) -> bool {
    *answer == Settle::Ack || attempt == other
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
    own: Other,
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
            event: self.hasher.hash_one((event.source(), event.id())),
        };
        let (id, attempt) = (delivery.id, delivery.attempt);
        let own = Other { settler: settler.clone(), delivery: id, attempt };
        match self.slots.lock().entry(key) {
            Entry::Vacant(slot) => drop(slot.insert(Slot::Busy(Vec::new()))),
            Entry::Occupied(mut slot) => match slot.get_mut() {
                Slot::Busy(others) => {
                    others.retain(|other| !other.settler.is_over());
                    others.push(own);
                    return None;
                }
                Slot::Answered(answer, of, at)
                    if at.elapsed() < COMES_AGAIN && applies(answer, *of, attempt) =>
                {
                    if own.settle(answer, *of) {
                        slot.remove();
                    }
                    return None;
                }
                Slot::Answered(..) => drop(slot.insert(Slot::Busy(Vec::new()))),
            },
        }
        Some(Taken { in_hand: self, key, own, answered: false })
    }

    /// Ends a busy slot, and tells every consumer that waits for it.
    fn answer(&self, taken: &Taken<'_>, answer: Settle) {
        let mut slots = self.slots.lock();
        let attempt = taken.own.attempt;
        let mut told = taken.own.settle(&answer, attempt);
        if let Some(Slot::Busy(others)) = slots.remove(&taken.key) {
            for other in others {
                told |= other.settle(&answer, attempt);
            }
        }
        // Whether the application is there is another thing the next time.
        if told || matches!(answer, Settle::Release { .. }) {
            return;
        }
        if slots.len() >= MOST_ANSWERS {
            slots.retain(|_key, slot| match slot {
                Slot::Busy(_) => true,
                Slot::Answered(_, _, at) => at.elapsed() < COMES_AGAIN,
            });
        }
        if slots.len() < MOST_ANSWERS {
            slots.insert(taken.key, Slot::Answered(answer, attempt, Instant::now()));
        }
    }
}

impl Taken<'_> {
    /// Tells the bus what the application answered.
    pub(super) fn settle(mut self, answer: Settle) {
        self.answered = true;
        self.in_hand.answer(&self, answer);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.in_hand.answer(self, Settle::Release { delay: Duration::ZERO });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use duet_events::Event;
    use duet_events::bus::{Consumer, ConsumerBackend};
    use futures::stream;

    use super::*;

    /// A bus that hands out one event, and notes what becomes of it.
    #[derive(Default)]
    struct Bus(Mutex<Vec<String>>, AtomicBool);

    impl ConsumerBackend for Bus {
        fn settle(&self, delivery: u64, outcome: Settle) -> bool {
            let lives = !self.1.load(Ordering::Relaxed);
            if lives {
                self.0.lock().push(format!("{delivery} {outcome:?}"));
            }
            lives
        }
        fn retire(&self) {}
        fn close(&self) {}
    }

    async fn consumer(bus: &Arc<Bus>, delivery: &Delivery) -> Consumer {
        let backend: Arc<dyn ConsumerBackend> = Arc::<Bus>::clone(bus);
        let mut consumer = Consumer::new(stream::iter([Ok(delivery.clone())]), backend);
        consumer.next().await.unwrap().unwrap();
        consumer
    }

    /// The application has it, and its consumer is gone.
    async fn left<'h>(in_hand: &'h InHand, bus: &Arc<Bus>, delivery: &Delivery) -> Taken<'h> {
        let broken = consumer(bus, delivery).await;
        in_hand.take(delivery, &broken.settler()).unwrap()
    }

    fn delivery(id: u64, attempt: u32) -> Delivery {
        let event = Event::new("1", "/s", "t").unwrap();
        Delivery { id, position: 7, attempt, generation: 0, event, path: None }
    }

    #[tokio::test]
    async fn an_event_that_comes_again_while_the_application_has_it_gets_its_answer() {
        let (in_hand, bus) = (InHand::default(), Arc::new(Bus::default()));
        let again = delivery(9, 1);
        let taken = left(&in_hand, &bus, &delivery(1, 1)).await;
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
        let settler = broken.settler();
        drop(broken);
        taken.settle(Settle::Ack);
        assert!(bus.0.lock().is_empty());
        assert!(in_hand.take(&again, &settler).is_none(), "the next one is gone as well");
        let next = consumer(&bus, &again).await;
        assert!(in_hand.take(&again, &next.settler()).is_none());
        assert_eq!(*bus.0.lock(), ["9 Ack"]);
        let next = consumer(&bus, &again).await;
        assert!(in_hand.take(&again, &next.settler()).is_some(), "once");
    }

    #[tokio::test]
    async fn an_answer_into_a_stream_that_broke_unseen_waits_as_well() {
        let (in_hand, bus) = (InHand::default(), Arc::new(Bus::default()));
        let first = consumer(&bus, &delivery(1, 1)).await;
        let taken = in_hand.take(&delivery(1, 1), &first.settler()).unwrap();
        bus.1.store(true, Ordering::Relaxed);
        taken.settle(Settle::Ack);
        bus.1.store(false, Ordering::Relaxed);
        let next = consumer(&bus, &delivery(9, 1)).await;
        assert!(in_hand.take(&delivery(9, 1), &next.settler()).is_none());
        assert_eq!(*bus.0.lock(), ["9 Ack"]);
    }

    #[tokio::test]
    async fn another_try_is_settled_by_what_was_handled_and_by_nothing_else() {
        let (in_hand, bus) = (InHand::default(), Arc::new(Bus::default()));
        let retry = Settle::Retry { delay: Duration::ZERO };
        for answer in [retry.clone(), Settle::Ack] {
            let taken = left(&in_hand, &bus, &delivery(1, 1)).await;
            let second = consumer(&bus, &delivery(2, 2)).await;
            assert!(in_hand.take(&delivery(2, 2), &second.settler()).is_none(), "one at a time");
            taken.settle(answer);
        }
        assert_eq!(*bus.0.lock(), ["2 Release { delay: 0ns }", "2 Ack"]);
        left(&in_hand, &bus, &delivery(1, 1)).await.settle(retry);
        let second = consumer(&bus, &delivery(2, 2)).await;
        assert!(in_hand.take(&delivery(2, 2), &second.settler()).is_some());
    }

    #[tokio::test]
    async fn that_the_application_was_away_is_not_remembered() {
        let (in_hand, bus) = (InHand::default(), Arc::new(Bus::default()));
        left(&in_hand, &bus, &delivery(1, 1))
            .await
            .settle(Settle::Release { delay: Duration::ZERO });
        assert!(in_hand.slots.lock().is_empty());
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
