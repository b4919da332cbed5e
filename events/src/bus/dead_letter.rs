//! The attributes that a dead letter carries besides its own. The names are the same on every bus.

use std::collections::BTreeMap;

use crate::cloudevent::{Event, clean_text};

/// Why the event was given up, for people.
pub const REASON: &str = "deadletterreason";
/// The last answer's HTTP status; 0 where there was none.
pub const STATUS: &str = "deadletterstatus";
/// The topic that it was published to.
pub const TOPIC: &str = "deadlettertopic";
/// The subscription that gave it up.
pub const SUBSCRIPTION: &str = "deadlettersub";
/// Attempts that were made.
pub const ATTEMPTS: &str = "deadletterattempts";
/// On an event that was moved back: the one subscription that it is for. Never delivered.
pub const REDRIVE_TO: &str = "redriveto";

/// End of the name of a topic of dead letters, after that of their own topic, unless a subscription names another one.
pub const SUFFIX: &str = ".dead-letter";

/// Longest reason, in characters.
const MAX_REASON: usize = 512;

/// What is known of a delivery that was given up.
#[derive(Clone, Copy, Debug)]
pub struct Verdict<'a> {
    /// For people.
    pub reason: &'a str,
    /// The last answer's HTTP status; 0 where there was none.
    pub status: u32,
    /// The event's topic.
    pub topic: &'a str,
    /// The subscription.
    pub subscription: &'a str,
    /// Attempts that were made.
    pub attempts: u32,
}

impl Verdict<'_> {
    /// The attributes to add to the event.
    #[must_use]
    pub fn attributes(&self) -> [(&'static str, String); 5] {
        let reason: String = self.reason.chars().take(MAX_REASON).collect();
        [
            (REASON, clean_text(&reason)),
            (STATUS, self.status.to_string()),
            (TOPIC, self.topic.to_owned()),
            (SUBSCRIPTION, self.subscription.to_owned()),
            (ATTEMPTS, self.attempts.to_string()),
        ]
    }
}

/// All that this module adds.
const OURS: [&str; 6] = [REASON, STATUS, TOPIC, SUBSCRIPTION, ATTEMPTS, REDRIVE_TO];

/// Takes away everything that this module adds.
pub fn strip(attributes: &mut BTreeMap<String, String>) {
    for name in OURS {
        attributes.remove(name);
    }
}

/// An event as a publisher may bring it: without all that only the bus may say. Otherwise whoever may publish to one
/// topic could have an event moved to another as if it had been given up there, or hide one from all subscriptions but
/// one. It is no error: someone may have received the event as a dead letter and pass it on.
#[must_use]
pub fn unmarked(mut event: Event) -> Event {
    for name in OURS {
        event.remove_attribute(name);
    }
    event
}

/// The one subscription that an event is for, where it was moved back.
#[must_use]
pub fn redriven_to(event: &Event) -> Option<&str> {
    event.attribute(REDRIVE_TO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publisher_cannot_say_what_only_the_bus_may() {
        let mut event = Event::new("1", "/s", "t").unwrap().with_attribute("subject", "x").unwrap();
        for name in OURS {
            event = event.with_attribute(name, "1").unwrap();
        }
        let names: Vec<_> = unmarked(event).attributes().keys().cloned().collect();
        assert_eq!(names, ["subject"]);
    }

    #[test]
    fn all_that_a_verdict_adds_is_taken_away_again() {
        let verdict =
            Verdict { reason: "no", status: 500, topic: "t", subscription: "a/s", attempts: 1 };
        let added = verdict.attributes().map(|(name, value)| (name.to_owned(), value));
        let mut attributes = BTreeMap::from(added);
        strip(&mut attributes);
        assert_eq!(attributes, BTreeMap::new());
    }
}
