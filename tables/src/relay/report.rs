//! What an operator is told: logs, once each, and metrics.

use std::collections::BTreeMap;

use duet_events::bus::PublishError;
use tokio::time::Instant;

use super::pass::Passed;
use super::publish::Outcome;
use super::{BAD_ROW_PAUSE, Known, Relay, Session};
use crate::spec::SourceError;

/// How many ids a log line names.
const NAMED: usize = 5;

/// What has been said already, so that it is said once.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) database: Option<String>,
    pub(super) bus: Option<String>,
    /// Bad rows by sequence, and why.
    pub(super) rows: BTreeMap<i64, String>,
    /// Topics that the bus refused, and why.
    pub(super) topics: BTreeMap<String, String>,
    /// Ids of rows without a place.
    unplaced: Vec<String>,
    /// The bus had a row that this process did not publish.
    duplicate: bool,
}

impl Said {
    /// Whether this was not said of the topic yet; it counts as said now.
    fn is_news(&mut self, topic: &str, error: &PublishError) -> bool {
        let before = self.topics.insert(topic.to_owned(), error.message.clone());
        before.as_ref() != Some(&error.message)
    }
}

impl Relay {
    /// What cannot be published is left alone for a while.
    pub(super) fn leave_out(&self, outcome: &Outcome, session: &mut Session, known: &mut Known) {
        let (refused, for_now): (Vec<_>, Vec<_>) =
            outcome.refused_topics.iter().partition(|(_, error)| error.is_permanent());
        if !(outcome.bad.is_empty() && refused.is_empty()) {
            self.wait_for_excluded(session);
        }
        if !for_now.is_empty() {
            session.wait_for_topics();
        }
        let (excluded, said) = (&mut session.excluded, &mut known.said);
        let (source, table) = (&self.spec.name, &self.spec.table);
        for bad in &outcome.bad {
            excluded.add(bad);
            let reason = bad.error.to_string();
            if said.rows.get(&bad.sequence) != Some(&reason) {
                let (row, id) = (bad.sequence, &bad.id);
                tracing::error!(
                    source,
                    table,
                    row,
                    id,
                    reason,
                    "a row of the outbox table cannot be published; it stays, and is tried again"
                );
                self.count_error("row");
                said.rows.insert(row, reason);
            }
        }
        for (topic, error) in refused {
            excluded.topics.insert(topic.clone());
            if said.is_news(topic, error) {
                let reason = &error.message;
                tracing::error!(source, table, topic, reason, "rows wait for their topic");
                self.count_error("row");
            }
        }
        for (topic, error) in for_now {
            excluded.topics_for_now.insert(topic.clone());
            self.count_error("bus");
            if said.is_news(topic, error) {
                tracing::warn!(source, table, topic, %error, "the bus does not take rows of a topic; trying again");
            }
        }
        self.count_bad(session, known);
    }

    /// Something is about to be left out: from now on if nothing was before.
    pub(super) fn wait_for_excluded(&self, session: &mut Session) {
        if session.excluded.is_empty() {
            session.retry_at = Instant::now() + BAD_ROW_PAUSE.max(self.spec.poll);
        }
    }

    /// Rows without a place in the order are never read; these are all there are.
    pub(super) fn unplaced(&self, ids: Vec<String>, session: &Session, known: &mut Known) {
        if known.said.unplaced == ids {
            return;
        }
        if !ids.is_empty() {
            let (source, table) = (&self.spec.name, &self.spec.table);
            let (rows, first) = (ids.len(), ids.get(..NAMED).unwrap_or(&ids).join(", "));
            tracing::error!(
                source,
                table,
                rows,
                first,
                "rows of the outbox table cannot be published: their sequence is not an integer; these are ids of them"
            );
            self.count_error("row");
        }
        known.said.unplaced = ids;
        self.count_bad(session, known);
    }

    fn count_bad(&self, session: &Session, known: &Known) {
        let bad = session.excluded.rows.len() + known.said.unplaced.len();
        let bad = i64::try_from(bad).unwrap_or(i64::MAX);
        self.metrics.bad.with_label_values(&[&self.spec.name]).set(bad);
    }

    /// An id that is used twice is an event that nobody gets, so it must not pass in silence.
    pub(super) fn count_duplicates(&self, outcome: &Outcome, known: &mut Known) {
        let source = &self.spec.name;
        known.tried.add(&outcome.tried);
        let duplicates = u64::try_from(outcome.duplicates.len()).unwrap_or(u64::MAX);
        self.metrics.duplicates.with_label_values(&[source]).inc_by(duplicates);
        for duplicate in &outcome.duplicates {
            if !known.tried.take(duplicate) && !known.said.duplicate {
                known.said.duplicate = true;
                let (row, id) = (duplicate.sequence, &duplicate.id);
                tracing::warn!(
                    source,
                    table = self.spec.table,
                    row,
                    id,
                    "the bus already had the event of a row that this process did not publish: a sidecar died before \
                     it could delete or mark the row, or its id is used twice and the event is lost; further ones are \
                     only counted"
                );
            }
        }
        for row in &outcome.acknowledged {
            known.tried.take(row);
        }
    }

    pub(super) fn refused(&self, error: &PublishError, known: &mut Known) -> Passed {
        self.count_error("bus");
        let text = error.to_string();
        if known.said.bus.as_ref() != Some(&text) {
            let source = &self.spec.name;
            tracing::warn!(source, %error, "the bus does not take rows of the outbox table; they stay, trying again");
            known.said.bus = Some(text);
        }
        Passed::Refused
    }

    pub(super) fn failed(&self, error: &SourceError, known: &mut Known) {
        self.count_error("database");
        let text = error.to_string();
        if known.said.database.as_ref() != Some(&text) {
            let source = &self.spec.name;
            tracing::error!(source, %error, "the outbox table cannot be relayed; trying again");
            known.said.database = Some(text);
        }
    }

    fn count_error(&self, reason: &str) {
        self.metrics.errors.with_label_values(&[self.spec.name.as_str(), reason]).inc();
    }
}
