//! Why a bus refuses.

use duet_api::proto::{self, publish_error::Code};

/// What kind of refusal it is, for the caller to decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishErrorKind {
    /// No bus of this name.
    UnknownBus,
    /// The bus takes declared topics only, and this is none.
    UnknownTopic,
    /// The events or the topic's name are not acceptable, and never will be.
    Invalid,
    /// No room. Trying again later may help.
    Full,
    /// The bus cannot be reached or did not answer in time. The events may have been stored: publish them again
    /// with the same `source` and `id`, and the bus keeps one.
    Unavailable,
    /// The bus failed.
    Internal,
    /// Policies do not let this publisher publish to the topic.
    Denied,
}

/// Why a publish was not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PublishError {
    /// The kind.
    pub kind: PublishErrorKind,
    /// For people; says which bus or topic.
    pub message: String,
}

impl PublishError {
    /// An error of a kind.
    pub fn new(kind: PublishErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The bus is away: the moment for the outbox.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.kind == PublishErrorKind::Unavailable
    }

    /// Trying the same again can never work.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        use PublishErrorKind::{
            Denied, Full, Internal, Invalid, Unavailable, UnknownBus, UnknownTopic,
        };
        match self.kind {
            UnknownBus | UnknownTopic | Invalid | Denied => true,
            Full | Unavailable | Internal => false,
        }
    }
}

impl From<PublishError> for proto::PublishError {
    fn from(error: PublishError) -> Self {
        let code = match error.kind {
            PublishErrorKind::UnknownBus => Code::UnknownBus,
            PublishErrorKind::UnknownTopic => Code::UnknownTopic,
            PublishErrorKind::Invalid => Code::Invalid,
            PublishErrorKind::Full => Code::Full,
            PublishErrorKind::Denied => Code::Denied,
            PublishErrorKind::Unavailable => Code::Unavailable,
            PublishErrorKind::Internal => Code::Internal,
        };
        Self { code: code.into(), message: error.message }
    }
}

impl From<proto::PublishError> for PublishError {
    fn from(error: proto::PublishError) -> Self {
        let kind = match error.code() {
            Code::UnknownBus => PublishErrorKind::UnknownBus,
            Code::UnknownTopic => PublishErrorKind::UnknownTopic,
            Code::Invalid => PublishErrorKind::Invalid,
            Code::Full => PublishErrorKind::Full,
            Code::Denied => PublishErrorKind::Denied,
            Code::Unavailable => PublishErrorKind::Unavailable,
            Code::Unspecified | Code::Internal => PublishErrorKind::Internal,
        };
        Self { kind, message: error.message }
    }
}

/// Why a subscription cannot be consumed, or no longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConsumeError {
    /// The bus cannot be reached, or the connection broke. Everything unsettled went back; consume again.
    #[error("bus {bus} is unavailable: {reason}")]
    Unavailable {
        /// Name of the bus.
        bus: String,
        /// What happened.
        reason: String,
    },
    /// The bus refuses this subscription.
    #[error("subscription {subscription} was refused: {reason}")]
    Refused {
        /// Name of the subscription.
        subscription: String,
        /// Why.
        reason: String,
    },
    /// Whoever asks may not have this subscription.
    #[error("subscription {subscription} was refused: {reason}")]
    Denied {
        /// Name of the subscription.
        subscription: String,
        /// Why.
        reason: String,
    },
    /// The bus failed.
    #[error("subscription {subscription}: {reason}")]
    Internal {
        /// Name of the subscription.
        subscription: String,
        /// Why.
        reason: String,
    },
}

impl ConsumeError {
    /// Consuming again later may work.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Internal { .. } => true,
            Self::Refused { .. } | Self::Denied { .. } => false,
        }
    }
}
