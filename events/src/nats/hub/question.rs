//! One question to JetStream for events, and what is answered to it.

use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::pull::BatchConfig;
use async_nats::{StatusCode, Subject, Subscriber};
use futures::stream::StreamExt as _;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::shared::{NatsError, Shared};
use super::super::subscription::PullConsumer;

/// How long a question waits for events.
const WAIT: Duration = Duration::from_secs(20);
/// The server says when that is over; a bit later it is over without that word.
const NO_WORD: Duration = Duration::from_secs(5);

/// How often a server says that it knows of a question, where it has no events for it.
const ALIVE: Duration = Duration::from_secs(3);
/// One that says nothing for this long does not: it may have died, and another one be in its place.
const SILENCE: Duration = Duration::from_secs(7);
/// Why a server ends a question whose bytes are used up.
const TOO_LARGE: &str = "Message Size Exceeds MaxBytes";

/// How much is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) events: usize,
    /// Together. `None`: the events may be of any size.
    pub(super) bytes: Option<usize>,
}

/// Dropping it loses what is on the way until JetStream hands it out again: [`Self::end`] does not.
pub(super) struct Question {
    answers: Subscriber,
    js: async_nats::jetstream::Context,
    asked: Room,
    /// Events that may still come.
    left: usize,
    until: Instant,
    /// When the server last said anything.
    heard: Instant,
    too_small: bool,
}

impl Question {
    /// Asks for up to so many events.
    pub(super) async fn ask(
        shared: &Shared,
        consumer: &PullConsumer,
        asked: Room,
    ) -> Result<Self, NatsError> {
        let inbox = Subject::from(shared.client.new_inbox());
        let answers = shared.client.subscribe(inbox.clone()).await;
        let answers = answers.map_err(|error| shared.error("pull", &error))?;
        let config = BatchConfig {
            batch: asked.events,
            max_bytes: asked.bytes.unwrap_or_default(),
            expires: Some(WAIT),
            idle_heartbeat: ALIVE,
            ..BatchConfig::default()
        };
        let sent = consumer.request_batch(config, inbox).await;
        sent.map_err(|error| shared.error("pull", &error))?;
        let (js, heard) = (shared.js.clone(), Instant::now());
        let (left, until) = (asked.events, heard + WAIT + NO_WORD);
        Ok(Self { answers, js, asked, left, until, heard, too_small: false })
    }

    /// Whether the next event is larger than all that it asked for.
    pub(super) fn was_too_small(&self) -> bool {
        self.too_small
    }

    /// The next event; `None` when there are no more, and why when the server ended it.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Option<Result<Message, String>> {
        while self.left > 0 {
            let silent = self.heard + SILENCE;
            let answer = timeout_at(self.until.min(silent), self.answers.next()).await;
            let Ok(answer) = answer else {
                return (silent < self.until).then(|| Err("the server is silent".to_owned()));
            };
            let answer = answer?;
            self.heard = Instant::now();
            match answer.status {
                None | Some(StatusCode::OK) => {
                    self.left -= 1;
                    return Some(Ok(Message { message: answer, context: self.js.clone() }));
                }
                Some(StatusCode::IDLE_HEARTBEAT) => {}
                Some(status) => match (not_sent(&answer), status) {
                    (Some(count), _) => self.over(count, answer.description.as_deref()),
                    (None, StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => return None,
                    (None, _) => {
                        let why = answer.description.unwrap_or_default();
                        return Some(Err(format!("{status}: {why}")));
                    }
                },
            }
        }
        None
    }

    /// The server has sent all but so many events, of which some may come after this word: where there are copies, each waits
    /// until they know of it.
    fn over(&mut self, not_sent: usize, why: Option<&str>) {
        let too_large = why.is_some_and(|why| why.eq_ignore_ascii_case(TOO_LARGE));
        self.too_small = too_large && not_sent >= self.asked.events;
        self.left = self.left.saturating_sub(not_sent);
        self.until = self.until.min(self.heard + NO_WORD);
    }

    /// Takes the question back, and returns what was answered to it meanwhile.
    pub(super) async fn end(mut self, wait: Duration) -> Vec<Message> {
        let mut late = Vec::new();
        if self.answers.drain().await.is_err() {
            return late;
        }
        let rest = async {
            while let Some(answer) = self.answers.next().await {
                if matches!(answer.status, None | Some(StatusCode::OK)) {
                    late.push(Message { message: answer, context: self.js.clone() });
                }
            }
        };
        // Without a connection nothing comes.
        timeout(wait, rest).await.ok();
        late
    }
}

/// How many of the events that were asked for a server does not send, where it says so as it ends a question.
fn not_sent(answer: &async_nats::Message) -> Option<usize> {
    let count = answer.headers.as_ref()?.get("Nats-Pending-Messages")?;
    count.as_str().parse().ok()
}
