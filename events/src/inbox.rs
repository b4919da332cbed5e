//! What a sidecar's application has handled: (`source`, `id`) pairs for each subscription, on disk, so that an event whose
//! acknowledgement was lost does not reach the application again.
//!
//! One embedded store with two tables (by pair, and by time for forgetting), and one thread that owns it: what queues
//! while it flushes shares the next flush. The store is made when a pair is first remembered or asked for. Imports
//! [`crate::cloudevent`], `crate::database_file` and `crate::private`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use redb::backends::FileBackend;
use redb::{Database, ReadableTable as _, TableDefinition, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use crate::cloudevent::Event;
use crate::{database_file, private};

/// When each pair was handled, in milliseconds since the epoch.
const HANDLED: TableDefinition<'_, &str, u64> = TableDefinition::new("handled");
const BY_TIME: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("by_time");
const FILE_NAME: &str = "inbox.redb";
const CACHE_BYTES: usize = 2 << 20;
/// Questions that wait for the thread; more wait for room.
const QUEUE: usize = 256;
/// Questions that share a flush.
const GROUP: usize = 256;
/// Pairs forgotten beside each one that is remembered: the store shrinks faster than it grows.
const FORGET: usize = 2;

/// Why the inbox cannot say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("inbox: {0}")]
pub struct InboxError(String);

/// Where the inbox lives and how long it remembers.
#[derive(Clone, Debug)]
pub struct InboxOptions {
    /// Its folder; created when first needed.
    pub dir: PathBuf,
    /// How long a pair is remembered. A sensible value is a day.
    pub window: Duration,
}

/// The record of handled events.
#[derive(Debug)]
pub struct Inbox {
    options: InboxOptions,
    // Guards the start of the thread only.
    thread: Mutex<Option<mpsc::Sender<Ask>>>,
}

enum Ask {
    Handled {
        keys: Vec<String>,
        now_ms: u64,
        answer: oneshot::Sender<Result<Vec<bool>, InboxError>>,
    },
    Remember {
        keys: Vec<String>,
        now_ms: u64,
        answer: oneshot::Sender<Result<(), InboxError>>,
    },
}

impl Inbox {
    /// An inbox; touches no disk.
    #[must_use]
    pub fn new(options: InboxOptions) -> Arc<Self> {
        Arc::new(Self { options, thread: Mutex::default() })
    }

    /// For each event and the [generation](crate::bus::Delivery::generation) of its delivery, whether it was handled
    /// within the window.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn handled<'e>(
        &self,
        subscription: &str,
        events: impl IntoIterator<Item = (&'e Event, u64)>,
        now_ms: u64,
    ) -> Result<Vec<bool>, InboxError> {
        let keys = keys(subscription, events);
        let (answer, answered) = oneshot::channel();
        self.ask(Ask::Handled { keys, now_ms, answer }).await?;
        answered.await.map_err(|_gone| InboxError("its thread ended".to_owned()))?
    }

    /// Remembers events as handled, each in its generation; returns after the flush.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn remember<'e>(
        &self,
        subscription: &str,
        events: impl IntoIterator<Item = (&'e Event, u64)>,
        now_ms: u64,
    ) -> Result<(), InboxError> {
        let keys = keys(subscription, events);
        let (answer, answered) = oneshot::channel();
        self.ask(Ask::Remember { keys, now_ms, answer }).await?;
        answered.await.map_err(|_gone| InboxError("its thread ended".to_owned()))?
    }

    async fn ask(&self, ask: Ask) -> Result<(), InboxError> {
        let sender = self.sender()?;
        sender.send(ask).await.map_err(|_closed| InboxError("its thread ended".to_owned()))
    }

    fn sender(&self) -> Result<mpsc::Sender<Ask>, InboxError> {
        let mut thread = self.thread.lock();
        if let Some(sender) = thread.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let (sender, asks) = mpsc::channel(QUEUE);
        let options = self.options.clone();
        let started = std::thread::Builder::new().name("duet-inbox".to_owned());
        started.spawn(move || run(&options, asks)).map_err(|error| failed(&error))?;
        *thread = Some(sender.clone());
        Ok(sender)
    }
}

/// A control character is in no name and no attribute, so it separates. The first generation has none in its keys: those
/// written before there were generations are of it.
fn keys<'e>(subscription: &str, events: impl IntoIterator<Item = (&'e Event, u64)>) -> Vec<String> {
    let key = |(event, generation): (&Event, u64)| {
        let (source, id) = (event.source(), event.id());
        match generation {
            0 => format!("{subscription}\0{source}\0{id}"),
            _ => format!("{subscription}\0{source}\0{id}\0{generation}"),
        }
    };
    events.into_iter().map(key).collect()
}

