//! One stream for each topic: its name, its settings, and how it comes to be.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::context::UpdateStreamErrorKind;
use async_nats::jetstream::stream::{self, DiscardPolicy, StorageType};

use super::later;
use super::names::token;
use super::shared::{NatsError, Shared};
use crate::bus::{TopicConfig, check_name};

/// What a server takes as shortest deduplication window and age.
const SHORTEST: Duration = Duration::from_millis(100);
const TOPIC: &str = "duet-topic";
const ORDER_BY: &str = "duet-order-by";
const DEDUP: &str = "duet-dedup";
/// A resource declared the topic.
const DECLARED: &str = "duet-declared";

/// A topic, as publishers and consumers need it.
#[derive(Clone, Debug)]
pub(super) struct Topic {
    pub(super) stream: String,
    pub(super) subject: String,
    /// Publishes carry an identity.
    pub(super) dedup: bool,
    pub(super) order_by: String,
    /// The server keeps events for later until they are due.
    pub(super) keeps_later: bool,
}

/// Name of a stream's topic, where it is one of ours.
pub(super) fn topic_of(config: &stream::Config) -> Option<&str> {
    config.metadata.get(TOPIC).map(String::as_str)
}

/// Whether a resource declared a stream's topic.
pub(super) fn is_declared(config: &stream::Config) -> bool {
    config.metadata.contains_key(DECLARED)
}

impl Shared {
    pub(super) fn stream_name(&self, topic: &str) -> String {
        format!("{}_{}", self.options.stream_prefix, token(topic))
    }

    pub(super) fn subject(&self, topic: &str) -> String {
        format!("{}.{}", self.options.stream_prefix, token(topic))
    }

    /// The topic; made with the defaults where nobody made it yet.
    pub(super) async fn topic(&self, name: &str, default: TopicConfig) -> Result<Topic, NatsError> {
        if let Some(topic) = self.topics.lock().get(name) {
            return Ok(topic.clone());
        }
        // Rare, and large.
        Box::pin(self.make(name, default)).await
    }

    async fn make(&self, name: &str, default: TopicConfig) -> Result<Topic, NatsError> {
        check_name(name).map_err(|why| NatsError::Refused(format!("the topic's name {why}")))?;
        self.connected()?;
        let wanted = self.config(name, &default);
        let mut found = self.js.get_or_create_stream(wanted).await;
        if found.is_err() {
            // Somebody else may have made it meanwhile, with other settings.
            found = self.js.get_or_create_stream(self.config(name, &default)).await;
        }
        let found = found.map_err(|error| self.error("the topic's stream", &error))?;
        let config = self.brought_up_to_date(name, found.cached_info().config.clone()).await;
        Ok(self.know(name, &config))
    }

    /// A stream that was made by an older server, or by an older version of this program, learns to keep events for
    /// later.
    async fn brought_up_to_date(&self, name: &str, found: stream::Config) -> stream::Config {
        let subject = self.subject(name);
        let ours = topic_of(&found) == Some(name);
        if !ours || !self.has_schedules() || later::allowed(&found, &subject) {
            return found;
        }
        match self.js.update_stream(later::allow(found.clone(), &subject)).await {
            Ok(updated) => updated.config,
            Err(error) => {
                tracing::warn!(bus = self.name, topic = name, %error, "the stream keeps no events for later");
                found
            }
        }
    }

    fn has_schedules(&self) -> bool {
        let (major, minor, patch) = later::SINCE;
        self.client.is_server_compatible(major, minor, patch)
    }

    /// Brings the topic's stream to these settings.
    pub(super) async fn set_topic(
        &self,
        name: &str,
        config: &TopicConfig,
    ) -> Result<(), NatsError> {
        check_name(name).map_err(|why| NatsError::Refused(format!("the topic's name {why}")))?;
        self.connected()?;
        let mut wanted = self.config(name, config);
        wanted.metadata.insert(DECLARED.to_owned(), "true".to_owned());
        if !config.drop_unhandled && (wanted.max_bytes > 0 || !wanted.max_age.is_zero()) {
            tracing::warn!(
                bus = self.name,
                topic = name,
                "JetStream removes what is older or larger than the topic's retention, also when a subscription has \
                 yet to handle it"
            );
        }
        let made = self.js.create_or_update_stream(wanted).await;
        let made = made.map_err(|error| self.error("the topic's stream", &error))?;
        self.know(name, &made.config);
        Ok(())
    }

