//! The task that brings rows to the bus.

mod publish;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use duet_events::bus::{EventBus, PublishError, PublishErrorKind};
use futures::future::join_all;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::excluded::Excluded;
use crate::metrics::SourceMetrics;
use crate::plan::{Plan, plan};
use crate::row::Row;
use crate::spec::{SourceError, SourceSpec};
use crate::table::Table;
use publish::Outcome;

/// Rows of one read: it starts small, and grows while rows are small.
const FIRST_READ: u32 = 64;
const LARGEST_READ: u32 = 1024;
/// A read of more bytes makes the next one smaller.
const READ_BYTES: usize = 2 << 20;
/// Between two tries while the database or the bus is away.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a replica that stands by asks whether it may lead.
const STANDBY: Duration = Duration::from_millis(500);
/// Bad rows are tried again this often.
const BAD_ROW_PAUSE: Duration = Duration::from_secs(10);
/// What is being published when the end comes may take this long.
const LAST_PUBLISH: Duration = Duration::from_secs(2);
/// How often waiting rows are counted, and how many at most.
const COUNT_EACH: Duration = Duration::from_secs(5);
const COUNT_MOST: u32 = 100_000;

/// Relays one table while this replica is the one to do so.
#[derive(Debug)]
pub struct Relay {
    spec: SourceSpec,
    bus: Arc<dyn EventBus>,
    metrics: SourceMetrics,
    stop: CancellationToken,
}

/// What a connection knows.
struct Session {
    table: Table,
    excluded: Excluded,
    /// When what is excluded is tried again.
    retry_at: Instant,
    read: u32,
    count_at: Instant,
    pause: Duration,
    /// A look at the table came to its end at least once.
    well: bool,
}

/// What has been said already, so that it is said once.
#[derive(Debug, Default)]
struct Said {
    database: Option<String>,
    bus: Option<String>,
    /// Bad rows by sequence, and why.
    rows: BTreeMap<i64, String>,
    /// Topics that the bus refused, and why.
    topics: BTreeMap<String, String>,
}

/// What a look at the table came to.
#[derive(Debug, PartialEq)]
enum Passed {
    /// There is more.
    More,
    /// Nothing is left to do.
    Done,
    /// The bus did not take it.
    Refused,
}

impl Relay {
    /// A relay of a table to its bus. `stop` ends it, between two rounds.
    #[must_use]
    pub fn new(
        spec: SourceSpec,
        bus: Arc<dyn EventBus>,
        metrics: SourceMetrics,
        stop: CancellationToken,
    ) -> Self {
        Self { spec, bus, metrics, stop }
    }