/// Serves until nobody can ask any more. Where the store cannot be opened, everybody is told, and the next question
/// starts another try.
fn run(options: &InboxOptions, mut asks: mpsc::Receiver<Ask>) {
    let mut opened = None;
    while let Some(first) = asks.blocking_recv() {
        let database = match opened.take().map_or_else(|| open(&options.dir), Ok) {
            Ok(database) => database,
            Err(error) => {
                asks.close();
                refuse(first, &error);
                while let Some(ask) = asks.blocking_recv() {
                    refuse(ask, &error);
                }
                return;
            }
        };
        let mut group = vec![first];
        while group.len() < GROUP
            && let Ok(next) = asks.try_recv()
        {
            group.push(next);
        }
        match serve(&database, options.window, group) {
            Ok(()) => opened = Some(database),
            // A store that failed once fails until it is opened anew.
            Err(error) => tracing::error!(%error, "the inbox's store failed; it is opened again"),
        }
    }
}

/// The error is one of those that were answered.
fn serve(database: &Database, window: Duration, group: Vec<Ask>) -> Result<(), InboxError> {
    let mut failure = Ok(());
    let mut written = Vec::new();
    let mut waiting = Vec::new();
    for ask in group {
        match ask {
            Ask::Handled { keys, now_ms, answer } => {
                let handled = read(database, &keys, oldest(now_ms, window));
                failure = failure.and(handled.as_ref().map(|_handled| ()).map_err(Clone::clone));
                // Whoever asked may be gone.
                drop(answer.send(handled));
            }
            Ask::Remember { keys, now_ms, answer } => {
                written.extend(keys.into_iter().map(|key| (key, now_ms)));
                waiting.push(answer);
            }
        }
    }
    if waiting.is_empty() {
        return failure;
    }
    let outcome = write(database, window, &written);
    for answer in waiting {
        drop(answer.send(outcome.clone()));
    }
    failure.and(outcome)
}

fn refuse(ask: Ask, error: &InboxError) {
    match ask {
        Ask::Handled { answer, .. } => drop(answer.send(Err(error.clone()))),
        Ask::Remember { answer, .. } => drop(answer.send(Err(error.clone()))),
    }
}

fn open(dir: &Path) -> Result<Database, InboxError> {
    private::folder(dir).map_err(|error| failed(&error))?;
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let file = database_file::open(&dir.join(FILE_NAME)).map_err(|error| failed(&error))?;
    let file = FileBackend::new(file).map_err(|error| failed(&error))?;
    let database = builder.create_with_backend(file).map_err(|error| failed(&error))?;
    let transaction = begin(&database)?;
    transaction.open_table(HANDLED).map_err(|error| failed(&error))?;
    transaction.open_table(BY_TIME).map_err(|error| failed(&error))?;
    transaction.commit().map_err(|error| failed(&error))?;
    // The file's name has to survive as well as its contents.
    for folder in [Some(dir), dir.parent()].into_iter().flatten() {
        let flushed = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
        flushed.map_err(|error| failed(&error))?;
    }
    Ok(database)
}

fn read(database: &Database, keys: &[String], oldest: u64) -> Result<Vec<bool>, InboxError> {
    use redb::ReadableDatabase as _;
    let transaction = database.begin_read().map_err(|error| failed(&error))?;
    let table = transaction.open_table(HANDLED).map_err(|error| failed(&error))?;
    let handled = keys.iter().map(|key| {
        let at = table.get(key.as_str()).map_err(|error| failed(&error))?;
        Ok(at.is_some_and(|at| at.value() >= oldest))
    });
    handled.collect()
}

/// Remembers, forgets what is too old, and flushes.
fn write(database: &Database, window: Duration, pairs: &[(String, u64)]) -> Result<(), InboxError> {
    let transaction = begin(database)?;
    {
        let mut handled = transaction.open_table(HANDLED).map_err(|error| failed(&error))?;
        let mut by_time = transaction.open_table(BY_TIME).map_err(|error| failed(&error))?;
        for (key, now_ms) in pairs {
            let before = handled.insert(key.as_str(), now_ms).map_err(|error| failed(&error))?;
            if let Some(before) = before {
                let before = (before.value(), key.as_str());
                by_time.remove(before).map_err(|error| failed(&error))?;
            }
            by_time.insert((*now_ms, key.as_str()), ()).map_err(|error| failed(&error))?;
        }
        let now_ms = pairs.iter().map(|(_, now_ms)| *now_ms).max().unwrap_or_default();
        for _ in 0..pairs.len().saturating_mul(FORGET) {
            let first = by_time.first().map_err(|error| failed(&error))?;
            let first = first.map(|(key, _)| (key.value().0, key.value().1.to_owned()));
            match first.filter(|(at, _)| *at < oldest(now_ms, window)) {
                None => break,
                Some((at, key)) => {
                    by_time.remove((at, key.as_str())).map_err(|error| failed(&error))?;
                    handled.remove(key.as_str()).map_err(|error| failed(&error))?;
                }
            }
        }
    }
    transaction.commit().map_err(|error| failed(&error))
}

