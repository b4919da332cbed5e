//! One stream for each topic: its name, its settings, and how it comes to be.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::context::UpdateStreamErrorKind;
use async_nats::jetstream::stream::{self, DiscardPolicy, StorageType};

use super::later;
use super::names::token;
use super::record::Recorded;
use super::shared::{NatsError, Shared};
use crate::bus::{Start, TopicConfig, check_name};

/// What a server takes as shortest deduplication window and age.
const SHORTEST: Duration = Duration::from_millis(100);
const TOPIC: &str = "duet-topic";
const ORDER_BY: &str = "duet-order-by";
const DEDUP: &str = "duet-dedup";
/// A resource declared the topic.
const DECLARED: &str = "duet-declared";
/// The bus that made the stream, or changed it last; older versions did not say.
const BUS: &str = "duet-bus";

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

/// Whether a resource declared it for this bus. What it declared for another one is not this one's to forget.
pub(super) fn is_declared_for(bus: &str, config: &stream::Config) -> bool {
    is_declared(config) && config.metadata.get(BUS).is_none_or(|owner| owner == bus)
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
        let wanted = match self.wanted.lock().topic(name) {
            Some(declared) => self.declared(name, &declared),
            None => self.config(name, &default),
        };
        let mut found = self.js.get_or_create_stream(wanted.clone()).await;
        if found.is_err() {
            // Somebody else may have made it meanwhile, with other settings.
            found = self.js.get_or_create_stream(wanted).await;
        }
        let found = found.map_err(|error| self.error("the topic's stream", &error))?;
        let mut info = found.cached_info().clone();
        info.config = self.brought_up_to_date(name, info.config).await;
        self.met(name, &info).await
    }

    /// A stream that was made by an older server, by an older version of this program or for another number of copies
    /// learns what it should be.
    async fn brought_up_to_date(&self, name: &str, found: stream::Config) -> stream::Config {
        if topic_of(&found) != Some(name) {
            return found;
        }
        let (mut config, subject) = (found, self.subject(name));
        if config.num_replicas != self.options.replicas {
            let num_replicas = self.options.replicas;
            let wanted = stream::Config { num_replicas, ..config.clone() };
            config = self.updated(name, config, wanted).await;
        }
        if self.has_schedules() && !later::allowed(&config, &subject) {
            let wanted = later::allow(config.clone(), &subject);
            config = self.updated(name, config, wanted).await;
        }
        config
    }

    async fn updated(
        &self,
        name: &str,
        now: stream::Config,
        wanted: stream::Config,
    ) -> stream::Config {
        match self.js.update_stream(wanted).await {
            Ok(updated) => updated.config,
            Err(error) => {
                tracing::warn!(bus = self.name, topic = name, %error, "the stream stays as it was made");
                now
            }
        }
    }

    /// Knows a topic from here on. Where its stream was removed and is a new one, what comes next is for the subscriptions
    /// that were there.
    async fn met(&self, name: &str, info: &stream::Info) -> Result<Topic, NatsError> {
        let topic = self.read_config(name, &info.config);
        if info.state.last_sequence == 0 && info.state.consumer_count == 0 {
            for Recorded { record, .. } in Box::pin(self.records()).await? {
                if record.topic == name && record.is_kept() {
                    Box::pin(self.recreate(&topic, &record.name, None, Start::Earliest)).await?;
                }
            }
        }
        if self.wanted.lock().met(name, info.created) {
            tracing::error!(
                bus = self.name,
                topic = name,
                "the topic's stream was removed or lost, with all its events; there is a new one"
            );
            self.metrics.remade("stream");
        }
        self.topics.lock().insert(name.to_owned(), topic.clone());
        Ok(topic)
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
        let wanted = self.declared(name, config);
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
        Box::pin(self.met(name, &made)).await?;
        self.wanted.lock().declare_topic(name, config);
        Ok(())
    }

    /// Makes a topic that keeps everything and takes everything, or makes one that exists such, unless a resource says
    /// otherwise. One that has had events may be anybody's: that is left as it is, but for a `declared` subscription.
    pub(super) async fn keep_letters(&self, name: &str, declared: bool) -> Result<(), NatsError> {
        self.topic(name, TopicConfig::keep_all()).await?;
        let found = self.js.get_stream(self.stream_name(name)).await;
        let found = found.map_err(|error| self.error("the topic's stream", &error))?;
        let info = found.cached_info();
        if !declared && info.state.last_sequence > 0 {
            return Ok(());
        }
        let (found, wanted) = (&info.config, self.config(name, &TopicConfig::keep_all()));
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
        self.wanted.lock().reset_topic(name);
        let records = self.records().await?;
        let named = records.iter().any(|recorded| recorded.record.dead_letter_topic() == name);
        let config = match named {
            true => TopicConfig::keep_all(),
            false => TopicConfig::undeclared(name),
        };
        match self.js.update_stream(self.config(name, &config)).await {
            Ok(info) => self.know(name, &info.config),
            Err(error) if error.kind() == UpdateStreamErrorKind::NotFound => {}
            Err(error) => return Err(self.error("the topic's stream", &error)),
        }
        Ok(())
    }

    fn know(&self, name: &str, config: &stream::Config) {
        let topic = self.read_config(name, config);
        self.topics.lock().insert(name.to_owned(), topic);
    }

    fn read_config(&self, name: &str, config: &stream::Config) -> Topic {
        let metadata = |key| config.metadata.get(key).map(String::as_str);
        Topic {
            stream: config.name.clone(),
            subject: self.subject(name),
            dedup: metadata(DEDUP) != Some("false"),
            keeps_later: later::allowed(config, &self.subject(name)),
            order_by: metadata(ORDER_BY).unwrap_or(crate::cloudevent::PARTITION_KEY).to_owned(),
        }
    }

    /// What a resource declares.
    fn declared(&self, name: &str, config: &TopicConfig) -> stream::Config {
        let mut wanted = self.config(name, config);
        wanted.metadata.insert(DECLARED.to_owned(), "true".to_owned());
        wanted
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
                (BUS.to_owned(), self.name.clone()),
                (ORDER_BY.to_owned(), config.order_by.clone()),
                (DEDUP.to_owned(), dedup.to_string()),
            ]),
            ..stream::Config::default()
        };
        if self.has_schedules() { later::allow(config, &self.subject(name)) } else { config }
    }
}
