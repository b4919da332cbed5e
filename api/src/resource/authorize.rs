//! `AuthorizationPolicy`: who may publish to a topic and subscribe to it.

use serde::{Deserialize, Deserializer};

use super::core::IgnoredEq;
use super::meta::Metadata;

/// Lets some workloads do something with its targets, keeps them from it, or only takes note. A `Deny` that matches
/// wins. Where an `Allow` policy targets something, what no `Allow` policy matches is denied; without any, everybody may
/// do everything.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicy {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// Name and namespace.
    pub metadata: Metadata,
    /// The policy.
    pub spec: AuthorizationPolicySpec,
    #[serde(default, rename = "status")]
    pub(super) _status: IgnoredEq,
}

/// Spec of an [`AuthorizationPolicy`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicySpec {
    /// What it protects.
    pub target_refs: Vec<ProtectedRef>,
    /// What becomes of what matches. Default: `Allow`.
    #[serde(default)]
    pub action: AuthorizationAction,
    /// Any of these matches. None at all match nothing: an `Allow` policy without rules lets nobody in.
    #[serde(default)]
    pub rules: Vec<AuthorizationRule>,
}

/// What an [`AuthorizationPolicy`] protects.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProtectedRef {
    /// `duet.dev`; may be left out.
    pub group: Option<String>,
    /// `Topic`.
    pub kind: ProtectedKind,
    /// Name of the topic, declared or not, on whatever bus.
    pub name: String,
}

/// Kinds that an [`AuthorizationPolicy`] protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtectedKind {
    /// A topic.
    Topic,
}

impl<'de> Deserialize<'de> for ProtectedKind {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        match String::deserialize(input)?.as_str() {
            "Topic" => Ok(Self::Topic),
            "Service" => Err(serde::de::Error::custom(
                "an AuthorizationPolicy cannot protect a Service yet, only a Topic",
            )),
            other => Err(serde::de::Error::custom(format!(
                "an AuthorizationPolicy protects a Topic, not {other:?}"
            ))),
        }
    }
}

/// What becomes of what matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum AuthorizationAction {
    /// It may.
    #[default]
    Allow,
    /// It may not, whatever else allows it.
    Deny,
    /// It is counted and logged.
    Audit,
}

/// Matches who does what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthorizationRule {
    /// Any of these. Empty: everybody.
    pub from: Vec<AuthorizedFrom>,
    /// Any of these. Empty: everything.
    pub to: Vec<AuthorizedTo>,
}

/// Matches workloads to which all fields apply that are given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthorizedFrom {
    /// SPIFFE ids; a trailing `*` stands for any rest.
    pub identities: Vec<String>,
    /// Namespaces; a trailing `*` stands for any rest.
    pub namespaces: Vec<String>,
}

/// Matches what is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthorizedTo {
    /// Empty: all of them.
    pub operations: Vec<Operation>,
}

/// What is done with a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Publish to it.
    Publish,
    /// Consume a subscription of it.
    Subscribe,
}

impl Operation {
    /// As in YAML.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
        }
    }
}

impl AuthorizationRule {
    /// Whether the rule speaks of this workload doing this.
    #[must_use]
    pub fn matches(&self, identity: &str, namespace: &str, operation: Operation) -> bool {
        let from = |from: &AuthorizedFrom| {
            applies(&from.identities, identity) && applies(&from.namespaces, namespace)
        };
        let to = |to: &AuthorizedTo| to.operations.is_empty() || to.operations.contains(&operation);
        (self.from.is_empty() || self.from.iter().any(from))
            && (self.to.is_empty() || self.to.iter().any(to))
    }
}

fn applies(patterns: &[String], value: &str) -> bool {
    let matches = |pattern: &String| match pattern.strip_suffix('*') {
        Some(start) => value.starts_with(start),
        None => pattern == value,
    };
    patterns.is_empty() || patterns.iter().any(matches)
}
