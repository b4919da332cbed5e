//! One topic's rows, to the bus.

use std::collections::BTreeSet;

use duet_events::bus::{PublishError, PublishErrorKind, Published};
use futures::future::BoxFuture;

use super::Relay;
use crate::plan::{Bad, Group, Item};
use crate::row::{RowError, RowKey};

/// What became of them.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The bus has these.
    pub(super) acknowledged: Vec<RowKey>,
    /// Those of them that it had before.
    pub(super) duplicates: Vec<RowKey>,
    /// The bus may have these, as publishing them failed.
    pub(super) tried: Vec<RowKey>,
    /// The bus will never take these.
    pub(super) bad: Vec<Bad>,
    /// Topics whose rows it does not take, now or ever, and why.
    pub(super) refused_topics: Vec<(String, PublishError)>,
    /// Why the rest was not published.
    pub(super) failed: Option<PublishError>,
}

impl Outcome {
    fn stored(&mut self, items: &[Item], stored: &[Published]) {
        self.acknowledged.extend(items.iter().map(|item| item.row.clone()));
        let duplicates = items.iter().zip(stored).filter(|(_, stored)| stored.duplicate);
        self.duplicates.extend(duplicates.map(|(item, _)| item.row.clone()));
    }

    pub(super) fn extend(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.duplicates.extend(other.duplicates);
        self.tried.extend(other.tried);
        self.bad.extend(other.bad);
        self.refused_topics.extend(other.refused_topics);
        self.failed = other.failed.or(self.failed.take());
    }
}

impl Relay {
    /// One group after the other, so that none overtakes one that failed.
    pub(super) fn publish<'a>(
        &'a self,
        topic: &'a str,
        groups: &'a [Group],
    ) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            let mut outcome = Outcome::default();
            for group in groups {
                if let Err(error) = self.group(topic, group, &mut outcome).await {
                    outcome.failed = Some(error);
                    break;
                }
            }
            outcome
        })
    }

    async fn group(
        &self,
        topic: &str,
        group: &Group,
        outcome: &mut Outcome,
    ) -> Result<(), PublishError> {
        if outcome.bad.is_empty() {
            let events = group.items.iter().map(|item| item.event.clone()).collect();
            match self.bus.publish(topic, events).await {
                Ok(stored) => {
                    outcome.stored(&group.items, &stored);
                    return Ok(());
                }
                Err(error) => {
                    outcome.tried.extend(group.items.iter().map(|item| item.row.clone()));
                    // One of them, perhaps.
                    if error.kind != PublishErrorKind::Invalid {
                        return Err(error);
                    }
                }
            }
        }
        self.one_by_one(topic, &group.items, outcome).await
    }

    /// Finds the rows that the bus never takes, and publishes the others, but for those that would overtake one.
    async fn one_by_one(
        &self,
        topic: &str,
        items: &[Item],
        outcome: &mut Outcome,
    ) -> Result<(), PublishError> {
        let keys = outcome.bad.iter().filter_map(|bad| bad.key.clone());
        let mut held: BTreeSet<String> = keys.collect();
        for item in items {
            if item.key.as_ref().is_some_and(|key| held.contains(key)) {
                continue;
            }
            match self.bus.publish(topic, vec![item.event.clone()]).await {
                Ok(stored) => outcome.stored(std::slice::from_ref(item), &stored),
                Err(error) if error.kind == PublishErrorKind::Invalid => {
                    held.extend(item.key.clone());
                    outcome.bad.push(Bad {
                        sequence: item.row.sequence,
                        id: item.row.id.clone(),
                        key: item.key.clone(),
                        error: RowError::Refused(error.message),
                    });
                }
                Err(error) => {
                    outcome.tried.push(item.row.clone());
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}
