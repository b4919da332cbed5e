//! Publishing, answers and retention.

use super::state::time;
use super::*;

impl World {
    pub(super) fn publish(&mut self, id: u8, key: u8, later: u64, lives: u64) {
        let now = self.model.now;
        let mut event = Event::new(id.to_string(), "/test", "t").unwrap();
        let key = Some(key).filter(|key| *key > 0);
        if let Some(key) = key {
            event = event.with_attribute("partitionkey", &key.to_string()).unwrap();
            event = event.with_attribute("subject", &(key % 2).to_string()).unwrap();
        }
        let at = |wait: u64| if wait == 0 { 0 } else { now + wait };
        let (later, expires) = (at(later), at(lives));
        for (name, ms) in [("deliverat", later), ("expirytime", expires)] {
            if ms > 0 {
                event = event.with_attribute(name, &time(ms)).unwrap();
            }
        }
        let entry = Prepared::new(Entry { event, route: String::new() }, now);
        let published = self.engine().append(TOPIC, vec![entry], now).unwrap()[0];
        let horizon = now.saturating_sub(self.model.window);
        let id = id.to_string();
        let same = |stored: &Stored| stored.id == id && stored.only.is_none();
        let before = self.model.topic.iter().zip(1..).filter(|(stored, _)| same(stored));
        let before = before.filter(|(stored, _)| stored.published >= horizon);
        let before: Vec<_> = before.filter(|_| self.model.window > 0).collect();
        match before.last() {
            Some((last, position)) if !last.gone => {
                assert_eq!((published.position, published.duplicate), (*position, true));
                return;
            }
            // One that is older, and there, may be known or not.
            Some(_) if published.duplicate => {
                assert!(before.iter().any(|(it, at)| *at == published.position && !it.gone));
                return;
            }
            Some(_) | None => {}
        }
        self.model.topic.push(Stored {
            id,
            key,
            published: now,
            later,
            expires,
            only: None,
            gone: false,
        });
        let position = self.model.topic.len() as u64;
        assert_eq!((published.position, published.duplicate), (position, false));
    }

    pub(super) fn event(&mut self, sub: usize, position: u64) -> &mut Know {
        let events = &mut self.model.subs[sub].events;
        if events.len() <= index(position) {
            events.resize(index(position) + 1, Know::default());
        }
        &mut events[index(position)]
    }

    pub(super) fn settle(&mut self, at: usize, outcome: &Settle) {
        if self.out.is_empty() {
            return;
        }
        let at = at % self.out.len();
        let out = self.out.swap_remove(at);
        let now = self.model.now;
        let letters = self.letters();
        self.engine().settle(out.consumer, out.delivery, outcome, now).unwrap();
        let is_letter = self.letters() > letters;
        let stored = self.model.topic[index(out.position)].clone();
        if is_letter {
            self.model.letters.push(Some((out.sub, stored.clone())));
        }
        if out.epoch != self.model.subs[out.sub].epoch {
            assert!(!is_letter);
            return;
        }
        let event = self.event(out.sub, out.position);
        if event.fate != Fate::Out {
            // Retention took it.
            return;
        }
        match outcome {
            Settle::Ack => event.fate = Fate::Done,
            Settle::Retry { delay } => {
                event.spent += 1;
                event.fate = Fate::Waits { until: now + u64::try_from(delay.as_millis()).unwrap() };
            }
            Settle::Release { delay } => {
                event.fate = Fate::Waits { until: now + u64::try_from(delay.as_millis()).unwrap() };
            }
            Settle::DeadLetter { .. } => {
                event.fate = Fate::Done;
                assert_eq!(is_letter, !stored.gone);
            }
        }
    }

    pub(super) fn letters(&mut self) -> u64 {
        self.engine().topics.get(LETTERS).map_or(1, topic::Topic::end)
    }

    pub(super) fn give_back(&mut self, back: Vec<Out>) {
        for out in back {
            let stale = out.epoch != self.model.subs[out.sub].epoch;
            let event = self.event(out.sub, out.position);
            if !stale && event.fate == Fate::Out {
                event.fate = Fate::Waits { until: 0 };
            }
        }
    }

    pub(super) fn tick(&mut self) {
        let now = self.model.now;
        self.engine().tick(now).unwrap();
        let first = self.engine().topics[TOPIC].row().first;
        for position in 1..first {
            let stored = &mut self.model.topic[index(position)];
            if std::mem::replace(&mut stored.gone, true) {
                continue;
            }
            assert!(now - stored.published >= RETENTION.max(self.model.window), "too young");
            let stored = stored.clone();
            let dropped = self.model.drops || (stored.expires > 0 && stored.expires <= now);
            for (sub, name) in NAMES.iter().enumerate() {
                let done = self.event(sub, position).fate == Fate::Done;
                let mine = stored.only.is_none_or(|only| only == sub);
                assert!(dropped || done || !mine, "{position} was needed by {name}");
            }
        }
        if self.model.drops {
            for sub in 0..NAMES.len() {
                for position in 1..first {
                    self.event(sub, position).fate = Fate::Done;
                }
            }
        }
    }

    pub(super) fn redrive(&mut self, position: u64) {
        let now = self.model.now;
        let letter = self.model.letters.get_mut(index(position)).and_then(|letter| {
            let stays = letter.as_ref().is_some_and(|(_, it)| it.expires > 0 && it.expires <= now);
            if stays { None } else { letter.take() }
        });
        if !self.engine().topics.contains_key(LETTERS) {
            return;
        }
        let moved = self.engine().redrive(LETTERS, vec![position], now).unwrap();
        assert_eq!(moved, u64::from(letter.is_some()), "letter {position}");
        if let Some((sub, stored)) = letter {
            let stored = Stored { only: Some(sub), published: now, gone: false, ..stored };
            self.model.topic.push(stored);
        }
    }
}
