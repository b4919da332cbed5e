//! What the log's thread can be asked, and the way to it.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{Backlog, LogDelivery, LogError, Prepared, TopicConfig};
use crate::bus::{Published, Settle, SubscriptionSpec};

/// Where an answer goes.
pub(super) type Answer<T> = oneshot::Sender<Result<T, LogError>>;

/// What the thread is asked to do.
pub(super) enum Command {
    Append {
        topic: String,
        entries: Vec<Prepared>,
        answer: Answer<Vec<Published>>,
        room: OwnedSemaphorePermit,
    },
    EnsureTopic {
        name: String,
        config: TopicConfig,
        answer: Answer<()>,
    },
    Declare {
        spec: Box<SubscriptionSpec>,
        answer: Answer<()>,
    },
    Remove {
        name: String,
        answer: Answer<()>,
    },
    Consume {
        id: u64,
        spec: Box<SubscriptionSpec>,
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
    Backlogs {
        answer: Answer<BTreeMap<String, Backlog>>,
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
        entries.iter().map(|entry| entry.payload.len()).sum()
    }

    /// Answers that it cannot be done.
    pub(super) fn refuse(self, error: &LogError) {
        let error = error.clone();
        match self {
            Self::Append { answer, .. } => drop(answer.send(Err(error))),
            Self::EnsureTopic { answer, .. }
            | Self::Declare { answer, .. }
            | Self::Remove { answer, .. }
            | Self::Consume { answer, .. } => drop(answer.send(Err(error))),
            Self::Backlogs { answer } => drop(answer.send(Err(error))),
            Self::Settle { .. } | Self::CloseConsumer { .. } | Self::Close { .. } => {}
        }
    }
}

impl Queue {
    pub(super) fn new(sender: Sender<Command>) -> Self {
        Self(sender)
    }

    pub(super) fn send(&self, command: Command) {
        // A closed log drops the command, and with it the sender of the answer.
        drop(self.0.send(command));
    }
}
