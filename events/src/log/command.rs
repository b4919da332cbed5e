//! What the log's thread can be asked, and the way to it.

use std::sync::mpsc::Sender;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::engine::Engine;
use super::{LogDelivery, LogError, Prepared};
use crate::bus::{Published, Settle, SubscriptionSpec};

/// Where an answer goes.
pub(super) type Answer<T> = oneshot::Sender<Result<T, LogError>>;

/// Answers that wait for the flush.
pub(super) type Waiting = Vec<Box<dyn FnOnce(Result<(), LogError>)>>;

/// Something to do with the engine, or to answer if there is none. An error fails the whole turn.
pub(super) type Work =
    Box<dyn FnOnce(Result<&mut Engine, &LogError>, &mut Waiting) -> Result<(), LogError> + Send>;

/// What the thread is asked to do.
pub(super) enum Command {
    Append {
        topic: String,
        entries: Vec<Prepared>,
        answer: Answer<Vec<Published>>,
        room: OwnedSemaphorePermit,
    },
    /// Everything that is rare.
    Manage(Work),
    Consume {
        id: u64,
        spec: Box<SubscriptionSpec>,
        /// See [`super::Log::consume_as_is`].
        as_is: bool,
        sender: mpsc::Sender<LogDelivery>,
        answer: Answer<()>,
    },
    Settle {
        consumer: u64,
        delivery: u64,
        outcome: Settle,
    },
    CloseConsumer {
        consumer: u64,
    },
    Close {
        answer: Option<oneshot::Sender<()>>,
    },
}

/// The way to the thread. Its length is bounded by its users: publishers by bytes, settles by deliveries in
/// flight, and all others wait for their answer.
#[derive(Clone, Debug)]
pub(super) struct Queue(Sender<Command>);

impl Command {
    /// Bytes that it brings into the batch.
    pub(super) fn size(&self) -> usize {
        let Self::Append { entries, .. } = self else {
            return 0;
        };
        entries.iter().map(|entry| entry.record.len()).sum()
    }

    /// Events that it brings.
    pub(super) fn events(&self) -> u64 {
        if let Self::Append { entries, .. } = self { entries.len() as u64 } else { 0 }
    }

    /// Answers that it cannot be done.
    pub(super) fn refuse(self, error: &LogError) {
        let error = error.clone();
        match self {
            Self::Append { answer, .. } => drop(answer.send(Err(error))),
            Self::Consume { answer, .. } => drop(answer.send(Err(error))),
            // Without an engine there is nothing to wait for, and nothing that fails.
            Self::Manage(work) => work(Err(&error), &mut Waiting::new()).unwrap_or_default(),
            Self::Settle { .. } | Self::CloseConsumer { .. } | Self::Close { .. } => {}
        }
    }
}

impl Queue {
    pub(super) fn new(sender: Sender<Command>) -> Self {
        Self(sender)
    }

    /// False: the log is closed, which drops the command, and with it the sender of the answer.
    pub(super) fn send(&self, command: Command) -> bool {
        self.0.send(command).is_ok()
    }
}
