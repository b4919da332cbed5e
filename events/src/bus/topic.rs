//! Settings of a topic.

use std::time::Duration;

/// Settings of a topic, the same for every bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicConfig {
    /// The same (`source`, `id`) within this window is stored once; zero for no deduplication. Default: 5 min.
    pub dedup_window: Duration,
    /// Handled events older than this go; `None` to keep them. Default: 7 days.
    pub retention_age: Option<Duration>,
    /// The oldest handled events go while the topic is larger; `None` for no bound. Default: 1 Gi.
    pub retention_bytes: Option<u64>,
    /// Retention also takes events that a subscription has yet to handle; they are counted. Default: false.
    pub drop_unhandled: bool,
    /// The attribute by which `ordered` subscriptions order. Default: `partitionkey`.
    pub order_by: String,
}

impl Default for TopicConfig {
    fn default() -> Self {
        Self {
            dedup_window: Duration::from_secs(300),
            retention_age: Some(Duration::from_secs(7 * 86_400)),
            retention_bytes: Some(1 << 30),
            drop_unhandled: false,
            order_by: crate::cloudevent::PARTITION_KEY.to_owned(),
        }
    }
}

impl TopicConfig {
    /// What a topic has that no resource declares: dead letters stay until somebody looks at them, whoever was first to
    /// name their topic.
    #[must_use]
    pub fn undeclared(name: &str) -> Self {
        match name.ends_with(super::dead_letter::SUFFIX) {
            true => Self::keep_all(),
            false => Self::default(),
        }
    }

    /// Keeps everything and takes everything: what dead-letter topics get unless they are declared.
    #[must_use]
    pub fn keep_all() -> Self {
        Self {
            dedup_window: Duration::ZERO,
            retention_age: None,
            retention_bytes: None,
            ..Self::default()
        }
    }
}
