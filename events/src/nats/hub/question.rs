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

/// Dropping it loses what is on the way until JetStream hands it out again: [`Self::end`] does not.
pub(super) struct Question {
    answers: Subscriber,
    js: async_nats::jetstream::Context,
    /// Events that may still come.
    left: usize,
    until: Instant,
}

impl Question {
    /// Asks for up to so many events.
    pub(super) async fn ask(
        shared: &Shared,
        consumer: &PullConsumer,
        events: usize,
    ) -> Result<Self, NatsError> {
        let inbox = Subject::from(shared.client.new_inbox());
        let answers = shared.client.subscribe(inbox.clone()).await;
        let answers = answers.map_err(|error| shared.error("pull", &error))?;
        let config = BatchConfig { batch: events, expires: Some(WAIT), ..BatchConfig::default() };
        let asked = consumer.request_batch(config, inbox).await;
        asked.map_err(|error| shared.error("pull", &error))?;
        let until = Instant::now() + WAIT + NO_WORD;
        Ok(Self { answers, js: shared.js.clone(), left: events, until })
    }

    /// The next event; `None` when there are no more, and why when the server ended it.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Option<Result<Message, String>> {
        if self.left == 0 {
            return None;
        }
        let answer = timeout_at(self.until, self.answers.next()).await.ok().flatten()?;
        match answer.status {
            None | Some(StatusCode::OK) => {
                self.left -= 1;
                Some(Ok(Message { message: answer, context: self.js.clone() }))
            }
            Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => None,
            Some(status) => {
                Some(Err(format!("{status}: {}", answer.description.unwrap_or_default())))
            }
        }
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