    /// Runs until it is told to stop. While the database is away it tries again, ever slower.
    pub async fn run(self) {
        let mut said = Said::default();
        let mut pause = FIRST_PAUSE;
        while !self.stop.is_cancelled() {
            let was_well = match self.session(&mut said).await {
                Ok(()) => break,
                Err((error, was_well)) => {
                    self.failed(&error, &mut said);
                    was_well
                }
            };
            pause = if was_well { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            if self.stopped_within(pause).await {
                break;
            }
        }
        self.metrics.forget(&self.spec.name);
    }

    /// One connection, until it fails (and whether it worked before) or until it is over.
    async fn session(&self, said: &mut Said) -> Result<(), (SourceError, bool)> {
        let connected = tokio::select! {
            connected = Table::connect(&self.spec) => connected,
            () = self.stop.cancelled() => return Ok(()),
        };
        let mut table = connected.map_err(|error| (error, false))?;
        let source = &self.spec.name;
        self.metrics.active.with_label_values(&[source]).set(0);
        let mut waited = false;
        while !table.lead().await.map_err(|error| (error, false))? {
            if !waited {
                tracing::info!(source, "another replica relays the outbox table; standing by");
                waited = true;
            }
            if self.stopped_within(STANDBY).await {
                table.close().await;
                return Ok(());
            }
        }
        if said.database.is_none() {
            tracing::info!(source, table = self.spec.table, "relaying the outbox table");
        }
        self.metrics.active.with_label_values(&[source]).set(1);
        let now = Instant::now();
        let mut session = Session {
            table,
            excluded: Excluded::default(),
            retry_at: now,
            read: FIRST_READ,
            count_at: now,
            pause: FIRST_PAUSE,
            well: false,
        };
        let relayed = self.relay(&mut session, said).await;
        self.metrics.active.with_label_values(&[source]).set(0);
        session.table.close().await;
        relayed.map_err(|error| (error, session.well))
    }

    async fn relay(&self, session: &mut Session, said: &mut Said) -> Result<(), SourceError> {
        let mut look = true;
        while !self.stop.is_cancelled() {
            look |= self.on_time(session, said).await?;
            // Asked first: what is written while this looks at the table is seen the next time.
            look |= session.table.changed().await?;
            let passed = match look && !session.excluded.is_full() {
                true => Box::pin(self.pass(session, said)).await?,
                false => Passed::Done,
            };
            look = passed != Passed::Done;
            let pause = match passed {
                Passed::More => {
                    session.pause = FIRST_PAUSE;
                    continue;
                }
                Passed::Done => {
                    session.pause = FIRST_PAUSE;
                    self.spec.poll
                }
                Passed::Refused => {
                    session.pause = (session.pause * 2).min(LONGEST_PAUSE);
                    session.pause
                }
            };
            if self.stopped_within(pause).await {
                break;
            }
        }
        Ok(())
    }

    /// What is to be done from time to time. True: the table is to be looked at.
    async fn on_time(&self, session: &mut Session, said: &mut Said) -> Result<bool, SourceError> {
        let now = Instant::now();
        if now >= session.count_at {
            session.count_at = now + COUNT_EACH;
            let waiting = session.table.waiting(COUNT_MOST).await?;
            self.metrics.waiting.with_label_values(&[&self.spec.name]).set(waiting);
        }
        if session.excluded.is_empty() || now < session.retry_at {
            return Ok(false);
        }
        // What was mended or removed need not be remembered.
        said.rows.retain(|sequence, _| session.excluded.rows.contains(sequence));
        said.topics.retain(|topic, _| session.excluded.topics.contains(topic));
        session.excluded = Excluded::default();
        Ok(true)
    }

    /// Reads, publishes, and settles what the bus has.
    async fn pass(&self, session: &mut Session, said: &mut Said) -> Result<Passed, SourceError> {
        let (rows, full) = self.next_rows(session).await?;
        let outcome = tokio::select! {
            outcome = self.publish_all(plan(rows, &self.spec)) => outcome,
            // What the bus may have by now is published again by whoever leads next.
            () = self.out_of_patience() => return Ok(Passed::Done),
        };
        if !outcome.acknowledged.is_empty() {
            let settled = session.table.settle(&outcome.acknowledged).await?;
            self.metrics.relayed.with_label_values(&[&self.spec.name]).inc_by(settled);
        }
        session.well = true;
        if said.database.take().is_some() {
            tracing::info!(source = self.spec.name, "the outbox table is relayed again");
        }
        self.leave_out(&outcome, session, said);
        if let Some(error) = outcome.failed {
            return Ok(self.refused(&error, said));
        }
        if said.bus.take().is_some() {
            tracing::info!(source = self.spec.name, "the bus takes rows again");
        }
        Ok(if full { Passed::More } else { Passed::Done })
    }

    /// The first rows that wait, and whether there may be more.
    async fn next_rows(&self, session: &mut Session) -> Result<(Vec<Row>, bool), SourceError> {
        let rows = session.table.read(&session.excluded, session.read).await?;
        let full = u32::try_from(rows.len()).is_ok_and(|count| count == session.read);
        let bytes: usize = rows.iter().map(Row::size).sum();
        session.read = match bytes > READ_BYTES {
            true => (session.read / 2).max(1),
            false if full => (session.read * 2).min(LARGEST_READ),
            false => session.read,
        };
        Ok((rows, full))
    }

    /// All topics at once.
    async fn publish_all(&self, plan: Plan) -> Outcome {
        let mut publishes = Vec::with_capacity(plan.topics.len());
        for (topic, groups) in &plan.topics {
            publishes.push(self.publish(topic, groups));
        }
        let mut all = Outcome { bad: plan.bad, ..Outcome::default() };
        for (outcome, topic) in join_all(publishes).await.into_iter().zip(plan.topics.keys()) {
            all.acknowledged.extend(outcome.acknowledged);
            all.bad.extend(outcome.bad);
            match outcome.failed {
                Some(error) if error.is_permanent() && self.is_about_rows(&error) => {
                    all.refused_topics.push((topic.clone(), error.message));
                }
                failed => all.failed = failed.or(all.failed),
            }
        }
        all
    }

    /// Where each row names its topic, a topic that is refused holds up its own rows only.
    fn is_about_rows(&self, error: &PublishError) -> bool {
        self.spec.topic.is_none() && error.kind != PublishErrorKind::UnknownBus
    }

    /// What cannot be published is left alone for a while.
    fn leave_out(&self, outcome: &Outcome, session: &mut Session, said: &mut Said) {
        let excluded = &mut session.excluded;
        let anything = !(outcome.bad.is_empty() && outcome.refused_topics.is_empty());
        if anything && excluded.is_empty() {
            session.retry_at = Instant::now() + BAD_ROW_PAUSE.max(self.spec.poll);
        }
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
        for (topic, reason) in &outcome.refused_topics {
            excluded.topics.insert(topic.clone());
            if said.topics.get(topic) != Some(reason) {
                tracing::error!(source, table, topic, reason, "rows wait for their topic");
                self.count_error("row");
                said.topics.insert(topic.clone(), reason.clone());
            }
        }
        let bad_rows = i64::try_from(excluded.rows.len()).unwrap_or(i64::MAX);
        self.metrics.bad.with_label_values(&[source]).set(bad_rows);
    }

    fn refused(&self, error: &PublishError, said: &mut Said) -> Passed {
        self.count_error("bus");
        let text = error.to_string();
        if said.bus.as_ref() != Some(&text) {
            let source = &self.spec.name;
            tracing::warn!(source, %error, "the bus does not take rows of the outbox table; they stay, trying again");
            said.bus = Some(text);
        }
        Passed::Refused
    }

    fn failed(&self, error: &SourceError, said: &mut Said) {
        self.count_error("database");
        let text = error.to_string();
        if said.database.as_ref() != Some(&text) {
            let source = &self.spec.name;
            tracing::error!(source, %error, "the outbox table cannot be relayed; trying again");
            said.database = Some(text);
        }
    }

    fn count_error(&self, reason: &str) {
        self.metrics.errors.with_label_values(&[self.spec.name.as_str(), reason]).inc();
    }

    /// A bus that does not answer must not hold up the end.
    async fn out_of_patience(&self) {
        self.stop.cancelled().await;
        sleep(LAST_PUBLISH).await;
    }

    async fn stopped_within(&self, pause: Duration) -> bool {
        tokio::select! {
            () = self.stop.cancelled() => true,
            () = sleep(pause) => false,
        }
    }
}

#[cfg(test)]
mod tests;
