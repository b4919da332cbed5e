//! What changes is handed out in the same turn, though a turn looks at nothing else.

use super::*;

struct Served {
    _dir: TempDir,
    engine: Engine,
    deliveries: mpsc::Receiver<LogDelivery>,
}

impl Served {
    /// A subscription with one consumer, whose id is 1, and events of one key.
    fn start(spec: &SubscriptionSpec, count: u32) -> Self {
        let dir = TempDir::new().unwrap();
        let mut engine = engine(&dir);
        let events = entries(1..=count).into_iter().map(|entry| {
            let event = entry.event.with_attribute("partitionkey", "k").unwrap();
            Prepared::new(Entry { event, ..entry }, 0)
        });
        engine.append("t", events.collect(), 0).unwrap();
        let (sender, deliveries) = mpsc::channel(64);
        engine.consume(1, spec, false, sender).unwrap();
        let mut served = Self { _dir: dir, engine, deliveries };
        served.engine.commit().unwrap();
        served
    }

    /// Ends a turn: positions that came, and the last of their deliveries.
    fn turn(&mut self) -> (Vec<u64>, u64) {
        self.engine.commit().unwrap();
        self.engine.hand_out(0).unwrap();
        let came: Vec<_> = std::iter::from_fn(|| self.deliveries.try_recv().ok()).collect();
        let last = came.last().map_or(0, |delivery| delivery.id);
        (came.iter().map(|delivery| delivery.position).collect(), last)
    }

    fn settle(&mut self, delivery: u64, outcome: &Settle) {
        self.engine.settle(1, delivery, outcome, 0).unwrap();
    }
}

fn one_at_a_time() -> SubscriptionSpec {
    SubscriptionSpec { max_in_flight: 1, ..spec(Start::Earliest) }
}

fn ordered() -> SubscriptionSpec {
    SubscriptionSpec { ordered: true, ..spec(Start::Earliest) }
}

const NONE: [u64; 0] = [];
const LATER: Settle = Settle::Retry { delay: Duration::from_secs(9) };

#[test]
fn an_answer_makes_room_for_the_next() {
    let mut served = Served::start(&one_at_a_time(), 2);
    let (came, delivery) = served.turn();
    assert_eq!(came, [1]);
    served.settle(delivery, &Settle::Ack);
    assert_eq!(served.turn().0, [2]);
}

#[test]
fn an_answer_of_before_a_move_makes_room_as_well() {
    let mut served = Served::start(&one_at_a_time(), 1);
    let (_, delivery) = served.turn();
    served.engine.seek("a/s", Start::Earliest).unwrap();
    assert_eq!(served.turn().0, NONE);
    served.settle(delivery, &Settle::Ack);
    assert_eq!(served.turn().0, [1]);
}

#[test]
fn what_a_consumer_leaves_is_for_the_others() {
    let mut served = Served::start(&spec(Start::Earliest), 2);
    assert_eq!(served.turn().0, [1, 2]);
    let (sender, mut deliveries) = mpsc::channel(64);
    served.engine.consume(2, &spec(Start::Earliest), false, sender).unwrap();
    served.turn();
    deliveries.try_recv().unwrap_err();
    served.engine.close_consumer(1);
    served.turn();
    assert_eq!([1, 2], [(); 2].map(|()| deliveries.try_recv().unwrap().position));
}

#[test]
fn what_waited_for_a_pause_to_end_goes_on() {
    let mut served = Served::start(&spec(Start::Earliest), 2);
    served.engine.pause("a/s", true).unwrap();
    assert_eq!(served.turn().0, NONE);
    served.engine.pause("a/s", false).unwrap();
    assert_eq!(served.turn().0, [1, 2]);
}

#[test]
fn what_is_replayed_comes() {
    let mut served = Served::start(&spec(Start::Earliest), 1);
    let (_, delivery) = served.turn();
    served.settle(delivery, &Settle::Ack);
    assert_eq!(served.turn().0, NONE);
    served.engine.seek("a/s", Start::Earliest).unwrap();
    assert_eq!(served.turn().0, [1]);
}

#[test]
fn what_waits_for_one_that_is_removed_goes_on() {
    let mut served = Served::start(&ordered(), 2);
    let (came, delivery) = served.turn();
    assert_eq!(came, [1]);
    served.settle(delivery, &LATER);
    assert_eq!(served.turn().0, NONE);
    served.engine.remove_events("t", vec![1]).unwrap();
    assert_eq!(served.turn().0, [2]);
}

#[test]
fn another_order_counts_at_once() {
    let mut served = Served::start(&ordered(), 2);
    assert_eq!(served.turn().0, [1]);
    let config = TopicConfig { order_by: "subject".to_owned(), ..TopicConfig::default() };
    served.engine.ensure_topic("t", &config, 0).unwrap();
    assert_eq!(served.turn().0, [2]);

    let mut served = Served::start(&ordered(), 2);
    assert_eq!(served.turn().0, [1]);
    served.engine.declare(&spec(Start::Earliest)).unwrap();
    assert_eq!(served.turn().0, [2]);
}

#[test]
fn a_turn_without_news_looks_at_nothing() {
    let mut served = Served::start(&spec(Start::Earliest), 1);
    let (_, delivery) = served.turn();
    served.settle(delivery, &LATER);
    served.turn();
    assert!(served.engine.served.take(8_999).is_empty());
    assert_eq!(served.engine.next_wake(), Some(9_000));
    assert_eq!(served.engine.served.take(9_000).len(), 1);
}

#[test]
fn what_was_put_off_goes_on_when_the_one_before_it_has_expired() {
    let dir = TempDir::new().unwrap();
    let mut engine = engine(&dir);
    let many = u32::try_from(progress::MAX_UNSETTLED).unwrap() + 10;
    // More of one key than are kept in memory. The second, which is not put off, expires while it waits.
    let events = entries(1..=many).into_iter().map(|entry| {
        let mut event = entry.event.with_attribute("partitionkey", "k").unwrap();
        if event.id() == "2" {
            event = event.with_attribute("deliverat", "1970-01-01T00:00:00Z").unwrap();
            event = event.with_attribute("expirytime", "1970-01-01T00:00:01Z").unwrap();
        }
        Prepared::new(Entry { event, ..entry }, 0)
    });
    engine.append("t", events.collect(), 0).unwrap();
    let (sender, mut deliveries) = mpsc::channel(64);
    engine.consume(1, &ordered(), false, sender).unwrap();
    engine.commit().unwrap();
    while engine.hand_out(0).unwrap() {}
    let first = deliveries.try_recv().unwrap();
    engine.settle(1, first.id, &Settle::Ack, 1_000).unwrap();
    engine.commit().unwrap();
    while engine.hand_out(1_000).unwrap() {}
    assert_eq!(deliveries.try_recv().map(|delivery| delivery.position), Ok(3));
}
