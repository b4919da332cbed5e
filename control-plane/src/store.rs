//! The one [`Index`] of the process, shared: sources change it, streams read it and wait for changes. Each change has
//! a generation, and each service remembers the last one that touched it, so that a stream that slept through many
//! changes still knows exactly what to look at again. Imports [`crate::index`].

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use duet_api::resource::{Located, ObjectKey};
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::index::{Affected, Change, Index, ServiceKey};

/// The shared index.
#[derive(Debug)]
pub struct Store {
    state: RwLock<State>,
    generation: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    index: Index,
    touched: HashMap<ServiceKey, u64>,
    /// By bare name: whoever asked for a name that nobody knew waits for it in any namespace.
    touched_names: HashMap<String, u64>,
    touched_events: u64,
    /// What is not among the resources may be in a file that cannot be read as it is.
    incomplete: bool,
}

/// The index as it is, held still while somebody reads.
#[derive(Clone, Copy, Debug)]
pub struct View<'s> {
    /// Resources and replicas.
    pub index: &'s Index,
    state: &'s State,
    /// The last change.
    pub generation: u64,
}

impl Default for Store {
    fn default() -> Self {
        Self { state: RwLock::default(), generation: watch::Sender::new(1) }
    }
}

impl Store {
    /// Whether backends of other namespaces need a `ReferenceGrant`; to be said before anything is applied.
    #[must_use]
    pub fn new(require_grants: bool) -> Self {
        let store = Self::default();
        store.state.write().index.require_grants(require_grants);
        store
    }

    /// Reads. Keep it short: changes wait meanwhile.
    pub fn read<R>(&self, read: impl FnOnce(View<'_>) -> R) -> R {
        let state = self.state.read();
        // The generation moves under the write lock, so that it belongs to what is read here.
        read(View { index: &state.index, state: &state, generation: *self.generation.borrow() })
    }

    /// Takes changes in, all at once for readers.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Affected {
        let mut state = self.state.write();
        self.apply_to(&mut state, changes)
    }

    /// Makes these the resources, whatever they were before.
    pub fn replace_resources(&self, resources: &BTreeMap<ObjectKey, Arc<Located>>) -> Affected {
        let mut state = self.state.write();
        let gone = state.index.resources().map(|(key, _)| key);
        let gone: Vec<_> = gone.filter(|key| !resources.contains_key(*key)).cloned().collect();
        let changes = gone.into_iter().map(Change::Remove);
        self.apply_to(&mut state, changes.chain(resources.values().cloned().map(Change::Put)))
    }

    /// Says whether files have errors: what the resources lack then may only be mistyped.
    pub fn set_incomplete(&self, incomplete: bool) {
        self.state.write().incomplete = incomplete;
    }

    fn apply_to(&self, state: &mut State, changes: impl IntoIterator<Item = Change>) -> Affected {
        let mut affected = Affected::default();
        for change in changes {
            affected.merge(state.index.apply(change));
        }
        if affected.is_empty() {
            return affected;
        }
        let generation = *self.generation.borrow() + 1;
        for service in &affected.services {
            state.touched.insert(service.clone(), generation);
            state.touched_names.insert(service.name.clone(), generation);
        }
        if affected.events {
            state.touched_events = generation;
        }
        self.generation.send_replace(generation);
        affected
    }

    /// Tells of every change from now on.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

impl View<'_> {
    /// Whether a service was touched after a generation.
    #[must_use]
    pub fn touched_after(&self, service: &ServiceKey, generation: u64) -> bool {
        self.state.touched.get(service).is_some_and(|touched| *touched > generation)
    }

    /// Whether a service of this name, in any namespace, was touched after a generation.
    #[must_use]
    pub fn name_touched_after(&self, name: &str, generation: u64) -> bool {
        self.state.touched_names.get(name).is_some_and(|touched| *touched > generation)
    }

    /// Whether what the resources lack may be in a file that has errors.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.state.incomplete
    }

    /// Whether buses, topics or subscriptions were touched after a generation.
    #[must_use]
    pub fn events_touched_after(&self, generation: u64) -> bool {
        self.state.touched_events > generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> (ObjectKey, Arc<Located>) {
        let yaml = format!("{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}}}");
        let located = duet_api::resource::parse("a.yaml", &yaml).resources.remove(0);
        (located.resource.key(), Arc::new(located))
    }

    #[test]
    fn a_reader_that_slept_knows_what_was_touched() {
        let store = Store::default();
        let mut changes = store.changes();
        let (a, b) = (ServiceKey::new("default", "a"), ServiceKey::new("default", "b"));
        store.replace_resources(&BTreeMap::from([service("a"), service("b")]));
        let seen = store.read(|view| view.generation);
        changes.mark_unchanged();
        store.replace_resources(&BTreeMap::from([service("a"), service("b")]));
        assert!(!changes.has_changed().unwrap());
        store.replace_resources(&BTreeMap::from([service("a")]));
        assert!(changes.has_changed().unwrap());
        store.read(|view| {
            assert!(view.touched_after(&b, seen) && !view.touched_after(&a, seen));
            assert!(view.name_touched_after("b", seen) && !view.name_touched_after("a", seen));
            assert!(!view.touched_after(&b, view.generation));
            assert!(!view.events_touched_after(seen));
            assert!(view.index.service(&b).is_none());
        });
    }
}
