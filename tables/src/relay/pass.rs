//! One look at the table: reads, publishes, settles.

use std::time::Duration;

use duet_events::bus::{PublishError, PublishErrorKind};
use futures::future::join_all;
use tokio::time::Instant;

use super::publish::Outcome;
use super::{FIRST_READ, Known, Relay, Session};
use crate::plan::{Plan, plan};
use crate::row::{Row, RowKey};
use crate::spec::SourceError;

/// Most rows of one read: it starts small, and grows while rows are small.
const LARGEST_READ: u32 = 1024;
/// What is being published when the end comes may take this long; a part of [`super::LAST_WORD`].
const LAST_PUBLISH: Duration = Duration::from_secs(2);
/// What is wrong where the database is silent about it.
const KEPT: &str = "rows are still there that were published, and that the database was told to delete or mark, \
    without an error; does row-level security lack a policy for that, or does a trigger prevent it? They are not \
    published again, and others wait";

/// What a look at the table came to.
#[derive(Debug, PartialEq)]
pub(super) enum Passed {
    /// There is more.
    More,
    /// Nothing is left to do.
    Done,
    /// The bus did not take it.
    Refused,
}

impl Relay {
    /// Reads, publishes, and settles what the bus has.
    pub(super) async fn pass(
        &self,
        session: &mut Session,
        known: &mut Known,
    ) -> Result<Passed, SourceError> {
        let (rows, more) = self.next_rows(session, known).await?;
        let outcome = tokio::select! {
            outcome = self.publish_all(plan(rows, &self.spec)) => outcome,
            // What the bus may have by now is published again by whoever leads next.
            () = self.stopped_for(LAST_PUBLISH) => return Ok(Passed::Done),
        };
        self.count_duplicates(&outcome, known);
        known.owed.add(&outcome.acknowledged);
        self.settle(session, known, &outcome.acknowledged).await?;
        session.well = true;
        if known.said.database.take().is_some() {
            tracing::info!(source = self.spec.name, "the outbox table is relayed again");
        }
        self.leave_out(&outcome, session, known);
        if let Some(error) = outcome.failed {
            return Ok(self.refused(&error, known));
        }
        if known.said.bus.take().is_some() {
            tracing::info!(source = self.spec.name, "the bus takes rows again");
        }
        // Where rows may have been kept, going on at once could go on for ever.
        Ok(if more && !known.owed.in_doubt() { Passed::More } else { Passed::Done })
    }

    /// Deletes or marks rows that the bus has, and leaves those alone for a while that the application has locked.
    pub(super) async fn settle(
        &self,
        session: &mut Session,
        known: &mut Known,
        rows: &[RowKey],
    ) -> Result<(), SourceError> {
        for rows in rows.chunks(LARGEST_READ as usize) {
            let settled = session.table.settle(rows).await?;
            known.owed.settle(rows, &settled);
            self.metrics.relayed.with_label_values(&[&self.spec.name]).inc_by(settled.rows);
            if !settled.locked.is_empty() {
                self.wait_for_excluded(session);
                session.excluded.locked.extend(settled.locked.iter().map(|row| row.sequence));
            }
        }
        Ok(())
    }

    /// The first rows that wait and that the bus does not have, and whether there may be more.
    async fn next_rows(
        &self,
        session: &mut Session,
        known: &mut Known,
    ) -> Result<(Vec<Row>, bool), SourceError> {
        let began = Instant::now();
        let read = session.table.read(&session.excluded, session.read).await?;
        session.took = began.elapsed();
        let (mut rows, more) = (read.rows, read.more);
        let full = u32::try_from(rows.len()).is_ok_and(|count| count >= session.read);
        session.read = match more {
            true if full => (session.read * 2).min(LARGEST_READ),
            // It came to its bytes before.
            true => (session.read / 2).max(FIRST_READ),
            false => session.read,
        };
        let last = rows.last().map_or(i64::MAX, |row| row.sequence);
        let seen = if more { last } else { i64::MAX };
        let seen = Some(seen).filter(|_| session.excluded.hides_nothing());
        if let Err(kept) = known.owed.sift(&mut rows, seen) {
            let (source, table) = (&self.spec.name, &self.spec.table);
            let (row, id) = (kept.row.sequence, kept.row.id);
            tracing::debug!(source, table, row, id, "a published row is still there");
            return Err(SourceError::Table { table: table.clone(), reason: KEPT.to_owned() });
        }
        Ok((rows, more))
    }

    /// All topics at once.
    async fn publish_all(&self, plan: Plan) -> Outcome {
        let mut publishes = Vec::with_capacity(plan.topics.len());
        for (topic, groups) in &plan.topics {
            publishes.push(self.publish(topic, groups));
        }
        let mut all = Outcome { bad: plan.bad, ..Outcome::default() };
        for (mut outcome, topic) in join_all(publishes).await.into_iter().zip(plan.topics.keys()) {
            if let Some(error) = outcome.failed.take_if(|error| self.is_about_topic(error)) {
                outcome.refused_topics.push((topic.clone(), error));
            }
            all.extend(outcome);
        }
        all
    }

    /// Where each row names its topic, a topic that is refused holds up its own rows only.
    fn is_about_topic(&self, error: &PublishError) -> bool {
        use PublishErrorKind::{
            Denied, Full, Internal, Invalid, Unavailable, UnknownBus, UnknownTopic,
        };
        let about_one = match error.kind {
            UnknownTopic | Invalid | Denied | Full | Internal => true,
            UnknownBus | Unavailable => false,
        };
        about_one && self.spec.topic.is_none()
    }
}
