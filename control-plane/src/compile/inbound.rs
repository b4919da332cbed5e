//! What protects a workload from its callers: the policies on the services that it is a replica of, by port of its
//! application.

use std::collections::BTreeSet;

use duet_api::proto;
use duet_api::spiffe::SpiffeId;

use super::{ServicePort, authority, endpoints, policy};
use crate::index::{Index, ReplicaKey, ServiceKey};

/// One policy for each set of ports; of two services on one port the first by name counts.
pub(super) fn policies<'s>(
    index: &Index,
    who: &SpiffeId,
    instance: &str,
    services: impl Iterator<Item = &'s String>,
) -> Vec<proto::InboundPolicy> {
    let replica = index.replica(&ReplicaKey {
        namespace: who.namespace().to_owned(),
        instance: instance.to_owned(),
        account: who.account().to_owned(),
    });
    let mut taken = BTreeSet::new();
    let mut policies: Vec<proto::InboundPolicy> = Vec::new();
    for name in services {
        let service = ServiceKey::new(who.namespace(), name);
        let first = policies.len();
        for port in authority::ports(index, &service) {
            let port = ServicePort { service: service.clone(), port };
            let app_port = replica.and_then(|replica| endpoints::app_port(index, replica, &port));
            let Some(app_port) = app_port.filter(|app_port| taken.insert(*app_port)) else {
                continue;
            };
            let Some(found) = policy::protection(index, &port) else { continue };
            let found = proto::InboundPolicy { service: service.to_string(), ..found };
            // One limit for all ports under the same policy.
            let same = policies.iter_mut().skip(first).find(|known| {
                proto::InboundPolicy { ports: Vec::new(), ..(*known).clone() } == found
            });
            match same {
                Some(known) => known.ports.push(app_port.into()),
                None => {
                    policies.push(proto::InboundPolicy { ports: vec![app_port.into()], ..found });
                }
            }
        }
    }
    policies
}
