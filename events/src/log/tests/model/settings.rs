//! Consumers, settings, and what an operator does.

use super::*;

impl World {
    pub(super) fn spec(&self, sub: usize, room: u32) -> SubscriptionSpec {
        SubscriptionSpec {
            start: Start::Earliest,
            max_in_flight: room,
            ordered: sub == 0 || (sub == 1 && self.model.ordered),
            ..SubscriptionSpec::new(NAMES[sub], "default", TOPIC).unwrap()
        }
    }

    pub(super) fn configure(&mut self) {
        let config = TopicConfig {
            dedup_window: Duration::from_millis(self.model.window),
            retention_age: Some(Duration::from_millis(RETENTION)),
            retention_bytes: None,
            drop_unhandled: self.model.drops,
            order_by: if self.model.by_subject { "subject" } else { "partitionkey" }.to_owned(),
        };
        let now = self.model.now;
        self.engine().ensure_topic(TOPIC, &config, now).unwrap();
    }

    pub(super) fn open(&mut self, sub: usize, room: u32) {
        if self.consumers.iter().filter(|consumer| consumer.sub == sub).count() == 2 {
            return;
        }
        let (sender, deliveries) = mpsc::channel(room as usize);
        let (spec, id) = (self.spec(sub, room), self.next_consumer);
        self.next_consumer += 1;
        self.engine().consume(id, &spec, false, sender).unwrap();
        self.consumers.push(Consumer { sub, id, room, deliveries });
    }

    pub(super) fn close(&mut self, at: usize) {
        if self.consumers.is_empty() {
            return;
        }
        let Consumer { id, .. } = self.consumers.remove(at % self.consumers.len());
        self.engine().close_consumer(id);
        let (back, out) = self.out.iter().partition(|out| out.consumer == id);
        self.out = out;
        self.give_back(back);
    }

    pub(super) fn order(&mut self, by_subject: bool) {
        if self.model.by_subject != by_subject {
            self.model.by_subject = by_subject;
            self.model.subs[0].reordered = true;
        }
        self.configure();
    }

    pub(super) fn seek_time(&mut self, sub: usize, ms: u64) {
        self.engine().seek(NAMES[sub], Start::Time(ms)).unwrap();
        let stored = self.model.topic.iter().zip(1..);
        let mut found = stored.filter(|(it, _)| !it.gone && it.published >= ms);
        let end = self.model.topic.len() as u64 + 1;
        let start = found.next().map_or(end, |(_, position)| position);
        self.moved(sub, start);
    }

    pub(super) fn moved(&mut self, sub: usize, position: u64) {
        let first = self.engine().topics[TOPIC].row().first;
        let end = self.model.topic.len() as u64 + 1;
        let start = position.clamp(first, end);
        let known = &mut self.model.subs[sub];
        known.epoch += 1;
        known.events = vec![Know { fate: Fate::Done, spent: 0 }; index(start)];
    }

    pub(super) fn remove(&mut self, position: u64) {
        let stored = self.model.topic.get_mut(index(position));
        let there = stored.is_some_and(|stored| !std::mem::replace(&mut stored.gone, true));
        let removed = self.engine().remove_events(TOPIC, vec![position]).unwrap();
        assert_eq!(removed, u64::from(there));
    }

    /// Forgets a subscription, and declares it anew.
    pub(super) fn forget(&mut self, sub: usize) {
        self.engine().remove(NAMES[sub]);
        let spec = self.spec(sub, 64);
        self.engine().declare_for_resource(&spec).unwrap();
        self.consumers.retain(|consumer| consumer.sub != sub);
        self.out.retain(|out| out.sub != sub);
        let first = self.engine().topics[TOPIC].row().first;
        let events = vec![Know { fate: Fate::Done, spent: 0 }; index(first)];
        self.model.subs[sub] = Sub { events, ..Sub::default() };
    }
}
