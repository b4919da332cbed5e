//! One question to JetStream for events, and what is answered to it.

use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::pull::BatchConfig;
use async_nats::{StatusCode, Subject, Subscriber};
use futures::stream::StreamExt as _;
use tokio::time::{Instant, sleep, timeout, timeout_at};

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
/// Most events that may be sent while a question is taken back; if there are more, those are handed out again after
/// `AckWait`.
const ON_THE_WAY: usize = 64;
/// Words of the server that may be among them.
const WORDS: usize = 8;

/// Pauses between looks whether a server has forgotten a question, in milliseconds.
const FORGETS: [u64; 6] = [5, 10, 20, 40, 80, 160];

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
    /// Of all kinds that were taken so far.
    taken: u64,
    inbox: Subject,
    consumer: PullConsumer,
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
        let sent = consumer.request_batch(config, inbox.clone()).await;
        sent.map_err(|error| shared.error("pull", &error))?;
        let heard = Instant::now();
        Ok(Self {
            answers,
            taken: 0,
            inbox,
            consumer: consumer.clone(),
            js: shared.js.clone(),
            asked,
            left: asked.events,
            until: heard + WAIT + NO_WORD,
            heard,
            too_small: false,
        })
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
            self.taken += 1;
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
        let end = async {
            self.take_late(&mut late).await;
            self.is_forgotten().await;
        };
        // Without a connection nothing comes.
        timeout(wait, end).await.ok();
        late
    }

    /// Neither server nor client may forget the inbox before they have passed on what is on the way, and the client's
    /// `drain` does. So both are told to do so after as many answers as there may be, and the server is made to say
    /// something to fill that number.
    async fn take_late(&mut self, late: &mut Vec<Message>) {
        // Most of it is here once nothing comes before such a word.
        let mut before = None;
        while self.left > 0 && before != Some(late.len()) {
            before = Some(late.len());
            self.provoke().await;
            while let Some(answer) = self.answers.next().await {
                if !self.keep(answer, late) {
                    break;
                }
            }
        }
        // One word after the other: several at once would overtake what a cluster is about to send.
        let fill = self.left.min(ON_THE_WAY) + WORDS;
        let last = self.taken.saturating_add(fill as u64);
        if self.answers.unsubscribe_after(last).await.is_err() {
            return;
        }
        self.provoke().await;
        while let Some(answer) = self.answers.next().await {
            if !self.keep(answer, late) {
                self.provoke().await;
            }
        }
    }

    /// Until the server, asked for that, sees that nobody waits: it would take the first event that is given back for this
    /// question, only then see that nobody listens, and put that event behind the others. In a cluster it hears of that a
    /// moment later. Others who wait get what is given back, so nobody waits long for them to be gone.
    async fn is_forgotten(&self) {
        for pause in FORGETS {
            match self.consumer.get_info().await {
                Ok(info) if info.num_waiting > 0 => sleep(Duration::from_millis(pause)).await,
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Makes the server say a word: it refuses such a heartbeat. Where it cannot be asked, nothing comes.
    async fn provoke(&self) {
        let refused = BatchConfig {
            batch: 1,
            expires: Some(ALIVE),
            idle_heartbeat: WAIT,
            ..BatchConfig::default()
        };
        self.consumer.request_batch(refused, self.inbox.clone()).await.ok();
    }

    /// Keeps an event. False for a word of the server, but for a heartbeat.
    fn keep(&mut self, answer: async_nats::Message, late: &mut Vec<Message>) -> bool {
        self.taken += 1;
        match answer.status {
            None | Some(StatusCode::OK) => {
                self.left = self.left.saturating_sub(1);
                late.push(Message { message: answer, context: self.js.clone() });
                true
            }
            Some(status) => status == StatusCode::IDLE_HEARTBEAT,
        }
    }
}

/// How many of the events that were asked for a server does not send, where it says so as it ends a question.
fn not_sent(answer: &async_nats::Message) -> Option<usize> {
    let count = answer.headers.as_ref()?.get("Nats-Pending-Messages")?;
    count.as_str().parse().ok()
}
