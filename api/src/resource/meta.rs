//! What every resource has: name, namespace, labels, annotations.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer};

use crate::DEFAULT_NAMESPACE;

/// Kubernetes object metadata. Other fields that only a cluster fills in are accepted and not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", from = "RawMetadata")]
pub struct Metadata {
    /// DNS subdomain name (RFC 1123).
    pub name: String,
    /// DNS label; [`DEFAULT_NAMESPACE`] where none is given.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// When a cluster took the resource in; files rarely have it. Of two that contend the older counts.
    pub creation_timestamp: Option<jiff::Timestamp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawMetadata {
    #[serde(deserialize_with = "subdomain")]
    name: String,
    #[serde(default = "default_namespace", deserialize_with = "label")]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default, rename = "uid")]
    _uid: IgnoredAny,
    #[serde(default, rename = "resourceVersion")]
    _resource_version: IgnoredAny,
    #[serde(default, rename = "generation")]
    _generation: IgnoredAny,
    #[serde(default, rename = "generateName")]
    _generate_name: IgnoredAny,
    creation_timestamp: Option<jiff::Timestamp>,
    #[serde(default, rename = "managedFields")]
    _managed_fields: IgnoredAny,
    #[serde(default, rename = "ownerReferences")]
    _owner_references: IgnoredAny,
    #[serde(default, rename = "finalizers")]
    _finalizers: IgnoredAny,
}

impl From<RawMetadata> for Metadata {
    fn from(raw: RawMetadata) -> Self {
        Self {
            name: raw.name,
            namespace: raw.namespace,
            labels: raw.labels,
            annotations: raw.annotations,
            creation_timestamp: raw.creation_timestamp,
        }
    }
}

fn default_namespace() -> String {
    DEFAULT_NAMESPACE.to_owned()
}

fn is_label(text: &str) -> bool {
    let edge = |c: Option<u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    text.len() <= 63
        && edge(text.bytes().next())
        && edge(text.bytes().last())
        && text.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
}

/// A DNS label (RFC 1123): lower-case letters, digits and `-`, at most 63.
pub(super) fn label<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let text = String::deserialize(input)?;
    if is_label(&text) {
        return Ok(text);
    }
    Err(D::Error::custom(format!(
        "{text:?} is not a DNS label: at most 63 lower-case letters, digits and '-', starting and \
         ending with a letter or digit"
    )))
}

/// A DNS subdomain (RFC 1123): labels joined by dots, at most 253.
pub(super) fn subdomain<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let text = String::deserialize(input)?;
    if text.len() <= 253 && text.split('.').all(is_label) {
        return Ok(text);
    }
    Err(D::Error::custom(format!(
        "{text:?} is not a DNS name: lower-case letters, digits, '-' and '.', starting and ending \
         with a letter or digit"
    )))
}

impl Metadata {
    pub(super) fn key(&self, kind: &'static str) -> ObjectKey {
        ObjectKey { kind, namespace: self.namespace.clone(), name: self.name.clone() }
    }

    pub(super) fn mesh_wide_key(&self, kind: &'static str) -> ObjectKey {
        ObjectKey { kind, namespace: String::new(), name: self.name.clone() }
    }
}

/// Names one resource. Displays as `Kind namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// As in YAML.
    pub kind: &'static str,
    /// Empty for mesh-wide kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}