/// The commit says where the file's free pages are: without, opening after a crash would look through all of the file,
/// and never open one with a damaged page.
fn begin(database: &Database) -> Result<WriteTransaction, InboxError> {
    let mut transaction = database.begin_write().map_err(|error| failed(&error))?;
    transaction.set_quick_repair(true);
    Ok(transaction)
}

fn oldest(now_ms: u64, window: Duration) -> u64 {
    now_ms.saturating_sub(u64::try_from(window.as_millis()).unwrap_or(u64::MAX))
}

fn failed(error: &impl std::fmt::Display) -> InboxError {
    InboxError(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str) -> Event {
        Event::new(id, "/s", "t").unwrap()
    }

    #[tokio::test]
    async fn pairs_are_remembered_across_a_restart_and_forgotten_after_the_window() {
        let dir = tempfile::tempdir().unwrap();
        let options =
            InboxOptions { dir: dir.path().join("inbox"), window: Duration::from_secs(1) };
        let inbox = Inbox::new(options.clone());
        assert_eq!(inbox.handled("a/b", [(&event("1"), 0)], 0).await, Ok(vec![false]));
        inbox.remember("a/b", [(&event("1"), 0), (&event("2"), 0)], 1000).await.unwrap();
        let known = inbox.handled("a/b", [(&event("1"), 0), (&event("3"), 0)], 1500).await;
        assert_eq!(known, Ok(vec![true, false]));
        assert_eq!(inbox.handled("a/c", [(&event("1"), 0)], 1500).await, Ok(vec![false]));
        drop(inbox);
        let inbox = Inbox::new(options);
        // The former thread lets go of the file in its own time.
        let mut known = Err(InboxError(String::new()));
        for _ in 0..500 {
            known = inbox.handled("a/b", [(&event("2"), 0)], 1900).await;
            if known.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(known, Ok(vec![true]));
        assert_eq!(inbox.handled("a/b", [(&event("2"), 0)], 2001).await, Ok(vec![false]));
        inbox.remember("a/b", [(&event("4"), 0)], 5000).await.unwrap();
        // Forgotten for good, even for a clock that goes back.
        assert_eq!(inbox.handled("a/b", [(&event("1"), 0)], 1000).await, Ok(vec![false]));
    }

    #[tokio::test]
    async fn what_was_handled_in_one_generation_is_not_in_another() {
        let dir = tempfile::tempdir().unwrap();
        let options = InboxOptions { dir: dir.path().into(), window: Duration::from_secs(1) };
        let (inbox, event) = (Inbox::new(options), event("1"));
        inbox.remember("a/b", [(&event, 1)], 0).await.unwrap();
        let known = inbox.handled("a/b", [(&event, 0), (&event, 1), (&event, 2)], 0).await;
        assert_eq!(known, Ok(vec![false, true, false]));
    }

    #[test]
    fn after_a_crash_the_file_is_not_looked_through() {
        let (dir, crashed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let database = open(dir.path()).unwrap();
        write(&database, Duration::from_secs(1), &[("a".to_owned(), 1)]).unwrap();
        let file = crashed.path().join(FILE_NAME);
        std::fs::copy(dir.path().join(FILE_NAME), &file).unwrap();
        let mut builder = Database::builder();
        builder.set_repair_callback(|repair| repair.abort());
        let database = builder.open(file).unwrap();
        assert_eq!(read(&database, &["a".to_owned()], 0), Ok(vec![true]));
    }

    #[tokio::test]
    async fn a_store_whose_creation_was_cut_short_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), [0; 73_728]).unwrap();
        let options = InboxOptions { dir: dir.path().into(), window: Duration::from_secs(1) };
        Inbox::new(options).remember("a/b", [(&event("1"), 0)], 0).await.unwrap();
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_made_is_an_error_until_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let inbox = Inbox::new(InboxOptions { dir: file.clone(), window: Duration::from_secs(1) });
        assert!(inbox.remember("a/b", [(&event("1"), 0)], 0).await.is_err());
        assert!(inbox.handled("a/b", [(&event("1"), 0)], 0).await.is_err());
        // Mended while the process runs.
        std::fs::remove_file(file).unwrap();
        let mended = async {
            // The thread that said so may still be ending.
            while inbox.remember("a/b", [(&event("1"), 0)], 0).await.is_err() {}
        };
        tokio::time::timeout(Duration::from_secs(20), mended).await.unwrap();
        assert_eq!(inbox.handled("a/b", [(&event("1"), 0)], 0).await, Ok(vec![true]));
    }
}
