//! Replicas, as they registered.

use std::net::SocketAddr;

use duet_api::spiffe::SpiffeId;
use serde::{Deserialize, Serialize};

use super::ServiceKey;

/// Names a replica. The account is part of it, so that no other can be in its way by taking the instance's name first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplicaKey {
    /// Its namespace.
    pub namespace: String,
    /// Its instance.
    pub instance: String,
    /// Its service account.
    pub account: String,
}

/// One registered replica of services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// Who registered it; what callers must find in its certificate.
    pub identity: SpiffeId,
    /// Its namespace.
    pub namespace: String,
    /// Its name, unique among those of its account.
    pub instance: String,
    /// Services that it is a replica of.
    pub services: Vec<String>,
    /// Its sidecar's inbound listener.
    pub address: SocketAddr,
    /// The application's ports.
    pub ports: Vec<ReplicaPort>,
    /// Its zone; may be empty.
    pub zone: String,
    /// Whether it takes traffic.
    pub ready: bool,
}

/// One port of a replica's application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaPort {
    /// As a `targetPort` may name it; may be empty.
    pub name: String,
    /// Number.
    pub port: u16,
    /// As in a Service's `appProtocol`; may be empty.
    pub app_protocol: String,
}

impl Replica {
    /// Its name.
    #[must_use]
    pub fn key(&self) -> ReplicaKey {
        ReplicaKey {
            namespace: self.namespace.clone(),
            instance: self.instance.clone(),
            account: self.identity.account().to_owned(),
        }
    }

    pub(super) fn service_keys(&self) -> impl Iterator<Item = ServiceKey> + '_ {
        self.services.iter().map(|name| ServiceKey::new(&self.namespace, name))
    }
}
