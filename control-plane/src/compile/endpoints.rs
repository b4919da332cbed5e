//! A backend: what its application speaks, and the addresses behind it.
//!
//! A registered replica is found by the Service's `targetPort`, by number or by name. A replica with exactly one port
//! serves any `targetPort` that it has no match for: on a laptop the port is whatever was free, and there is only one
//! that can be meant. `EndpointSlice` addresses have no sidecar and are reached in the clear.

use std::net::SocketAddr;

use duet_api::proto;
use duet_api::resource::{IntOrName, ServicePort as DeclaredPort};

use super::{Endpoints, ServicePort, policy};
use crate::index::{Index, Replica, ReplicaPort};

/// A backend with its endpoints. `dialled` is the service through whose rules it is reached.
pub(super) fn backend(
    index: &Index,
    wanted: &ServicePort,
    dialled: &ServicePort,
) -> (proto::Backend, Endpoints) {
    let declared = index
        .service(&wanted.service)
        .and_then(|service| service.spec.ports.iter().find(|port| port.port == wanted.port));
    let serving: Vec<(&Replica, &ReplicaPort)> = index
        .replicas_of(&wanted.service)
        .filter_map(|replica| Some((replica, port_of(replica, wanted.port, declared)?)))
        .collect();
    let backend = proto::Backend {
        name: wanted.to_string(),
        protocol: protocol(declared, &serving).into(),
        connect_timeout: policy::connect_timeout(index, wanted, dialled),
        ..policy::balancing(index, wanted, dialled)
    };
    let mut endpoints = sliced(index, wanted, declared);
    let ready = serving.into_iter().filter(|(replica, _)| replica.ready);
    endpoints.extend(ready.map(|(replica, port)| {
        let address = replica.address.to_string();
        let endpoint = proto::Endpoint {
            address: address.clone(),
            identity: replica.identity.to_string(),
            port: port.port.into(),
            instance: replica.instance.clone(),
            zone: replica.zone.clone(),
        };
        (address, endpoint)
    }));
    (backend, endpoints)
}

/// The port of a replica that serves a service's port.
fn port_of<'r>(
    replica: &'r Replica,
    dialled: u16,
    declared: Option<&DeclaredPort>,
) -> Option<&'r ReplicaPort> {
    let by_number = |number| replica.ports.iter().find(|port| port.port == number);
    let only = || match replica.ports.as_slice() {
        [port] => Some(port),
        _ => None,
    };
    match declared.map(|port| port.target_port.as_ref()) {
        Some(Some(IntOrName::Name(name))) => {
            replica.ports.iter().find(|port| port.name == *name).or_else(only)
        }
        Some(Some(IntOrName::Number(number))) => by_number(*number).or_else(only),
        Some(None) => by_number(dialled).or_else(only),
        // Not declared: the replica's own port, or 80 for its first.
        None => by_number(dialled).or_else(|| replica.ports.first().filter(|_| dialled == 80)),
    }
}

/// The application's port, of one replica, that serves a service's port.
pub(super) fn app_port(index: &Index, replica: &Replica, wanted: &ServicePort) -> Option<u16> {
    let declared = index
        .service(&wanted.service)
        .and_then(|service| service.spec.ports.iter().find(|port| port.port == wanted.port));
    port_of(replica, wanted.port, declared).map(|port| port.port)
}

/// What the application speaks: as the Service says, else as all replicas say, else unknown.
fn protocol(
    declared: Option<&DeclaredPort>,
    serving: &[(&Replica, &ReplicaPort)],
) -> proto::Protocol {
    if let Some(named) = declared.and_then(|port| port.app_protocol.as_deref()) {
        return named_protocol(named);
    }
    let mut said = serving.iter().map(|(_, port)| named_protocol(&port.app_protocol));
    let first = said.next().unwrap_or(proto::Protocol::Auto);
    if said.all(|other| other == first) { first } else { proto::Protocol::Auto }
}

/// Kubernetes' standard `appProtocol` names (KEP-3726), and what people write for the same.
fn named_protocol(name: &str) -> proto::Protocol {
    match name.to_ascii_lowercase().as_str() {
        "http" | "http1" | "kubernetes.io/ws" => proto::Protocol::Http1,
        "kubernetes.io/h2c" | "h2c" | "http2" | "grpc" => proto::Protocol::H2c,
        _ => proto::Protocol::Auto,
    }
}

fn sliced(index: &Index, wanted: &ServicePort, declared: Option<&DeclaredPort>) -> Endpoints {
    let mut endpoints = Endpoints::new();
    let Some(declared) = declared else {
        return endpoints;
    };
    for slice in index.slices_of(&wanted.service) {
        let Some(port) = slice.ports.iter().find(|port| port.name == declared.name) else {
            continue;
        };
        for endpoint in &slice.endpoints {
            let Some(ip) = endpoint.addresses.first() else {
                continue;
            };
            if endpoint.conditions.ready == Some(false) {
                continue;
            }
            let address = SocketAddr::new(*ip, port.port).to_string();
            let found = proto::Endpoint {
                address: address.clone(),
                identity: String::new(),
                port: port.port.into(),
                instance: address.clone(),
                zone: endpoint.zone.clone().unwrap_or_default(),
            };
            endpoints.insert(address, found);
        }
    }
    endpoints
}
