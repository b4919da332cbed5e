//! Bringing what the journal has into the tables while the log goes on.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use redb::Database;

use super::super::LogError;
use super::backend::Gate;
use super::mark::Mark;
use super::pending::Pending;

/// Batches after which others get the processor.
const BATCHES_AT_ONCE: usize = 8;

/// A commit under way, on a thread of its own: it takes some milliseconds, for which no publisher should wait.
#[derive(Debug)]
pub(super) struct Writing {
    batches: Arc<Pending>,
    /// None once it has ended.
    thread: Option<JoinHandle<Result<(), LogError>>>,
    outcome: Result<(), LogError>,
}

impl Writing {
    /// Writes the batches, with the mark that says that the journal's frames up to there are in the tables. Until it has
    /// ended, nothing else may be written to the tables.
    pub(super) fn start(
        database: &Arc<Database>,
        gate: &Gate,
        batches: Pending,
        mark: Option<Mark>,
    ) -> Self {
        let batches = Arc::new(batches);
        let (database, gate) = (Arc::clone(database), gate.clone());
        let work = Arc::clone(&batches);
        let run = move || gate.write(|| write(&database, &work, mark));
        let thread = thread::Builder::new().name("duet-log-tables".to_owned()).spawn(run);
        match thread {
            Ok(thread) => Self { batches, thread: Some(thread), outcome: Ok(()) },
            Err(error) => {
                let outcome = Err(LogError::Store(format!("cannot start a thread: {error}")));
                Self { batches, thread: None, outcome }
            }
        }
    }

    /// What is on its way; to be looked at until [`Self::finish`] has returned.
    pub(super) fn batches(&self) -> &Pending {
        &self.batches
    }

    pub(super) fn is_done(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end. An error stays one: the batches are in the journal only, and will be written when the store is
    /// opened again.
    pub(super) fn finish(&mut self) -> Result<(), LogError> {
        if let Some(thread) = self.thread.take() {
            let panicked = |_panic| Err(LogError::Store("the store panicked".to_owned()));
            self.outcome = thread.join().unwrap_or_else(panicked);
        }
        self.outcome.clone()
    }
}

fn write(database: &Database, batches: &Pending, mark: Option<Mark>) -> Result<(), LogError> {
    let mut write = database.begin_write()?;
    write.set_quick_repair(true);
    if let Some(mark) = mark {
        mark.write(&write)?;
    }
    for (number, batch) in batches.batches().enumerate() {
        batch.write(&write)?;
        if number % BATCHES_AT_ONCE == 0 {
            // A processor busy for milliseconds is what an event waits for, where there are few of them.
            thread::yield_now();
        }
    }
    Ok(write.commit()?)
}

impl Drop for Writing {
    /// The file must not be in use any more when the store is dropped, so that it can be opened again.
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::warn!(%error, "the log's tables were not written");
        }
    }
}
