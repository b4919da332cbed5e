//! How many topics and subscriptions workloads may make without a resource: as many as on the embedded bus. They are
//! counted where the account has that many of all kinds, and a count is good for a moment: a few more may be made.

use std::time::Duration;

use async_nats::jetstream::context::GetStreamErrorKind;
use futures::TryStreamExt as _;
use tokio::time::Instant;

use super::shared::{NatsError, Shared};
use super::stream::{is_declared, topic_of};
use crate::bus::{SubscriptionSpec, dead_letter};

/// Topics, and subscriptions, that no resource declares.
const MOST: usize = 10_000;
/// How long a count counts.
const GOOD_FOR: Duration = Duration::from_secs(5);

/// When they were counted last.
#[derive(Debug, Default)]
pub(super) struct Counts {
    topics: Option<(Instant, usize)>,
    subscriptions: Option<(Instant, usize)>,
}

impl Shared {
    /// Whether a workload may make a topic, where it is not there.
    pub(super) async fn may_make_topic(&self, name: &str) -> Result<(), NatsError> {
        let known = self.topics.lock().contains_key(name);
        if known || self.wanted.lock().topic(name).is_some() {
            return Ok(());
        }
        self.connected()?;
        match self.js.get_stream(self.stream_name(name)).await {
            Err(error) if is_missing(&error.kind()) => {}
            // What is there is there, and whoever uses it says what is wrong with it.
            Ok(_) | Err(_) => return Ok(()),
        }
        if self.account().await?.streams < MOST {
            return Ok(());
        }
        let last = self.counts.lock().topics;
        let count = match last.filter(|(at, _)| at.elapsed() < GOOD_FOR) {
            Some((_, count)) => count,
            None => self.count_topics().await?,
        };
        enough(count, "topics")
    }

    /// Whether a workload may make a subscription that is not there, with the topics that it names.
    pub(super) async fn may_subscribe(&self, spec: &SubscriptionSpec) -> Result<(), NatsError> {
        self.may_make_topic(&spec.topic).await?;
        if !spec.dead_letter_topic.ends_with(dead_letter::SUFFIX) {
            self.may_make_topic(&spec.dead_letter_topic).await?;
        }
        if self.account().await?.consumers < MOST {
            return Ok(());
        }
        let last = self.counts.lock().subscriptions;
        let count = match last.filter(|(at, _)| at.elapsed() < GOOD_FOR) {
            Some((_, count)) => count,
            None => self.count_subscriptions().await?,
        };
        enough(count, "subscriptions")
    }

    async fn account(&self) -> Result<async_nats::jetstream::account::Account, NatsError> {
        self.js.query_account().await.map_err(|error| self.error("the account", &error))
    }

    async fn count_topics(&self) -> Result<usize, NatsError> {
        let mut streams = self.js.streams();
        let mut count = 0;
        while let Some(info) =
            streams.try_next().await.map_err(|error| self.error("the streams", &error))?
        {
            let topic = topic_of(&info.config);
            let ours = topic.is_some_and(|topic| info.config.name == self.stream_name(topic));
            count += usize::from(ours && !is_declared(&info.config));
        }
        self.counts.lock().topics = Some((Instant::now(), count));
        Ok(count)
    }

    async fn count_subscriptions(&self) -> Result<usize, NatsError> {
        let records = self.records().await?;
        let count = records.iter().filter(|recorded| !recorded.record.is_declared()).count();
        self.counts.lock().subscriptions = Some((Instant::now(), count));
        Ok(count)
    }
}

fn is_missing(kind: &GetStreamErrorKind) -> bool {
    matches!(kind, GetStreamErrorKind::JetStream(error) if error.error_code().0 == 10_059)
}

fn enough(count: usize, what: &'static str) -> Result<(), NatsError> {
    if count < MOST { Ok(()) } else { Err(NatsError::TooMany(what)) }
}
