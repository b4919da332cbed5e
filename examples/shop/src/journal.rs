//! A journal: one file of JSON lines, only ever appended to, that all replicas of a service share. Each replica
//! folds the same lines in the same order into the same state, so replicas always agree, and what two of them
//! write at once is decided by which line comes first in the file. Imports only [`crate::web`] to log.
//!
//! - A line that [`Journal::append`] returned for survives `kill -9` and a power failure: it is flushed.
//! - A line that was cut off (no space, power failure) is closed by the next append and then skipped.
//! - Deliberately absent: compaction. The shop writes about 1 KB for an order and keeps it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::web::say;

/// A state that is the sum of the lines of a journal.
pub(crate) trait Fold: Default + Send + 'static {
    /// One line.
    type Line: Serialize + DeserializeOwned + Send + 'static;

    /// Takes in the next line. The same lines must give the same state in every replica, so nothing but the
    /// line and the state may be looked at.
    fn apply(&mut self, line: Self::Line);
}

/// One replica's handle on a shared journal; clones share it.
#[derive(Debug)]
pub(crate) struct Journal<F> {
    shared: Arc<Shared<F>>,
}

impl<F> Clone for Journal<F> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

#[derive(Debug)]
struct Shared<F> {
    path: PathBuf,
    /// The same open file as in `tail`, to flush it without keeping readers waiting.
    file: File,
    /// Held for the few lines that are new, on blocking threads only, never while flushing.
    tail: Mutex<Tail<F>>,
}

#[derive(Debug)]
struct Tail<F> {
    file: File,
    /// Where the first line starts that `state` has not taken in.
    offset: u64,
    state: F,
}

impl<F: Fold> Journal<F> {
    /// Opens `data/name`, creating folder and file if need be, and reads all of it.
    pub(crate) fn open(data: &Path, name: &str) -> anyhow::Result<Self> {
        let path = data.join(name);
        let open = || -> std::io::Result<_> {
            std::fs::create_dir_all(data)?;
            let file = OpenOptions::new().read(true).append(true).create(true).open(&path)?;
            // The file's name must survive a power failure too.
            File::open(data)?.sync_all()?;
            let mut tail = Tail { file: file.try_clone()?, offset: 0, state: F::default() };
            tail.catch_up()?;
            Ok((file, tail))
        };
        let (file, tail) = open().with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { shared: Arc::new(Shared { path, file, tail: Mutex::new(tail) }) })
    }

    /// Looks at the state, with all lines in it that any replica has written.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) async fn read<R, L>(&self, look: L) -> anyhow::Result<R>
    where
        R: Send + 'static,
        L: FnOnce(&F) -> R + Send + 'static,
    {
        self.blocking("read", move |shared| {
            let mut tail = shared.tail.lock().unwrap_or_else(PoisonError::into_inner);
            tail.catch_up()?;
            Ok(look(&tail.state))
        })
        .await
    }

    /// Writes a line and returns once it is on disk.
    ///
    /// # Errors
    /// If the file cannot be written; the line may then be there or not.
    pub(crate) async fn append(&self, line: F::Line) -> anyhow::Result<()> {
        let mut bytes = serde_json::to_vec(&line).context("cannot write a line as JSON")?;
        bytes.push(b'\n');
        self.blocking("write", move |shared| {
            let mut tail = shared.tail.lock().unwrap_or_else(PoisonError::into_inner);
            tail.write(bytes)?;
            drop(tail);
            shared.file.sync_data()
        })
        .await
    }

    async fn blocking<R, W>(&self, verb: &'static str, work: W) -> anyhow::Result<R>
    where
        R: Send + 'static,
        W: FnOnce(&Shared<F>) -> std::io::Result<R> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let done = tokio::task::spawn_blocking(move || work(&shared));
        let done = done.await.context("the journal's thread did not end well")?;
        done.with_context(|| format!("cannot {verb} {}", self.shared.path.display()))
    }
}

impl<F: Fold> Tail<F> {
    fn catch_up(&mut self) -> std::io::Result<()> {
        if self.file.metadata()?.len() == self.offset {
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::new(&self.file);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
            match serde_json::from_slice(&line) {
                Ok(line) => self.state.apply(line),
                Err(error) => {
                    say("journal", &format!("skipped a line at {}: {error}", self.offset));
                }
            }
            self.offset += line.len() as u64;
            line.clear();
        }
        Ok(())
    }

    /// Appends whole lines only: under the file's lock, so that lines of replicas never mix, and after closing a
    /// line that somebody left cut off.
    fn write(&mut self, mut line: Vec<u8>) -> std::io::Result<()> {
        self.file.lock()?;
        let written = self.catch_up().and_then(|()| {
            if self.file.metadata()?.len() > self.offset {
                line.insert(0, b'\n');
            }
            self.file.write_all(&line)
        });
        self.file.unlock()?;
        written
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A folder of its own for a test, gone with the value.
    #[derive(Debug)]
    pub(crate) struct Folder(pub(crate) PathBuf);

    impl Folder {
        pub(crate) fn new() -> Self {
            let name = format!("shop-test-{}", uuid::Uuid::new_v4());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    #[derive(Debug, Default, PartialEq)]
    struct Words(Vec<String>);

    impl Fold for Words {
        type Line = String;

        fn apply(&mut self, line: String) {
            self.0.push(line);
        }
    }

    async fn words(journal: &Journal<Words>) -> Vec<String> {
        journal.read(|words| words.0.clone()).await.unwrap()
    }

    #[tokio::test]
    async fn replicas_see_the_same_lines_in_the_same_order() {
        let folder = Folder::new();
        let replicas: Vec<Journal<Words>> =
            (0..3).map(|_| Journal::open(&folder.0, "words").unwrap()).collect();
        let mut writers = tokio::task::JoinSet::new();
        for (number, replica) in replicas.iter().enumerate() {
            let replica = replica.clone();
            writers.spawn(async move {
                for line in 0..50 {
                    replica.append(format!("{number}/{line}")).await.unwrap();
                }
            });
        }
        writers.join_all().await;
        let first = words(&replicas[0]).await;
        assert_eq!(first.len(), 150);
        assert_eq!(words(&replicas[1]).await, first);
        assert_eq!(words(&Journal::open(&folder.0, "words").unwrap()).await, first);
    }

    #[tokio::test]
    async fn a_line_that_was_cut_off_costs_that_line_only() {
        let folder = Folder::new();
        let journal: Journal<Words> = Journal::open(&folder.0, "words").unwrap();
        journal.append("one".into()).await.unwrap();
        let mut torn = OpenOptions::new().append(true).open(folder.0.join("words")).unwrap();
        torn.write_all(b"\"tw").unwrap();
        assert_eq!(words(&journal).await, ["one"]);
        journal.append("three".into()).await.unwrap();
        assert_eq!(words(&journal).await, ["one", "three"]);
        let reopened: Journal<Words> = Journal::open(&folder.0, "words").unwrap();
        assert_eq!(words(&reopened).await, ["one", "three"]);
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_made_is_named() {
        let folder = Folder::new();
        std::fs::write(&folder.0, b"a file").unwrap();
        let error = Journal::<Words>::open(&folder.0, "words").unwrap_err();
        assert!(format!("{error:#}").contains("words"), "{error:#}");
        std::fs::remove_file(&folder.0).unwrap();
    }
}
