//! What may come, what has to come, and what can be counted.

use super::*;
use crate::log::store::Found;

/// An event that a subscription has yet to handle: position, what is stored, and what it knows of it.
type Open = (u64, Stored, Know);

impl World {
    /// Takes what is handed out, and looks whether each may be.
    pub(super) fn receive(&mut self) {
        let now = self.model.now;
        while self.engine().hand_out(now).unwrap() {}
        let mut came = Vec::new();
        for Consumer { sub, id, deliveries, .. } in &mut self.consumers {
            while let Ok(delivery) = deliveries.try_recv() {
                came.push((*sub, *id, delivery));
            }
        }
        for (sub, consumer, delivery) in came {
            self.came(sub, consumer, delivery);
        }
        for sub in 0..NAMES.len() {
            let open = self.open_events(sub);
            if !self.model.subs[sub].reordered {
                self.is_in_order(sub, &open);
            }
            self.has_all(sub, &open);
        }
    }

    fn came(&mut self, sub: usize, consumer: u64, delivery: LogDelivery) {
        let now = self.model.now;
        let LogDelivery { id, position, attempt, record, .. } = delivery;
        let stored = self.model.topic[index(position)].clone();
        let known = self.event(sub, position).clone();
        let what = format!("{} at {position}: {stored:?}, {known:?}, now {now}", NAMES[sub]);
        assert_eq!(record.event.unwrap().id, stored.id, "{what}");
        assert!(!stored.gone, "{what}");
        assert!(stored.only.is_none_or(|only| only == sub), "{what}");
        assert!(!stored.is_expired(now), "{what}");
        assert!(known.spent > 0 || stored.later <= now, "too early: {what}");
        assert_eq!(attempt, known.spent + 1, "{what}");
        match known.fate {
            Fate::Never => {}
            Fate::Waits { until } => assert!(until <= now, "too early: {what}"),
            Fate::Out | Fate::Done => panic!("twice: {what}"),
        }
        self.event(sub, position).fate = Fate::Out;
        let epoch = self.model.subs[sub].epoch;
        self.out.push(Out { sub, consumer, delivery: id, position, epoch });
    }

    fn open_events(&mut self, sub: usize) -> Vec<Open> {
        let mut open = Vec::new();
        for position in 1..=self.model.topic.len() as u64 {
            let stored = self.model.topic[index(position)].clone();
            let known = self.event(sub, position).clone();
            if known.fate != Fate::Done && stored.only.is_none_or(|only| only == sub) {
                open.push((position, stored, known));
            }
        }
        open
    }

    /// The key by which an event is in order.
    fn lane(&self, sub: usize, stored: &Stored) -> Option<u8> {
        let by_subject = self.model.by_subject;
        stored.key.filter(|_| sub == 0).map(|key| if by_subject { key % 2 } else { key })
    }

    /// Of each key one is out, and nothing was published before it that is not done. What is published for a time is in
    /// nobody's way.
    fn is_in_order(&self, sub: usize, open: &[Open]) {
        let now = self.model.now;
        let out = |(_, stored, known): &&Open| known.fate == Fate::Out && !stored.gone;
        for (position, stored, _) in open.iter().filter(out) {
            let Some(key) = self.lane(sub, stored) else { continue };
            let lane = open.iter().filter(|(other, stored, _)| {
                other != position && self.lane(sub, stored) == Some(key)
            });
            assert!(lane.clone().find(out).is_none(), "beside {position}");
            let mut before = lane.filter(|(other, stored, _)| {
                other < position && stored.later == 0 && !stored.gone && !stored.is_expired(now)
            });
            assert!(stored.later > 0 || before.next().is_none(), "{position} overtook");
        }
    }

    /// Whoever has room gets what is due and not held back.
    fn has_all(&self, sub: usize, open: &[Open]) {
        let now = self.model.now;
        let in_hand = |id| self.out.iter().filter(|out| out.consumer == id).count();
        let room = self
            .consumers
            .iter()
            .any(|consumer| consumer.sub == sub && in_hand(consumer.id) < consumer.room as usize);
        // Whoever is held back while the order changes is not told here.
        if !room || self.model.subs[sub].paused || sub == 1 || self.model.subs[sub].reordered {
            return;
        }
        for (position, stored, known) in open {
            let due = match known.fate {
                Fate::Never => true,
                Fate::Waits { until } => until <= now,
                Fate::Out | Fate::Done => false,
            };
            let due = due && (known.spent > 0 || stored.later <= now);
            if !due || stored.gone || stored.is_expired(now) {
                continue;
            }
            let key = self.lane(sub, stored);
            let held_back = open.iter().any(|(other, stored, known)| {
                let holds = match known.fate {
                    Fate::Out => true,
                    Fate::Waits { until } => until > now,
                    Fate::Never | Fate::Done => false,
                };
                holds && other != position && key.is_some() && self.lane(sub, stored) == key
            });
            assert!(held_back, "{} lacks {position}: {stored:?}, {known:?}", NAMES[sub]);
        }
    }

    /// Numbers that can be counted.
    pub(super) fn count(&mut self) {
        let end = self.engine().topics[TOPIC].end();
        assert_eq!(end, self.model.topic.len() as u64 + 1);
        for name in [TOPIC, LETTERS] {
            let Some(topic) = self.engine().topics.get(name) else { continue };
            let (row, events) = (topic.row().clone(), topic.events());
            let (mut bytes, mut count) = (0, 0);
            for position in row.first..row.next {
                if let Found::Record(_, length) = self.engine().find(name, position).unwrap() {
                    bytes += length;
                    count += 1;
                }
            }
            assert_eq!((row.bytes, events), (bytes, count), "{name}");
        }
        let now = self.model.now;
        for status in self.engine().subscription_statuses(now).unwrap() {
            let sub = NAMES.iter().position(|name| **name == status.name).unwrap();
            // Whether one has expired is known when its turn comes.
            let open = self.open_events(sub).into_iter();
            let open: Vec<_> = open.filter(|(_, it, _)| !it.gone && it.expires == 0).collect();
            assert!(status.waiting() >= open.len() as u64, "{status:?} {open:?}");
            if let Some((oldest, ..)) = open.first() {
                assert!(status.first.is_some_and(|first| first.position <= *oldest), "{status:?}");
            }
        }
    }
}
