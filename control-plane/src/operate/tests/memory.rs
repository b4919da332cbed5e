//! A shelf with one bus, in memory.

use duet_events::Event;
use duet_events::bus::{
    ConsumeError, Consumer, EventBus, FirstWaiting, Published, Start, StoredEvent,
    SubscriptionSpec, SubscriptionStatus, TopicConfig, TopicStatus,
};
use parking_lot::Mutex;

use super::*;

/// A bus in memory that remembers what it was asked.
#[derive(Debug, Default)]
pub(super) struct Memory {
    events: Mutex<Vec<StoredEvent>>,
    pub(super) asked: Mutex<Vec<String>>,
}

impl Memory {
    fn note(&self, what: String) {
        self.asked.lock().push(what);
    }
}

impl EventBus for Memory {
    fn publish<'a>(
        &'a self,
        _topic: &'a str,
        events: Vec<Event>,
    ) -> BoxFuture<'a, Result<Vec<Published>, PublishError>> {
        let mut held = self.events.lock();
        let published = events.into_iter().map(|event| {
            let position = held.len() as u64 + 1;
            held.push(StoredEvent { position, published_ms: 1_000 * position, event });
            Published { position, duplicate: false }
        });
        let published = published.collect();
        Box::pin(async { Ok(published) })
    }

    fn consume(&self, _: SubscriptionSpec) -> BoxFuture<'_, Result<Consumer, ConsumeError>> {
        Box::pin(async { panic!("nobody consumes here") })
    }
}

type Outcome<'a, T> = BoxFuture<'a, Result<T, ManageError>>;

impl ManagedBus for Memory {
    fn ensure_topic<'a>(&'a self, _: &'a str, _: TopicConfig) -> Outcome<'a, ()> {
        Box::pin(async { Ok(()) })
    }
    fn reset_topic<'a>(&'a self, _: &'a str) -> Outcome<'a, ()> {
        Box::pin(async { Ok(()) })
    }
    fn ensure_subscription(&self, _: SubscriptionSpec) -> BoxFuture<'_, Result<(), ConsumeError>> {
        Box::pin(async { Ok(()) })
    }
    fn remove_subscription<'a>(&'a self, name: &'a str) -> Outcome<'a, ()> {
        self.note(format!("forget {name}"));
        Box::pin(async { Ok(()) })
    }
    fn topics(&self) -> Outcome<'_, Vec<TopicStatus>> {
        let events = self.events.lock().len() as u64;
        let (name, next) = ("t".into(), events + 1);
        let topic = TopicStatus { name, first: 1, next, events, bytes: 99, declared: true };
        Box::pin(async { Ok(vec![topic]) })
    }
    fn subscriptions(&self) -> Outcome<'_, Vec<SubscriptionStatus>> {
        let status = SubscriptionStatus {
            name: "shop/fulfil".into(),
            topic: "t".into(),
            dead_letter_topic: "poison".into(),
            lag: 2,
            scheduled: Some(1),
            oldest_ms: Some(1_700),
            first: Some(FirstWaiting { position: 1, published_ms: 1_500 }),
            in_flight: 1,
            retrying: 1,
            attempts: 4,
            consumers: 2,
            paused: false,
            declared: false,
            idle_expiry: None,
        };
        let named = |name: &str, consumers| SubscriptionStatus {
            name: name.into(),
            consumers,
            ..status.clone()
        };
        let more = [named("shop/gone", 0), named("shop/declared", 0)];
        let all = [vec![status.clone()], more.to_vec()].concat();
        Box::pin(async { Ok(all) })
    }
    fn read<'a>(
        &'a self,
        topic: &'a str,
        from: u64,
        limit: usize,
    ) -> Outcome<'a, Vec<StoredEvent>> {
        if topic != "t" {
            let name = topic.to_owned();
            return Box::pin(async { Err(ManageError::Unknown { kind: "topic", name }) });
        }
        let events = self.events.lock();
        let found = events.iter().filter(|event| event.position >= from).take(limit);
        let found = found.cloned().collect();
        Box::pin(async { Ok(found) })
    }
    fn remove_events<'a>(&'a self, topic: &'a str, positions: Vec<u64>) -> Outcome<'a, u64> {
        self.note(format!("remove {topic} {positions:?}"));
        Box::pin(async move { Ok(positions.len() as u64) })
    }
    fn redrive<'a>(&'a self, topic: &'a str, positions: Vec<u64>) -> Outcome<'a, u64> {
        self.note(format!("redrive {topic} {positions:?}"));
        Box::pin(async move { Ok(positions.len() as u64) })
    }
    fn seek<'a>(&'a self, subscription: &'a str, to: Start) -> Outcome<'a, ()> {
        self.note(format!("seek {subscription} {to:?}"));
        Box::pin(async { Ok(()) })
    }
    fn pause<'a>(&'a self, subscription: &'a str, paused: bool) -> Outcome<'a, ()> {
        self.note(format!("pause {subscription} {paused}"));
        Box::pin(async { Err(ManageError::Refused("not now".into())) })
    }
    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

#[derive(Debug, Default)]
pub(super) struct One(pub(super) Arc<Memory>);

impl Shelf for One {
    fn names(&self) -> Vec<String> {
        vec!["default".into()]
    }
    fn find<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn ManagedBus>, BusError>> {
        let bus: Arc<dyn ManagedBus> = Arc::<Memory>::clone(&self.0);
        let found = if name == "default" { Ok(bus) } else { Err(BusError::Unknown(name.into())) };
        Box::pin(async { found })
    }
    fn takes(&self, bus: &str, topic: &str) -> Result<(), PublishError> {
        match topic {
            "undeclared" => {
                let why = format!("{bus} does not take {topic}");
                Err(PublishError::new(PublishErrorKind::UnknownTopic, why))
            }
            _ => Ok(()),
        }
    }
    fn not_moved(&self, bus: &str) -> Option<String> {
        Some(format!("{bus} stays"))
    }
    fn declares(&self, bus: &str, subscription: &str) -> bool {
        (bus, subscription) == ("default", "shop/declared")
    }
    fn migrate<'a>(
        &'a self,
        name: &'a str,
        wanted: Migration,
    ) -> BoxFuture<'a, Result<Moved, ManageError>> {
        // Says what it was asked.
        let why = format!("{name} {:?} {} {}", wanted.skip, wanted.leave_behind, wanted.limit);
        Box::pin(async { Err(ManageError::Refused(why)) })
    }
    fn backup<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Copied, ManageError>> {
        let why = format!("{name} is kept elsewhere");
        Box::pin(async { Err(ManageError::Refused(why)) })
    }
}