    /// Makes a topic that keeps everything and takes everything, or makes one that exists such, unless a resource says
    /// otherwise.
    pub(super) async fn keep_letters(&self, name: &str) -> Result<(), NatsError> {
        self.topic(name, TopicConfig::keep_all()).await?;
        let found = self.js.get_stream(self.stream_name(name)).await;
        let found = found.map_err(|error| self.error("the topic's stream", &error))?;
        let (found, wanted) =
            (&found.cached_info().config, self.config(name, &TopicConfig::keep_all()));
        let kept = |config: &stream::Config| {
            (config.max_age, config.max_bytes, config.metadata.get(DEDUP).cloned())
        };
        if is_declared(found) || topic_of(found) != Some(name) || kept(found) == kept(&wanted) {
            return Ok(());
        }
        let updated = self.js.update_stream(wanted).await;
        let updated = updated.map_err(|error| self.error("the topic's stream", &error))?;
        self.know(name, &updated.config);
        Ok(())
    }

    /// Gives a topic that exists the settings of those that nobody declares.
    pub(super) async fn reset_topic(&self, name: &str) -> Result<(), NatsError> {
        let records = self.records().await?;
        let named = records.iter().any(|recorded| recorded.record.dead_letter_topic() == name);
        let config = match named {
            true => TopicConfig::keep_all(),
            false => TopicConfig::undeclared(name),
        };
        match self.js.update_stream(self.config(name, &config)).await {
            Ok(info) => drop(self.know(name, &info.config)),
            Err(error) if error.kind() == UpdateStreamErrorKind::NotFound => {}
            Err(error) => return Err(self.error("the topic's stream", &error)),
        }
        Ok(())
    }

    fn know(&self, name: &str, config: &stream::Config) -> Topic {
        let metadata = |key| config.metadata.get(key).map(String::as_str);
        let topic = Topic {
            stream: config.name.clone(),
            subject: self.subject(name),
            dedup: metadata(DEDUP) != Some("false"),
            keeps_later: later::allowed(config, &self.subject(name)),
            order_by: metadata(ORDER_BY).unwrap_or(crate::cloudevent::PARTITION_KEY).to_owned(),
        };
        self.topics.lock().insert(name.to_owned(), topic.clone());
        topic
    }

    fn config(&self, name: &str, config: &TopicConfig) -> stream::Config {
        let max_age = config.retention_age.map(|age| age.max(SHORTEST)).unwrap_or_default();
        // A dead letter is always published with its identity: the window is never off on the server.
        let window = match config.dedup_window {
            Duration::ZERO => Duration::from_secs(120),
            window => window.max(SHORTEST),
        };
        let window = if max_age.is_zero() { window } else { window.min(max_age) };
        let dedup = !config.dedup_window.is_zero();
        let bytes = config.retention_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
        let config = stream::Config {
            name: self.stream_name(name),
            subjects: vec![self.subject(name)],
            description: Some(format!("Duet: topic {name}")),
            max_bytes: bytes.unwrap_or(-1),
            max_messages: -1,
            max_messages_per_subject: -1,
            max_consumers: -1,
            max_age,
            discard: DiscardPolicy::Old,
            storage: StorageType::File,
            num_replicas: self.options.replicas,
            duplicate_window: window,
            allow_direct: true,
            metadata: HashMap::from([
                (TOPIC.to_owned(), name.to_owned()),
                (ORDER_BY.to_owned(), config.order_by.clone()),
                (DEDUP.to_owned(), dedup.to_string()),
            ]),
            ..stream::Config::default()
        };
        if self.has_schedules() { later::allow(config, &self.subject(name)) } else { config }
    }
}
