//! What a stream has sent down and has no answer to. The application's answers name an event by its id, which other
//! sources may use as well, and say nothing of the attempt: so one event of an id is there at a time, and answers that come
//! too late are counted. Pure, but for the channels.

use std::collections::HashMap;
use std::time::Duration;

use duet_events::Event;
use duet_events::bus::AppAnswer;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// An answer that did not come within this time after its event does not come any more: another event may have the id.
const LOST: Duration = Duration::from_secs(600);
/// Ids with an answer to come. Beyond that, those whose time ran out are forgotten.
const MOST: usize = 10_000;

/// By id.
#[derive(Debug, Default)]
pub(super) struct Sent(HashMap<String, One>);

/// The event that has an id.
#[derive(Debug)]
struct One {
    source: String,
    /// Who waits for an answer; closed once the time for it ran out.
    waiting: Option<oneshot::Sender<AppAnswer>>,
    /// Answers to come to earlier attempts, for which nobody waits.
    late: u32,
    at: Instant,
}

impl One {
    fn is_waiting(&self) -> bool {
        self.waiting.as_ref().is_some_and(|waiting| !waiting.is_closed())
    }

    fn is_lost(&self, now: Instant) -> bool {
        !self.is_waiting() && now.duration_since(self.at) >= LOST
    }
}

impl Sent {
    /// Whether the application would take an answer to this event for nothing else. The same event may come again while an
    /// answer to it is late.
    pub(super) fn may_go(&self, event: &Event, now: Instant) -> bool {
        self.0.get(event.id()).is_none_or(|one| {
            !one.is_waiting() && (one.source == event.source() || one.is_lost(now))
        })
    }

    /// The event, which may go, is sent. Returns where its answer comes; that it is dropped means that time ran out.
    pub(super) fn add(&mut self, event: &Event, now: Instant) -> oneshot::Receiver<AppAnswer> {
        if self.0.len() >= MOST {
            self.0.retain(|_id, one| !one.is_lost(now));
        }
        if self.0.len() >= MOST {
            self.0.retain(|_id, one| one.is_waiting());
        }
        let before = self.0.remove(event.id()).filter(|one| !one.is_lost(now));
        let late = before.map_or(0, |one| one.late + u32::from(one.waiting.is_some()));
        let (waiting, answer) = oneshot::channel();
        let (source, waiting) = (event.source().to_owned(), Some(waiting));
        self.0.insert(event.id().to_owned(), One { source, waiting, late, at: now });
        answer
    }

    /// The application has answered.
    pub(super) fn answered(&mut self, id: &str, answer: AppAnswer) {
        let Some(one) = self.0.get_mut(id) else {
            tracing::debug!(id, "an answer to an event that nobody waits for");
            return;
        };
        match one.waiting.take() {
            // Of an earlier attempt, as far as anybody can tell. What is handled is handled; anything else is for the attempt
            // that is there now to say.
            Some(waiting)
                if one.late > 0 && answer != AppAnswer::Handled && !waiting.is_closed() =>
            {
                one.late -= 1;
                one.waiting = Some(waiting);
            }
            // Fails when its time ran out.
            Some(waiting) => drop(waiting.send(answer)),
            None => one.late = one.late.saturating_sub(1),
        }
        if one.waiting.is_none() && one.late == 0 {
            self.0.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: AppAnswer = AppAnswer::AskedToRetry { status: 200 };

    fn event(source: &str) -> Event {
        Event::new("1", source, "t").unwrap()
    }

    #[test]
    fn of_an_id_one_event_is_there_at_a_time() {
        let (mut sent, now) = (Sent::default(), Instant::now());
        let mut answer = sent.add(&event("/a"), now);
        assert!(!sent.may_go(&event("/b"), now) && !sent.may_go(&event("/a"), now));
        sent.answered("2", AppAnswer::Handled);
        sent.answered("1", RETRY);
        assert_eq!(answer.try_recv(), Ok(RETRY));
        assert!(sent.may_go(&event("/b"), now) && sent.0.is_empty());
    }

    #[test]
    fn a_late_answer_is_for_no_event_of_another_source() {
        let (mut sent, now) = (Sent::default(), Instant::now());
        drop(sent.add(&event("/a"), now));
        assert!(!sent.may_go(&event("/b"), now), "the answer is to come");
        assert!(sent.may_go(&event("/b"), now + LOST));
        sent.answered("1", AppAnswer::Handled);
        assert!(sent.may_go(&event("/b"), now) && sent.0.is_empty());
    }

    #[test]
    fn a_late_answer_settles_the_next_attempt_only_if_the_event_is_handled() {
        let (mut sent, now) = (Sent::default(), Instant::now());
        drop(sent.add(&event("/a"), now));
        let mut second = sent.add(&event("/a"), now);
        sent.answered("1", RETRY);
        assert!(second.try_recv().is_err(), "that was the first attempt's");
        sent.answered("1", RETRY);
        assert_eq!(second.try_recv(), Ok(RETRY));
        assert!(sent.0.is_empty());
        drop(sent.add(&event("/a"), now));
        let mut second = sent.add(&event("/a"), now);
        sent.answered("1", AppAnswer::Handled);
        assert_eq!(second.try_recv(), Ok(AppAnswer::Handled));
        assert!(!sent.may_go(&event("/b"), now), "one more answer is to come");
        sent.answered("1", AppAnswer::Handled);
        assert!(sent.may_go(&event("/b"), now));
    }

    #[test]
    fn answers_that_never_come_do_not_pile_up() {
        let (mut sent, now) = (Sent::default(), Instant::now());
        for number in 0..2 * MOST {
            drop(sent.add(&Event::new(number.to_string(), "/a", "t").unwrap(), now));
        }
        assert!(sent.0.len() <= MOST);
    }
}
