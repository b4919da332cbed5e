//! Which subscriptions the application made itself, in code or by streams: what metadata tells of them beside those that
//! the control plane knows. Imports nothing of the relay.

use std::collections::BTreeMap;
use std::sync::Arc;

use duet_events::bus::SubscriptionSpec;
use parking_lot::Mutex;

/// How the application subscribed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It did not: a `Subscription` does.
    Declarative,
    /// Its answer to `GET /dapr/subscribe`, or `ListTopicSubscriptions`.
    Programmatic,
    /// A stream, which lasts as long as it is open.
    Streaming,
}

/// Those of now. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct Active(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    programmatic: Vec<SubscriptionSpec>,
    streams: BTreeMap<u64, SubscriptionSpec>,
    next: u64,
}

/// A stream in the list, until it is dropped.
#[derive(Debug)]
pub(super) struct Open {
    active: Active,
    number: u64,
}

impl Active {
    /// What the application wants now.
    pub(super) fn set_programmatic(&self, wanted: Vec<SubscriptionSpec>) {
        self.0.lock().programmatic = wanted;
    }

    /// A stream that opened.
    pub(super) fn stream(&self, spec: SubscriptionSpec) -> Open {
        let mut inner = self.0.lock();
        let number = inner.next;
        inner.next += 1;
        inner.streams.insert(number, spec);
        Open { active: self.clone(), number }
    }

    /// All of them.
    pub(super) fn list(&self) -> Vec<(Kind, SubscriptionSpec)> {
        let inner = self.0.lock();
        let programmatic = inner.programmatic.iter().map(|spec| (Kind::Programmatic, spec.clone()));
        let streams = inner.streams.values().map(|spec| (Kind::Streaming, spec.clone()));
        programmatic.chain(streams).collect()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.active.0.lock().streams.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_listed_while_it_is_open() {
        let active = Active::default();
        let spec = SubscriptionSpec::new("shop/a.t", "default", "t").unwrap();
        active.set_programmatic(vec![spec.clone()]);
        let open = active.stream(spec.clone());
        let kinds: Vec<_> = active.list().into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [Kind::Programmatic, Kind::Streaming]);
        drop(open);
        assert_eq!(active.list(), [(Kind::Programmatic, spec)]);
    }
}
