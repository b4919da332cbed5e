//! The publish stream: jobs in, requests out, answers matched by correlation.

use std::collections::HashMap;
use std::time::Duration;

use duet_api::proto::{PublishRequest, PublishResponse};
use duet_api::publish::EncodedEvents;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{OPEN_TIMEOUT, PUBLISH_TIMEOUT, client, describe, unavailable};
use crate::bus::{PublishError, PublishErrorKind, Published};

/// Requests without an answer; no more are sent until some come.
const MAX_PENDING: usize = 1024;
/// Requests between this task and the connection.
const OUTGOING: usize = 64;
/// A stream that owes answers and says nothing for this long is given up.
const SILENCE: Duration = Duration::from_secs(10);
/// Between two tries to open the stream, during which publishes fail at once.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// One publish.
pub(super) struct Job {
    pub(super) topic: String,
    pub(super) events: EncodedEvents,
    pub(super) answer: oneshot::Sender<Result<Vec<Published>, PublishError>>,
}

/// Serves jobs until their senders are gone.
pub(super) async fn run(
    bus: String,
    mut channel: watch::Receiver<Option<Channel>>,
    mut jobs: mpsc::Receiver<Job>,
) {
    let mut pause = FIRST_PAUSE;
    while let Some(first) = jobs.recv().await {
        let current = channel.borrow_and_update().clone();
        let Some(current) = current else {
            fail(first, &bus, "not connected to the control plane");
            continue;
        };
        let mut stream = Stream { bus: &bus, pending: HashMap::new(), last_correlation: 0 };
        let served = stream.serve(current, &mut channel, first, &mut jobs).await;
        let reason = match served {
            // A new channel: go on with that one at once.
            Ok(()) => {
                pause = FIRST_PAUSE;
                stream.fail_pending("the connection was replaced");
                continue;
            }
            Err(reason) => reason,
        };
        tracing::info!(bus, reason, "publish stream broke");
        if stream.last_answered() {
            pause = FIRST_PAUSE;
        }
        stream.fail_pending(&reason);
        refuse_for(pause, &mut jobs, &bus, &reason).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Lets publishers know at once, instead of letting them wait for the next try.
async fn refuse_for(pause: Duration, jobs: &mut mpsc::Receiver<Job>, bus: &str, reason: &str) {
    let refuse = async {
        while let Some(job) = jobs.recv().await {
            fail(job, bus, reason);
        }
    };
    // The pause is over, or all senders are gone; both are fine.
    timeout(pause, refuse).await.unwrap_or_default();
}

fn fail(job: Job, bus: &str, reason: &str) {
    // A publisher that left is not told.
    drop(job.answer.send(Err(unavailable(bus, reason))));
}

enum Step {
    Answer(Result<Option<PublishResponse>, Status>),
    Job(Option<Job>),
    /// Whether another channel came, or none ever will.
    Channel(bool),
    /// As of the last time that the timer was set.
    Silence,
}

struct Stream<'a> {
    bus: &'a str,
    pending: HashMap<u64, Pending>,
    last_correlation: u64,
}

struct Pending {
    events: usize,
    answer: oneshot::Sender<Result<Vec<Published>, PublishError>>,
}

impl Stream<'_> {
    /// Opens the stream and serves until it breaks (error) or the channel is replaced (ok).
    async fn serve(
        &mut self,
        current: Channel,
        channel: &mut watch::Receiver<Option<Channel>>,
        first: Job,
        jobs: &mut mpsc::Receiver<Job>,
    ) -> Result<(), String> {
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        // Queued before the call, for servers that answer only after the first request.
        let first = self.request(first);
        outgoing.send(first).await.map_err(|_closed| "the stream closed".to_owned())?;
        let mut client = client(current);
        let opening = client.publish(ReceiverStream::new(requests));
        let mut answers = match timeout(OPEN_TIMEOUT, opening).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Err(describe(&status)),
            Err(_elapsed) => return Err("the stream did not open within 5 s".to_owned()),
        };
        let mut silent_until = Instant::now() + SILENCE;
        // One timer for all of it, which is set anew only when it goes off.
        let timer = sleep_until(silent_until);
        tokio::pin!(timer);
        loop {
            if self.pending.len() >= MAX_PENDING {
                self.pending.retain(|_correlation, pending| !pending.answer.is_closed());
            }
            let room = self.pending.len() < MAX_PENDING;
            let next_job = async {
                // Room first; nobody else takes it meanwhile.
                drop(outgoing.reserve().await.ok()?);
                jobs.recv().await
            };
            let step = tokio::select! {
                answer = answers.message() => Step::Answer(answer),
                job = next_job, if room => Step::Job(job),
                changed = channel.changed() => Step::Channel(changed.is_ok()),
                () = &mut timer, if !self.pending.is_empty() => Step::Silence,
            };
            match step {
                Step::Answer(answer) => {
                    self.answer(answer.map_err(|status| describe(&status))?)?;
                    silent_until = Instant::now() + SILENCE;
                }
                Step::Job(Some(job)) => {
                    if self.pending.is_empty() {
                        silent_until = Instant::now() + SILENCE;
                    }
                    let request = self.request(job);
                    outgoing.try_send(request).map_err(|_closed| "the stream closed".to_owned())?;
                }
                Step::Job(None) => return Err("the stream closed".to_owned()),
                Step::Channel(replaced) => {
                    drop(outgoing);
                    self.drain(&mut answers).await;
                    // A closed watch means that the process ends.
                    return if replaced { Ok(()) } else { Err("the process ends".to_owned()) };
                }
                Step::Silence if Instant::now() < silent_until => {
                    timer.as_mut().reset(silent_until);
                }
                Step::Silence => return Err("the bus does not answer".to_owned()),
            }
        }
    }

    /// Takes the answers that are still to come on a stream that gets no more requests.
    async fn drain(&mut self, answers: &mut Streaming<PublishResponse>) {
        let rest = async {
            while !self.pending.is_empty() {
                let Ok(answer) = answers.message().await else {
                    return;
                };
                if self.answer(answer).is_err() {
                    return;
                }
            }
        };
        // Those without an answer by then fail, and are published again elsewhere.
        timeout(PUBLISH_TIMEOUT, rest).await.unwrap_or_default();
    }

    fn request(&mut self, job: Job) -> PublishRequest {
        self.last_correlation += 1;
        let correlation = self.last_correlation;
        let pending = Pending { events: job.events.len(), answer: job.answer };
        self.pending.insert(correlation, pending);
        let bus = self.bus.to_owned();
        PublishRequest { correlation, bus, topic: job.topic, events: job.events }
    }

    fn answer(&mut self, answer: Option<PublishResponse>) -> Result<(), String> {
        let Some(answer) = answer else {
            return Err("the bus ended the stream".to_owned());
        };
        let Some(pending) = self.pending.remove(&answer.correlation) else {
            return Ok(());
        };
        let result = match answer.error {
            Some(error) => Err(error.into()),
            None if answer.events.len() != pending.events => {
                let message = format!("bus {} acknowledged another number of events", self.bus);
                Err(PublishError::new(PublishErrorKind::Internal, message))
            }
            None => Ok(answer.events.into_iter().map(Into::into).collect()),
        };
        // A publisher that left is not told.
        drop(pending.answer.send(result));
        Ok(())
    }

    /// The stream worked at least once.
    fn last_answered(&self) -> bool {
        u64::try_from(self.pending.len()).is_ok_and(|pending| pending < self.last_correlation)
    }

    fn fail_pending(&mut self, reason: &str) {
        for (_correlation, pending) in self.pending.drain() {
            drop(pending.answer.send(Err(unavailable(self.bus, reason))));
        }
    }
}
