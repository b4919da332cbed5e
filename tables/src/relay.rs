//! The task that brings rows to the bus.

mod pass;
mod publish;
mod report;

use std::sync::Arc;
use std::time::Duration;

use duet_events::bus::EventBus;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use self::pass::Passed;
use self::report::Said;
use crate::excluded::Excluded;
use crate::metrics::SourceMetrics;
use crate::owed::{Owed, Tried};
use crate::spec::{SourceError, SourceSpec};
use crate::sqlite::Place;
use crate::table::Table;

/// Rows of the first read.
const FIRST_READ: u32 = 64;
/// What is in hand when the end comes may take this long: a database that does not answer must not hold up the end.
const LAST_WORD: Duration = Duration::from_secs(4);
/// Between two tries while the database or the bus is away.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a replica that stands by asks whether it may lead.
const STANDBY: Duration = Duration::from_millis(500);
/// Bad rows are tried again this often.
const BAD_ROW_PAUSE: Duration = Duration::from_secs(10);
/// A pause is so many times as long as the last look took, at least: a look that must pass over many rows that wait
/// for others then takes a fifth of a core, not one.
const PAUSE_PER_LOOK: u32 = 4;
/// How often waiting rows are counted, and how many at most.
const COUNT_EACH: Duration = Duration::from_secs(5);
const COUNT_MOST: u32 = 100_000;
/// Rows without a place that are told from each other.
const UNPLACED_MOST: u32 = 1000;

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
    /// How long the last read took.
    took: Duration,
    /// A look at the table came to its end at least once.
    well: bool,
}

/// What is known from one connection to the next.
#[derive(Debug, Default)]
struct Known {
    /// The file that this is about.
    place: Option<Arc<Place>>,
    owed: Owed,
    tried: Tried,
    said: Said,
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
        let mut known = Known::default();
        // A counter that is there before the first one is one whose increase can be seen.
        self.metrics.duplicates.with_label_values(&[&self.spec.name]).inc_by(0);
        let mut pause = FIRST_PAUSE;
        while !self.stop.is_cancelled() {
            let session = tokio::select! {
                session = Box::pin(self.session(&mut known)) => session,
                // The lock goes with the connection all the same.
                () = self.stopped_for(LAST_WORD) => break,
            };
            let was_well = match session {
                Ok(()) => break,
                Err((error, was_well)) => {
                    self.failed(&error, &mut known);
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
    async fn session(&self, known: &mut Known) -> Result<(), (SourceError, bool)> {
        let connected = tokio::select! {
            connected = Table::connect(&self.spec, known.place.as_deref()) => connected,
            () = self.stop.cancelled() => return Ok(()),
        };
        let mut table = connected.map_err(|error| (error, false))?;
        let place = table.place();
        let same = match &known.place {
            Some(before) => place.as_ref().is_some_and(|place| place.is_same(before)),
            None => place.is_none(),
        };
        if !same {
            // Its rows are others, even where their numbers are the same.
            known.owed = Owed::default();
        }
        known.place = place;
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
        if known.said.database.is_none() {
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
            took: Duration::ZERO,
            well: false,
        };
        let relayed = self.relay(&mut session, known).await;
        self.metrics.rest(source);
        session.table.close().await;
        relayed.map_err(|error| (error, session.well))
    }

    async fn relay(&self, session: &mut Session, known: &mut Known) -> Result<(), SourceError> {
        // Before anything else: what the bus has is not to be published again.
        self.settle(session, known, &known.owed.due()).await?;
        let mut look = true;
        while !self.stop.is_cancelled() {
            look |= self.on_time(session, known).await?;
            // Asked first: what is written while this looks at the table is seen the next time.
            look |= session.table.changed().await?;
            look |= known.owed.in_doubt();
            session.took = Duration::ZERO;
            let passed = match look && !session.excluded.is_full() {
                true => Box::pin(self.pass(session, known)).await?,
                false => Passed::Done,
            };
            look = passed != Passed::Done;
            if passed != Passed::Refused && session.excluded.topics_for_now.is_empty() {
                session.pause = FIRST_PAUSE;
            }
            let pause = match passed {
                Passed::More => continue,
                Passed::Done => self.spec.poll,
                Passed::Refused => session.longer_pause(),
            };
            if self.stopped_within(long_enough(pause, session.took)).await {
                break;
            }
        }
        Ok(())
    }

    /// What is to be done from time to time. True: the table is to be looked at.
    async fn on_time(&self, session: &mut Session, known: &mut Known) -> Result<bool, SourceError> {
        let now = Instant::now();
        if now >= session.count_at {
            session.count_at = now + COUNT_EACH;
            let waiting = session.table.waiting(COUNT_MOST).await?;
            self.metrics.waiting.with_label_values(&[&self.spec.name]).set(waiting);
            let unplaced = session.table.unplaced(UNPLACED_MOST).await?;
            self.unplaced(unplaced, session, known);
        }
        if session.excluded.is_empty() || now < session.retry_at {
            return Ok(false);
        }
        // What was mended or removed need not be remembered.
        let (excluded, said) = (&session.excluded, &mut known.said);
        said.rows.retain(|sequence, _| excluded.rows.contains(sequence));
        said.topics.retain(|topic, _| excluded.has_topic(topic));
        session.excluded = Excluded::default();
        // Those that were locked.
        self.settle(session, known, &known.owed.due()).await?;
        Ok(true)
    }

    /// Returns so long after it was told to stop.
    async fn stopped_for(&self, time: Duration) {
        self.stop.cancelled().await;
        sleep(time).await;
    }

    async fn stopped_within(&self, pause: Duration) -> bool {
        tokio::select! {
            () = self.stop.cancelled() => true,
            () = sleep(pause) => false,
        }
    }
}

impl Session {
    /// Until the next try, while tries fail.
    fn longer_pause(&mut self) -> Duration {
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.pause
    }

    /// Topics are about to be left out that may be taken soon.
    fn wait_for_topics(&mut self) {
        let soon = Instant::now() + self.longer_pause();
        self.retry_at = if self.excluded.is_empty() { soon } else { soon.min(self.retry_at) };
    }
}

/// How long to leave the table alone.
fn long_enough(pause: Duration, took: Duration) -> Duration {
    pause.max(took * PAUSE_PER_LOOK)
}

#[cfg(test)]
mod tests;
