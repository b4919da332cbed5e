//! What is known of one destination, and how updates change it. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use duet_api::proto;
use duet_api::spiffe::SpiffeId;

use super::Compile;

/// What is known of a destination.
#[derive(Debug)]
pub enum View<T> {
    /// Asked for, not answered yet.
    Pending,
    /// The control plane knows no such name, and why.
    NotFound(Arc<str>),
    /// Known.
    Known(Arc<Snapshot<T>>),
}

impl<T> Clone for View<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Pending => Self::Pending,
            Self::NotFound(reason) => Self::NotFound(Arc::clone(reason)),
            Self::Known(snapshot) => Self::Known(Arc::clone(snapshot)),
        }
    }
}

/// A destination's configuration and endpoints at one version. Immutable; swapped whole.
#[derive(Debug)]
pub struct Snapshot<T> {
    /// Compiled configuration; the same `Arc` until it changes.
    pub config: Arc<T>,
    /// Endpoints by backend name; the same `Arc` until they change.
    pub endpoints: BTreeMap<Arc<str>, Arc<Vec<Endpoint>>>,
}

/// Where a replica can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// To dial.
    pub address: SocketAddr,
    /// Port of the application behind the sidecar.
    pub port: u16,
    /// Whom to expect; `None`: plaintext, no sidecar there.
    pub identity: Option<SpiffeId>,
    /// Name of the replica.
    pub instance: Arc<str>,
    /// Its zone; may be empty.
    pub zone: Arc<str>,
}

impl TryFrom<&proto::Endpoint> for Endpoint {
    type Error = String;

    fn try_from(raw: &proto::Endpoint) -> Result<Self, String> {
        let address =
            raw.address.parse().map_err(|_err| format!("endpoint address {:?}", raw.address))?;
        let port = u16::try_from(raw.port).map_err(|_err| format!("endpoint port {}", raw.port))?;
        let identity = match raw.identity.as_str() {
            "" => None,
            id => Some(id.parse().map_err(|err| format!("endpoint identity: {err}"))?),
        };
        let (instance, zone) = (raw.instance.as_str().into(), raw.zone.as_str().into());
        Ok(Self { address, port, identity, instance, zone })
    }
}

/// Applies an update to a view.
///
/// # Errors
/// When the update cannot be used: the view then stays as it was.
pub(super) fn apply<T>(
    view: &View<T>,
    update: &proto::DestinationUpdate,
    compile: Compile<T>,
) -> Result<View<T>, String> {
    use proto::destination_update::State;
    let former = if let View::Known(snapshot) = view { Some(snapshot) } else { None };
    let config = match &update.state {
        Some(State::NotFound(reason)) => return Ok(View::NotFound(reason.as_str().into())),
        Some(State::Config(config)) => {
            Arc::new(compile(config, former.map(|snapshot| &*snapshot.config))?)
        }
        None => match former {
            Some(snapshot) => Arc::clone(&snapshot.config),
            None => return Err("endpoints without a configuration".to_owned()),
        },
    };
    let mut endpoints = former.map(|snapshot| snapshot.endpoints.clone()).unwrap_or_default();
    if let Some(State::Config(raw)) = &update.state {
        endpoints.retain(|name, _| raw.backends.iter().any(|backend| *backend.name == **name));
    }
    for change in &update.endpoints {
        let list = changed(endpoints.get(change.backend.as_str()), change)?;
        endpoints.insert(change.backend.as_str().into(), Arc::new(list));
    }
    Ok(View::Known(Arc::new(Snapshot { config, endpoints })))
}

fn changed(
    former: Option<&Arc<Vec<Endpoint>>>,
    change: &proto::EndpointsUpdate,
) -> Result<Vec<Endpoint>, String> {
    let mut list: Vec<Endpoint> = match former {
        Some(former) if !change.reset => former.to_vec(),
        _ => Vec::new(),
    };
    for address in &change.remove {
        list.retain(|endpoint| endpoint.address.to_string() != *address);
    }
    for raw in &change.upsert {
        let endpoint = Endpoint::try_from(raw)?;
        list.retain(|old| (old.address, old.port) != (endpoint.address, endpoint.port));
        list.push(endpoint);
    }
    list.sort();
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::destination_update::State;

    fn compile(config: &proto::Destination, _: Option<&String>) -> Result<String, String> {
        if config.service.is_empty() {
            Err("no service".to_owned())
        } else {
            Ok(config.service.clone())
        }
    }

    fn config(service: &str, endpoints: Vec<proto::EndpointsUpdate>) -> proto::DestinationUpdate {
        let backends = vec![proto::Backend { name: "b".to_owned(), ..Default::default() }];
        let config =
            proto::Destination { service: service.to_owned(), backends, ..Default::default() };
        proto::DestinationUpdate {
            state: Some(State::Config(config)),
            endpoints,
            ..Default::default()
        }
    }

    fn upsert(reset: bool, addresses: &[&str]) -> proto::EndpointsUpdate {
        let endpoint = |address: &&str| proto::Endpoint {
            address: (*address).to_owned(),
            ..Default::default()
        };
        let upsert = addresses.iter().map(endpoint).collect();
        proto::EndpointsUpdate { backend: "b".to_owned(), reset, upsert, ..Default::default() }
    }

    fn addresses(view: &View<String>) -> Vec<String> {
        let View::Known(snapshot) = view else { panic!("{view:?}") };
        snapshot.endpoints["b"].iter().map(|endpoint| endpoint.address.to_string()).collect()
    }

    #[test]
    fn endpoint_deltas_leave_the_configuration_alone() {
        let view = apply(&View::Pending, &config("s", vec![upsert(true, &["1.1.1.1:1"])]), compile)
            .unwrap();
        let delta = proto::DestinationUpdate {
            endpoints: vec![proto::EndpointsUpdate {
                remove: vec!["1.1.1.1:1".to_owned()],
                ..upsert(false, &["2.2.2.2:2", "3.3.3.3:3"])
            }],
            ..Default::default()
        };
        let changed = apply(&view, &delta, compile).unwrap();
        assert_eq!(addresses(&changed), ["2.2.2.2:2", "3.3.3.3:3"]);
        let (View::Known(a), View::Known(b)) = (&view, &changed) else { panic!() };
        assert!(Arc::ptr_eq(&a.config, &b.config));
    }

    #[test]
    fn what_does_not_compile_is_refused_with_the_reason() {
        assert_eq!(apply(&View::Pending, &config("", vec![]), compile).unwrap_err(), "no service");
        let bad = config("s", vec![upsert(true, &["nonsense"])]);
        assert!(apply(&View::Pending, &bad, compile).unwrap_err().contains("nonsense"));
    }
}
