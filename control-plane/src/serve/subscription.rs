//! What one subscription was last sent, and what it takes to bring it up to date. Pure.

use std::collections::{BTreeMap, BTreeSet};

use duet_api::proto;
use duet_api::proto::destination_update::State;

use crate::compile::{Compiled, Endpoints};
use crate::index::ServiceKey;
use crate::store::View;

/// One subscription of one stream.
#[derive(Debug)]
pub(super) struct Subscription {
    /// The change up to which it was looked at.
    generation: u64,
    depends_on: BTreeSet<ServiceKey>,
    sent: Option<Sent>,
}

#[derive(Debug)]
enum Sent {
    Config { config: Box<proto::Destination>, endpoints: BTreeMap<String, Endpoints> },
    NotFound(String),
}

impl Subscription {
    pub(super) fn new() -> Self {
        Self { generation: 0, depends_on: BTreeSet::new(), sent: None }
    }

    /// Whether it may be different now.
    pub(super) fn is_stale(&self, view: View<'_>) -> bool {
        match &self.sent {
            None => true,
            Some(Sent::Config { .. }) => {
                self.depends_on.iter().any(|service| view.touched_after(service, self.generation))
            }
            // The answer names other namespaces that have such a service.
            Some(Sent::NotFound(_)) => self
                .depends_on
                .iter()
                .any(|service| view.name_touched_after(&service.name, self.generation)),
        }
    }

    /// Takes in what it is now and says what to send, without authority and version; `None` when nothing changed.
    pub(super) fn update(
        &mut self,
        compiled: Compiled,
        generation: u64,
    ) -> Option<proto::DestinationUpdate> {
        self.generation = generation;
        self.depends_on = compiled.depends_on;
        let config = match compiled.outcome {
            Ok(config) => config,
            Err(why) => return self.not_found(why),
        };
        let before = match &self.sent {
            Some(Sent::Config { config, endpoints }) => Some((config, endpoints)),
            Some(Sent::NotFound(_)) | None => None,
        };
        let same = before.is_some_and(|(before, _)| **before == config);
        let changes = compiled.endpoints.iter().filter_map(|(backend, now)| {
            let before = before.and_then(|(_, endpoints)| endpoints.get(backend));
            endpoint_changes(backend, before, now)
        });
        let endpoints: Vec<_> = changes.collect();
        if same && endpoints.is_empty() {
            return None;
        }
        let state = (!same).then(|| State::Config(config.clone()));
        let config = Box::new(config);
        self.sent = Some(Sent::Config { config, endpoints: compiled.endpoints });
        Some(proto::DestinationUpdate { state, endpoints, ..Default::default() })
    }

    fn not_found(&mut self, why: String) -> Option<proto::DestinationUpdate> {
        if matches!(&self.sent, Some(Sent::NotFound(before)) if *before == why) {
            return None;
        }
        self.sent = Some(Sent::NotFound(why.clone()));
        let state = Some(State::NotFound(why));
        Some(proto::DestinationUpdate { state, ..Default::default() })
    }
}

/// What changed behind a backend. A backend that is new, and one where an address leads to another port than before,
/// is sent whole: removal goes by address alone.
fn endpoint_changes(
    backend: &str,
    before: Option<&Endpoints>,
    now: &Endpoints,
) -> Option<proto::EndpointsUpdate> {
    let moved = |before: &Endpoints| {
        now.iter().any(|(address, endpoint)| {
            before.get(address).is_some_and(|before| before.port != endpoint.port)
        })
    };
    let Some(before) = before.filter(|before| !moved(before)) else {
        let upsert = now.values().cloned().collect();
        return Some(proto::EndpointsUpdate {
            backend: backend.to_owned(),
            reset: true,
            upsert,
            remove: Vec::new(),
        });
    };
    let fresh = now.iter().filter(|(address, endpoint)| before.get(*address) != Some(endpoint));
    let upsert: Vec<_> = fresh.map(|(_, endpoint)| endpoint.clone()).collect();
    let gone = before.keys().filter(|address| !now.contains_key(*address));
    let remove: Vec<_> = gone.cloned().collect();
    if upsert.is_empty() && remove.is_empty() {
        return None;
    }
    Some(proto::EndpointsUpdate { backend: backend.to_owned(), reset: false, upsert, remove })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::destination;
    use crate::compile::testing::{index, register, replica};
    use crate::index::{Change, Index};

    const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: orders, namespace: shop}, spec: {ports: [{port: 80}]}}";

    fn next(subscription: &mut Subscription, index: &Index) -> Option<proto::DestinationUpdate> {
        subscription.update(destination(index, "shop", "orders"), 1)
    }

    fn addresses(update: &proto::EndpointsUpdate) -> Vec<&str> {
        update.upsert.iter().map(|endpoint| endpoint.instance.as_str()).collect()
    }

    #[test]
    fn the_first_update_is_whole_and_the_next_only_when_something_changed() {
        let mut index = index(SERVICE);
        register(&mut index, "orders", "a", &["8080"]);
        let mut subscription = Subscription::new();
        let first = next(&mut subscription, &index).unwrap();
        assert!(matches!(first.state, Some(State::Config(_))));
        assert!(first.endpoints[0].reset);
        assert_eq!(addresses(&first.endpoints[0]), ["a"]);
        assert_eq!(next(&mut subscription, &index), None);
    }

    #[test]
    fn endpoint_churn_resends_no_configuration() {
        let mut index = index(SERVICE);
        register(&mut index, "orders", "a", &["8080"]);
        let mut subscription = Subscription::new();
        next(&mut subscription, &index).unwrap();
        register(&mut index, "orders", "b", &["8080"]);
        let added = next(&mut subscription, &index).unwrap();
        assert_eq!(added.state, None);
        let change = &added.endpoints[0];
        assert_eq!((change.reset, addresses(change), change.remove.len()), (false, vec!["b"], 0));
        let gone = replica("orders", "a", &[]);
        index.apply(Change::RemoveReplica(gone.key()));
        let removed = next(&mut subscription, &index).unwrap();
        assert_eq!(removed.endpoints[0].remove, [gone.address.to_string()]);
        assert!(removed.endpoints[0].upsert.is_empty());
    }

    #[test]
    fn an_address_with_another_port_resets_the_backend() {
        let mut index = index(SERVICE);
        register(&mut index, "orders", "a", &["8080"]);
        let mut subscription = Subscription::new();
        next(&mut subscription, &index).unwrap();
        register(&mut index, "orders", "a", &["8081"]);
        let update = next(&mut subscription, &index).unwrap();
        assert!(update.endpoints[0].reset && update.state.is_none());
    }

    #[test]
    fn a_service_that_comes_and_goes_is_told_once_each() {
        let mut index = Index::default();
        let mut subscription = Subscription::new();
        let first = next(&mut subscription, &index).unwrap();
        assert!(matches!(first.state, Some(State::NotFound(_))));
        assert_eq!(next(&mut subscription, &index), None);
        register(&mut index, "orders", "a", &["8080"]);
        let found = next(&mut subscription, &index).unwrap();
        assert!(matches!(found.state, Some(State::Config(_))) && found.endpoints[0].reset);
    }
}
