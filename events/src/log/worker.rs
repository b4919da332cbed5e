//! The log's thread: queue, turns, and what happens when the store fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::Instrument as _;

use super::clock::{Clock, now_ms};
use super::command::{Answer, Command, Queue, Waiting, Work};
use super::disk::{Disk, Usage};
use super::engine::Engine;
use super::metrics::LogMetrics;
use super::store::{FILE_NAME, Store};
use super::{LogError, LogOptions};
use crate::bus::Settle;

/// Between two rounds of housekeeping, and between two tries to open a failed store.
const TICK: Duration = Duration::from_secs(1);
/// Between two lines in the process's own log about a store that stays closed.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// Until an event is delivered again that is to be a dead letter, where there is no room for one.
const LETTER_DELAY_MS: u64 = 10_000;
/// Commands of one turn, and bytes of one batch.
const GROUP_COMMANDS: usize = 4096;
const GROUP_BYTES: usize = 8 << 20;

/// Opens the store on a thread of its own and answers when it is ready.
pub(super) async fn start(
    dir: PathBuf,
    options: LogOptions,
    metrics: LogMetrics,
) -> Result<Queue, LogError> {
    let cache_bytes = options.cache_bytes;
    let (folder, file) = (dir.clone(), dir.join(FILE_NAME));
    let look = move || Usage::of(&folder, &file);
    // Of several logs in a process, what is said of one must say of which.
    let name = dir.file_name().unwrap_or(dir.as_os_str()).display().to_string();
    let named = tracing::error_span!("log", name);
    start_with(move || Store::open(&dir, cache_bytes), look, options, metrics)
        .instrument(named)
        .await
}

/// The same on any store, and any disk.
pub(super) async fn start_with(
    open: impl FnMut() -> Result<Store, LogError> + Send + 'static,
    look: impl FnMut() -> Option<Usage> + Send + 'static,
    options: LogOptions,
    metrics: LogMetrics,
) -> Result<Queue, LogError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let (ready, opened) = oneshot::channel();
    let named = tracing::Span::current();
    let run = move || {
        let _named = named.enter();
        let mut worker = Worker {
            open: Box::new(open),
            engine: Err(LogError::Closed),
            disk: Disk::new(look),
            clock: Clock::new(),
            settle_delay: options.settle_delay,
            settle_due: None,
            tick_due: Instant::now(),
            said: None,
            metrics,
        };
        let outcome = worker.reopen();
        let failed = outcome.is_err();
        if ready.send(outcome).is_err() || failed {
            return;
        }
        worker.run(&receiver);
    };
    thread::Builder::new()
        .name("duet-log".to_owned())
        .spawn(run)
        .map_err(|error| LogError::Store(format!("cannot start the log's thread: {error}")))?;
    opened.await.unwrap_or(Err(LogError::Closed))?;
    Ok(Queue::new(sender))
}

struct Worker {
    open: Box<dyn FnMut() -> Result<Store, LogError> + Send>,
    /// Or why there is none now.
    engine: Result<Engine, LogError>,
    disk: Disk,
    clock: Clock,
    settle_delay: Duration,
    /// When settled deliveries have to be written.
    settle_due: Option<Instant>,
    tick_due: Instant,
    /// When it was last said that the store cannot be opened again, and why.
    said: Option<(Instant, LogError)>,
    metrics: LogMetrics,
}

enum Next {
    Go,
    Closed(Option<oneshot::Sender<()>>),
}

impl Worker {
    fn run(&mut self, queue: &Receiver<Command>) {
        let mut more = false;
        loop {
            let wait = if more { Duration::ZERO } else { self.wait() };
            let group = match queue.recv_timeout(wait) {
                Ok(first) => gather(first, queue),
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => vec![Command::Close { answer: None }],
            };
            // The store may panic on a file that was altered; that must not take the process with it.
            let turn = catch_unwind(AssertUnwindSafe(|| self.turn(group)));
            match turn {
                Ok(Ok((Next::Go, again))) => more = again,
                Ok(Ok((Next::Closed(answer), _))) => {
                    // The store closes before anyone hears of it, so that it can be opened again.
                    self.engine = Err(LogError::Closed);
                    if let Some(answer) = answer {
                        answer.send(()).unwrap_or_default();
                    }
                    return;
                }
                Ok(Err(error)) => {
                    self.fail(error);
                    more = false;
                }
                Err(_panic) => {
                    self.fail(LogError::Store("the store panicked".to_owned()));
                    more = false;
                }
            }
        }
    }

