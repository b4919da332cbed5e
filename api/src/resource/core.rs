//! Kubernetes `Service` and `EndpointSlice`: the parts that a mesh reads. Fields of those kinds that mean
//! nothing here are accepted, since people bring the files that they have.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::meta::Metadata;

/// A name and port that callers dial.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// Name and namespace; the annotation `duet.dev/service-accounts` lists, comma-separated, which service
    /// accounts may register replicas (default: the one named like the service).
    pub metadata: Metadata,
    /// The ports.
    #[serde(default)]
    pub spec: ServiceSpec,
    #[serde(default, rename = "status")]
    pub(super) _status: IgnoredEq,
}

/// [`IgnoredAny`] that compares equal, so that resources can be compared for change.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct IgnoredEq(IgnoredAny);

impl PartialEq for IgnoredEq {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for IgnoredEq {}

/// Spec of a [`Service`]. Other fields of a Kubernetes Service spec are accepted and not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// Ports that callers dial.
    #[serde(default)]
    pub ports: Vec<ServicePort>,
    /// Labels of the pods behind the service; only used with the Kubernetes API.
    #[serde(default)]
    pub selector: BTreeMap<String, String>,
}

/// One port of a [`Service`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServicePort {
    /// Needed where there are several.
    #[serde(default)]
    pub name: String,
    /// What callers dial.
    #[serde(deserialize_with = "port")]
    pub port: u16,
    /// The replica's port, by number or name; default: same as `port`.
    pub target_port: Option<IntOrName>,
    /// What the application speaks: `http`, `kubernetes.io/h2c`, `grpc`, …; default: as the caller speaks.
    pub app_protocol: Option<String>,
    /// `TCP`.
    #[serde(default)]
    pub protocol: Option<String>,
    #[serde(default, rename = "nodePort")]
    pub(super) _node_port: IgnoredEq,
}

pub(super) fn port<'de, D: serde::Deserializer<'de>>(input: D) -> Result<u16, D::Error> {
    match u16::deserialize(input)? {
        0 => Err(serde::de::Error::custom("a port must be 1 to 65535")),
        port => Ok(port),
    }
}

/// A port by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a port must be a number of 1 to 65535 or a port's name")]
pub enum IntOrName {
    /// By number.
    Number(u16),
    /// By name.
    Name(String),
}

/// Addresses behind a service that do not register themselves: applications without a sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointSlice {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// The label `kubernetes.io/service-name` names the service.
    pub metadata: Metadata,
    /// `IPv4` or `IPv6`.
    #[serde(default)]
    pub address_type: String,
    /// The addresses.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// The ports, matched to the service's by name.
    #[serde(default)]
    pub ports: Vec<EndpointPort>,
}

/// One replica in an [`EndpointSlice`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoint {
    /// IP addresses; all reach the same replica, the first is used.
    pub addresses: Vec<IpAddr>,
    /// Whether it can be used.
    #[serde(default)]
    pub conditions: EndpointConditions,
    /// Zone of the replica.
    pub zone: Option<String>,
    #[serde(default, rename = "hostname")]
    pub(super) _hostname: IgnoredEq,
    #[serde(default, rename = "nodeName")]
    pub(super) _node_name: IgnoredEq,
    #[serde(default, rename = "targetRef")]
    pub(super) _target_ref: IgnoredEq,
    #[serde(default, rename = "hints")]
    pub(super) _hints: IgnoredEq,
    #[serde(default, rename = "deprecatedTopology")]
    pub(super) _deprecated_topology: IgnoredEq,
}

/// Conditions of an [`Endpoint`]; absent means true, as Kubernetes says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointConditions {
    /// Ready for traffic.
    pub ready: Option<bool>,
    /// Serving, ready or not.
    pub serving: Option<bool>,
    /// On its way out.
    pub terminating: Option<bool>,
}

/// One port of an [`EndpointSlice`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointPort {
    /// Name of the service's port.
    #[serde(default)]
    pub name: String,
    /// Where the application listens.
    #[serde(deserialize_with = "port")]
    pub port: u16,
    /// `TCP`.
    #[serde(default)]
    pub protocol: Option<String>,
    /// What the application speaks.
    pub app_protocol: Option<String>,
}
