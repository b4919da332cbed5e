//! Events that another bus had.

use super::message;
use super::names::message_id;
use super::shared::{NatsError, Shared};
use crate::bus::{Import, TopicConfig, dead_letter};

impl Shared {
    /// Sends all events, then waits for JetStream to acknowledge each.
    pub(super) async fn import(&self, name: &str, events: Vec<Import>) -> Result<(), NatsError> {
        let topic = self.topic(name, TopicConfig::undeclared(name)).await?;
        self.connected()?;
        let mut acks = Vec::with_capacity(events.len());
        for import in events {
            let id = identity(&import, topic.dedup);
            let event = match import.only {
                None => import.event,
                Some(only) => message::edit(import.event, |attributes| {
                    attributes.insert(dead_letter::REDRIVE_TO.to_owned(), only);
                })
                .map_err(|error| NatsError::Failed(error.to_string()))?,
            };
            acks.push(self.send(&topic, &event, Some(id), 0).await?);
        }
        for ack in acks {
            self.acknowledged(name, ack).await?;
        }
        Ok(())
    }
}

/// What the same event has when it is sent again. Older events of one source and id are different ones: they were
/// published further apart than their window, and come here close together.
fn identity(import: &Import, dedup: bool) -> String {
    let own = message_id(import.event.source(), import.event.id());
    match &import.only {
        None if import.recent && dedup => own,
        None => format!("import {} {own}", import.position),
        Some(only) => format!("import {} {own} {only}", import.position),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloudevent::Event;

    #[test]
    fn only_what_its_publisher_may_repeat_has_its_own_identity() {
        let event = Event::new("1", "/s", "t").unwrap();
        let import = |position, only: Option<&str>, recent| {
            let only = only.map(str::to_owned);
            identity(&Import { event: event.clone(), position, only, recent }, true)
        };
        assert_eq!(import(7, None, true), message_id("/s", "1"));
        assert_ne!(import(7, None, false), import(8, None, false));
        assert_ne!(import(7, Some("a/b"), true), import(7, Some("a/c"), true));
        assert_eq!(import(7, Some("a/b"), true), import(7, Some("a/b"), false));
    }
}