    /// How long nothing has to be done.
    fn wait(&self) -> Duration {
        let now = Instant::now();
        let mut wait = self.tick_due.saturating_duration_since(now);
        if let Some(due) = self.settle_due {
            wait = wait.min(due.saturating_duration_since(now));
        }
        if let Some(due_ms) = self.engine.as_ref().ok().and_then(Engine::next_wake) {
            wait = wait.min(Duration::from_millis(due_ms.saturating_sub(now_ms())));
        }
        wait
    }

    /// Applies a group, flushes if anyone waits for it, answers, and hands out. True if there is more to do at once.
    fn turn(&mut self, group: Vec<Command>) -> Result<(Next, bool), LogError> {
        let tick = Instant::now() >= self.tick_due;
        if tick {
            self.tick_due = Instant::now() + TICK;
            self.disk.look();
            if self.engine.is_err() {
                self.try_reopen();
            }
        }
        let back_ms = self.clock.set_back();
        if let Ok(engine) = &mut self.engine
            && back_ms > 0
        {
            engine.clock_set_back(back_ms);
        }
        let unwritten = self.engine.as_ref().map_or(0, |engine| engine.store.unwritten_bytes());
        self.disk.expect(unwritten);
        let mut waiting = Waiting::new();
        let mut next = Next::Go;
        let applied = self.apply_all(group, &mut waiting, &mut next);
        let closing = matches!(next, Next::Closed(_));
        let committed = applied.and_then(|()| self.commit_if_due(tick, closing));
        for answer in waiting {
            answer(committed.clone());
        }
        committed?;
        let Ok(engine) = &mut self.engine else {
            return Ok((next, false));
        };
        if closing {
            if let Err(error) = engine.store.settle() {
                // Nothing is lost: opening takes longer.
                tracing::warn!(%error, "the log's store was not closed in order");
            }
            return Ok((next, false));
        }
        let more = engine.hand_out(now_ms())?;
        engine.store.catch_up()?;
        Ok((next, more || engine.trims_more()))
    }

    fn apply_all(
        &mut self,
        group: Vec<Command>,
        waiting: &mut Waiting,
        next: &mut Next,
    ) -> Result<(), LogError> {
        // After the first failure nothing is applied any more, but everyone gets an answer.
        let mut outcome = Ok(());
        for command in group {
            if let Command::Close { answer } = command {
                *next = Next::Closed(answer);
                continue;
            }
            let engine = match (&outcome, &mut self.engine) {
                (Ok(()), Ok(engine)) => engine,
                (Err(error), _) => {
                    command.refuse(error);
                    continue;
                }
                (Ok(()), Err(error)) => {
                    command.refuse(error);
                    continue;
                }
            };
            let stored = || engine.stored_bytes();
            let bytes = command.size() as u64;
            if bytes > 0 && !self.disk.takes(bytes, stored) {
                self.metrics.refused_events.inc_by(command.events());
                command.refuse(&LogError::DiskFull);
                continue;
            }
            if let Command::Settle { consumer, delivery, outcome: Settle::DeadLetter { .. } } =
                command
                && !self.disk.takes_letter(engine.bytes_in_hand(consumer, delivery), stored)
            {
                self.metrics.refused_events.inc();
                engine.hold_back(consumer, delivery, now_ms() + LETTER_DELAY_MS);
                continue;
            }
            outcome = apply(engine, command, waiting, &mut self.settle_due, self.settle_delay);
        }
        outcome
    }

    fn commit_if_due(&mut self, tick: bool, closing: bool) -> Result<(), LogError> {
        let Ok(engine) = &mut self.engine else {
            return Ok(());
        };
        let trims = engine.trims_more();
        if tick {
            engine.tick(now_ms())?;
        } else if trims {
            engine.trim_on(now_ms())?;
        }
        let settled = self.settle_due.is_some_and(|due| Instant::now() >= due);
        if engine.urgent || settled || tick || trims || closing {
            engine.commit()?;
            self.settle_due = None;
        }
        if tick {
            engine.settle_if_quiet()?;
        }
        Ok(())
    }

