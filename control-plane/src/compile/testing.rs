//! What the tests of this room build their indexes with.

use std::sync::Arc;

use duet_api::resource::parse;
use duet_api::spiffe::SpiffeId;

use crate::index::{Change, Index, Replica, ReplicaPort};

/// An index of everything in a YAML text, which must be good.
pub(crate) fn index(yaml: &str) -> Index {
    let parsed = parse("test.yaml", yaml);
    assert_eq!(parsed.errors, []);
    let mut index = Index::default();
    for located in parsed.resources {
        assert_eq!(super::lint::lint(&located), []);
        index.apply(Change::Put(Arc::new(located)));
    }
    index
}

/// Adds a ready replica of a service of namespace `shop`, with ports such as `8080` or `web=8080/grpc`.
pub(crate) fn register(index: &mut Index, service: &str, instance: &str, ports: &[&str]) {
    let replica = replica(service, instance, ports);
    index.apply(Change::PutReplica(replica));
}

/// A replica as [`register`] makes it. Its address is derived from its name.
pub(crate) fn replica(service: &str, instance: &str, ports: &[&str]) -> Replica {
    let number = instance.bytes().fold(0_u8, u8::wrapping_add);
    Replica {
        identity: SpiffeId::new("duet.local", "shop", service).unwrap(),
        namespace: "shop".into(),
        instance: instance.into(),
        services: vec![service.into()],
        address: format!("10.0.0.{number}:15006").parse().unwrap(),
        ports: ports.iter().map(|text| port(text)).collect(),
        zone: String::new(),
        ready: true,
    }
}

fn port(text: &str) -> ReplicaPort {
    let (name, text) = text.split_once('=').unwrap_or(("", text));
    let (port, protocol) = text.split_once('/').unwrap_or((text, ""));
    ReplicaPort { name: name.into(), port: port.parse().unwrap(), app_protocol: protocol.into() }
}
