//! One topic's rows, to the bus.

use std::collections::BTreeSet;

use duet_events::bus::{PublishError, PublishErrorKind};
use futures::future::BoxFuture;

use super::Relay;
use crate::plan::{Bad, Group, Item};
use crate::row::{RowError, RowKey};

/// What became of them.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The bus has these.
    pub(super) acknowledged: Vec<RowKey>,
    /// The bus will never take these.
    pub(super) bad: Vec<Bad>,
    /// Topics whose rows it does not take, and why.
    pub(super) refused_topics: Vec<(String, String)>,
    /// Why the rest was not published.
    pub(super) failed: Option<PublishError>,
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
                Ok(_stored) => {
                    outcome.acknowledged.extend(group.items.iter().map(|item| item.row.clone()));
                    return Ok(());
                }
                // One of them, perhaps.
                Err(error) if error.kind == PublishErrorKind::Invalid => {}
                Err(error) => return Err(error),
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
                Ok(_stored) => outcome.acknowledged.push(item.row.clone()),
                Err(error) if error.kind == PublishErrorKind::Invalid => {
                    held.extend(item.key.clone());
                    outcome.bad.push(Bad {
                        sequence: item.row.sequence,
                        id: item.row.id.clone(),
                        key: item.key.clone(),
                        error: RowError::Refused(error.message),
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