    /// Throws memory away; what is on disk is the truth. Consumers end and come back. Opening waits for the next
    /// tick, so that a full disk is not asked again at every publish.
    fn fail(&mut self, error: LogError) {
        tracing::error!(%error, "the log's store failed; it is opened again in a second");
        self.metrics.store_failures.inc();
        self.settle_due = None;
        self.tick_due = Instant::now() + TICK;
        self.engine = Err(error);
    }

    fn try_reopen(&mut self) {
        match self.reopen() {
            Ok(()) => {
                self.said = None;
                tracing::info!("the log's store is open again");
            }
            Err(error) => {
                self.say(&error);
                self.engine = Err(error);
            }
        }
    }

    /// It is tried every second, and not said that often.
    fn say(&mut self, error: &LogError) {
        let said = self.said.as_ref();
        if said.is_none_or(|(at, said)| said != error || at.elapsed() >= SAY_AGAIN) {
            self.said = Some((Instant::now(), error.clone()));
            tracing::error!(%error, "the log's store cannot be opened again; trying every second");
        }
    }

    fn reopen(&mut self) -> Result<(), LogError> {
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let store = (self.open)()?;
            Engine::load(store, self.metrics.clone(), now_ms())
        }));
        let panicked = || Err(LogError::Store("the store panicked while opening".to_owned()));
        self.engine = Ok(opened.unwrap_or_else(|_panic| panicked())?);
        Ok(())
    }
}

/// Everything that queued meanwhile, within bounds.
fn gather(first: Command, queue: &Receiver<Command>) -> Vec<Command> {
    let mut bytes = first.size();
    let mut group = vec![first];
    while group.len() < GROUP_COMMANDS && bytes < GROUP_BYTES {
        let Ok(command) = queue.try_recv() else { break };
        bytes += command.size();
        group.push(command);
    }
    group
}

fn apply(
    engine: &mut Engine,
    command: Command,
    waiting: &mut Waiting,
    settle_due: &mut Option<Instant>,
    settle_delay: Duration,
) -> Result<(), LogError> {
    let now = now_ms();
    match command {
        Command::Append { topic, entries, answer, room } => {
            let published = engine.append(&topic, entries, now);
            answer_later(waiting, answer, published, room)
        }
        Command::Manage(work) => work(Ok(engine), waiting),
        Command::Consume { id, spec, as_is, sender, answer } => {
            let consumer = engine.consume(id, &spec, as_is, sender);
            answer_later(waiting, answer, consumer, ())
        }
        Command::Settle { consumer, delivery, outcome } => {
            if engine.settle(consumer, delivery, &outcome, now)? {
                settle_due.get_or_insert_with(|| Instant::now() + settle_delay);
            }
            Ok(())
        }
        Command::CloseConsumer { consumer } => {
            engine.close_consumer(consumer);
            Ok(())
        }
        Command::Close { .. } => Ok(()),
    }
}

/// Rare work, with its answer. Success waits for the flush, if there is something to flush.
pub(super) fn work<T: Send + 'static>(
    answer: Answer<T>,
    run: impl FnOnce(&mut Engine, u64) -> Result<T, LogError> + Send + 'static,
) -> Work {
    Box::new(move |engine, waiting| match engine {
        Ok(engine) => answer_later(waiting, answer, run(engine, now_ms()), ()),
        Err(error) => {
            // Whoever asked may have left.
            drop(answer.send(Err(error.clone())));
            Ok(())
        }
    })
}

/// Success waits for the flush. A refusal goes out at once; a failure of the store fails the whole turn.
fn answer_later<T: Send + 'static>(
    waiting: &mut Waiting,
    answer: Answer<T>,
    result: Result<T, LogError>,
    room: impl Send + 'static,
) -> Result<(), LogError> {
    match result {
        Ok(value) => {
            waiting.push(Box::new(move |outcome| {
                // Nobody waits any more: then nobody is told.
                drop(answer.send(outcome.map(|()| value)));
                drop(room);
            }));
            Ok(())
        }
        Err(refusal @ (LogError::Refused(_) | LogError::Unknown { .. } | LogError::TooMany(_))) => {
            drop(answer.send(Err(refusal)));
            Ok(())
        }
        Err(error) => {
            drop(answer.send(Err(error.clone())));
            Err(error)
        }
    }
}
