//! Moves what an embedded bus still holds to the cluster that the bus is on now (`duet events migrate`).
//!
//! Until that is done, publishes to the bus are refused as unavailable: sidecars keep them in their outboxes, so that
//! nothing overtakes older events of its key. Each step stores some events on the cluster, and only then removes them
//! from the old log; whatever ends it half-way, the next step goes on. Imports [`super::Buses`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use duet_events::bus::{
    Import, ManageError, ManagedBus, SubscriptionSpec, SubscriptionStatus, dead_letter,
};
use duet_events::embedded::{EmbeddedBus, OpenEvent};
use duet_events::log::{LogError, LogOptions};
use parking_lot::RwLock;
use tokio::sync::Mutex;

use super::{BusError, Buses};

/// Events that are read, stored and removed together.
const BATCH: usize = 256;

/// What an operator wants.
#[derive(Clone, Debug, Default)]
pub struct Migration {
    /// Subscriptions whose events are left behind.
    pub skip: BTreeSet<String>,
    /// Moves nothing: publishes go on, and what the old log holds stays there.
    pub leave_behind: bool,
    /// Most events of this step.
    pub limit: usize,
}

/// What a step did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Events that left the old log.
    pub events: u64,
    /// Where what stays is kept, when there is nothing more to move.
    pub folder: Option<PathBuf>,
}

/// Buses that have an old log.
#[derive(Debug, Default)]
pub(super) struct Moves {
    open: Mutex<BTreeMap<String, Old>>,
    /// Those that hold publishes back.
    waiting: RwLock<BTreeSet<String>>,
}

/// A bus that was embedded before.
#[derive(Debug)]
struct Old {
    bus: EmbeddedBus,
    /// Looked at up to here, by topic.
    next: BTreeMap<String, u64>,
    /// Its subscriptions were compared with the new ones.
    checked: bool,
}

impl Moves {
    pub(super) fn waits(&self, bus: &str) -> bool {
        self.waiting.read().contains(bus)
    }

    /// Makes on the new bus what was subscribed on the old one and no resource declares: what is published before its
    /// consumers come is for them as well. It is made once: whoever is there only for that leaves the old log.
    pub(super) async fn adopt(&self, name: &str, new: &dyn ManagedBus) -> anyhow::Result<()> {
        let open = self.open.lock().await;
        let Some(old) = open.get(name) else { return Ok(()) };
        let before = old.bus.subscriptions().await?;
        let before: Vec<_> = before.into_iter().filter(|before| !before.declared).collect();
        if before.is_empty() {
            return Ok(());
        }
        let there = new.subscriptions().await?;
        for before in before {
            // One of this name that is on another topic is not moved away from there.
            if !there.iter().any(|new| new.name == before.name) {
                let mut spec = SubscriptionSpec::new(&before.name, name, &before.topic)?;
                spec.dead_letter_topic.clone_from(&before.dead_letter_topic);
                spec.idle_expiry = before.idle_expiry;
                new.adopt(spec).await?;
            }
            if before.waiting() == 0 && !before.paused {
                old.bus.remove_subscription(&before.name).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn close(&self) {
        for old in self.open.lock().await.values() {
            old.bus.close().await;
        }
    }

    /// Looks for what the bus of this name holds here, where it is no longer kept; returns whether there is anything.
    pub(super) async fn look(&self, name: &str, dir: &Path) -> Result<bool, BusError> {
        if !dir.is_dir() {
            return Ok(false);
        }
        // Held by whoever moves the events of another bus, which takes its time.
        let mut open = self.open.lock().await;
        if open.contains_key(name) {
            return Ok(true);
        }
        let failed = |source| BusError::Open { name: name.to_owned(), source };
        // Its metrics would have the names of those of the new one.
        let nobody = prometheus::Registry::new();
        let bus = EmbeddedBus::open(name, dir, LogOptions::default(), &nobody).await;
        let bus = bus.map_err(failed)?;
        let subscriptions = match bus.subscriptions().await {
            Ok(subscriptions) => subscriptions,
            Err(error) => {
                bus.close().await;
                return Err(failed(LogError::Store(error.to_string())));
            }
        };
        let lag: u64 = subscriptions.iter().map(SubscriptionStatus::waiting).sum();
        let paused = subscriptions.iter().filter(|subscription| subscription.paused).count();
        if lag > 0 || paused > 0 {
            tracing::warn!(
                bus = name,
                lag,
                paused,
                "the bus was embedded before and holds events that subscriptions have yet to handle, or paused ones; \
                 publishes to it wait in outboxes until `duet events migrate` has moved them"
            );
            self.waiting.write().insert(name.to_owned());
        }
        open.insert(name.to_owned(), Old { bus, next: BTreeMap::new(), checked: false });
        Ok(true)
    }
}

impl Buses {
    /// Moves some of what the bus held before it was on another backend.
    ///
    /// # Errors
    /// When there is nothing old, when events wait for a subscription that is not declared any more, and when either
    /// bus fails: the same again goes on.
    pub async fn migrate(&self, name: &str, wanted: &Migration) -> Result<Moved, ManageError> {
        let new = self.get(name).await;
        let new =
            new.map_err(|error| ManageError::Failed(format!("{:#}", anyhow::Error::new(error))))?;
        let mut open = self.moves.open.lock().await;
        let old = open.get_mut(name).ok_or_else(|| {
            let why = "nothing is left to move: no embedded log of it is in the state folder, or it is embedded now";
            ManageError::Refused(format!("bus {name}: {why}"))
        })?;
        let mut moved = Moved::default();
        if !wanted.leave_behind {
            old.check(&*new, &wanted.skip).await?;
            moved.events = old.step(&*new, wanted).await?;
            if moved.events >= wanted.limit.max(1) as u64 {
                return Ok(moved);
            }
        }
        old.bus.close().await;
        let folder = self.put_away(name)?;
        open.remove(name);
        self.moves.waiting.write().remove(name);
        tracing::info!(bus = name, folder = %folder.display(), "the old log is put away");
        Ok(Moved { folder: Some(folder), ..moved })
    }

    /// Gives the folder of the old log a name that no bus has.
    fn put_away(&self, name: &str) -> Result<PathBuf, ManageError> {
        let mut number = 1;
        let mut to = self.dir.join(format!("{name}.moved"));
        while to.exists() {
            number += 1;
            to = self.dir.join(format!("{name}.moved-{number}"));
        }
        let renamed = std::fs::rename(self.dir.join(name), &to);
        renamed.map_err(|error| ManageError::Failed(format!("{}: {error}", to.display())))?;
        Ok(to)
    }
}

impl Old {
    /// Every subscription that waits for something must be on the new bus. One that is paused stays paused.
    async fn check(
        &mut self,
        new: &dyn ManagedBus,
        skip: &BTreeSet<String>,
    ) -> Result<(), ManageError> {
        if self.checked {
            return Ok(());
        }
        let there = new.subscriptions().await?;
        let known = |old: &SubscriptionStatus| {
            there.iter().any(|new| new.name == old.name && new.topic == old.topic)
        };
        let before = self.bus.subscriptions().await?;
        let waits = |old: &&SubscriptionStatus| old.waiting() > 0 && !skip.contains(&old.name);
        let unknown = before.iter().filter(waits).filter(|old| !known(old));
        let unknown: Vec<_> = unknown.map(|old| old.name.as_str()).collect();
        if !unknown.is_empty() {
            return Err(ManageError::Refused(format!(
                "events wait for subscriptions that the new bus does not have (yet): {}; declare them or let their \
                 consumers come, or leave their events behind with --skip",
                unknown.join(", ")
            )));
        }
        // One whose events stay behind has nothing that must rest.
        let moves = |old: &&SubscriptionStatus| known(old) && !skip.contains(&old.name);
        for old in before.iter().filter(moves).filter(|old| old.paused) {
            new.pause(&old.name, true).await.map_err(|error| cannot_rest(&old.name, error))?;
        }
        self.checked = true;
        Ok(())
    }

    async fn step(&mut self, new: &dyn ManagedBus, wanted: &Migration) -> Result<u64, ManageError> {
        let mut moved = 0;
        for topic in self.bus.topics().await? {
            loop {
                let room = wanted.limit.max(1) - usize::try_from(moved).unwrap_or(usize::MAX);
                let batch = self.batch(new, &topic.name, room.min(BATCH), &wanted.skip).await?;
                let Some(count) = batch else { break };
                moved += count;
                if moved >= wanted.limit.max(1) as u64 {
                    return Ok(moved);
                }
            }
        }
        Ok(moved)
    }

    /// Moves the next events of a topic; returns how many, and `None` at its end.
    async fn batch(
        &mut self,
        new: &dyn ManagedBus,
        topic: &str,
        limit: usize,
        skip: &BTreeSet<String>,
    ) -> Result<Option<u64>, ManageError> {
        let from = self.next.get(topic).copied().unwrap_or(0);
        let events = self.bus.open_events(topic, from, limit).await?;
        let Some(next) = events.last().map(|event| event.position + 1) else { return Ok(None) };
        let there = new.subscriptions().await?;
        let there = there.into_iter().filter(|subscription| subscription.topic == topic);
        let there: BTreeSet<String> = there.map(|subscription| subscription.name).collect();
        let mut imports = Vec::new();
        let mut positions = Vec::new();
        for event in events {
            let position = event.position;
            let copies = copies(event, &there, skip);
            if !copies.is_empty() {
                positions.push(position);
            }
            imports.extend(copies);
        }
        let moved = positions.len() as u64;
        if moved > 0 {
            new.import(topic, imports).await?;
            self.bus.remove_events(topic, positions).await?;
        }
        self.next.insert(topic.to_owned(), next);
        Ok(Some(moved))
    }
}

/// A paused subscription that cannot be paused where it goes.
fn cannot_rest(name: &str, error: ManageError) -> ManageError {
    match error {
        ManageError::Refused(why) => ManageError::Refused(format!(
            "{name} is paused, and {why}: upgrade the servers, or leave its events behind with --skip"
        )),
        ManageError::Unknown { .. } | ManageError::Away(_) | ManageError::Failed(_) => error,
    }
}

/// What of an event goes to a topic with these subscriptions: the event itself where all of them wait for it, else a
/// copy for each that does. Nothing, where it is handled.
fn copies(open: OpenEvent, there: &BTreeSet<String>, skip: &BTreeSet<String>) -> Vec<Import> {
    let OpenEvent { position, event, waiting, recent } = open;
    let (skipped, waiting): (BTreeSet<_>, BTreeSet<_>) =
        waiting.into_iter().partition(|name| skip.contains(name));
    if waiting.is_empty() && !skipped.is_empty() {
        return Vec::new();
    }
    let import = |only| Import { event: event.clone(), position, only, recent };
    // It is for one already, and says so.
    let marked = dead_letter::redriven_to(&event).is_some();
    if !marked && there.is_subset(&waiting) {
        return vec![import(None)];
    }
    let waiting = waiting.into_iter().filter(|name| there.contains(name));
    waiting.map(|name| import(Some(name))).collect()
}

#[cfg(test)]
mod tests {
    use duet_events::Event;

    use super::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn open(waiting: &[&str]) -> OpenEvent {
        let event = Event::new("1", "/s", "t").unwrap();
        OpenEvent {
            position: 3,
            event,
            waiting: names(waiting).into_iter().collect(),
            recent: true,
        }
    }

    /// For whom the copies are.
    fn only(waiting: &[&str], there: &[&str], skip: &[&str]) -> Vec<Option<String>> {
        let copies = copies(open(waiting), &names(there), &names(skip));
        copies.into_iter().map(|copy| copy.only).collect()
    }

    #[test]
    fn an_event_goes_to_those_that_wait_for_it_and_to_nobody_else() {
        let one = |name: &str| Some(name.to_owned());
        assert_eq!(only(&["a", "b"], &["a", "b"], &[]), [None], "all wait: once, as it is");
        assert_eq!(only(&["a"], &["a", "b"], &[]), [one("a")]);
        assert_eq!(only(&["a", "b"], &["a", "b", "c"], &[]), [one("a"), one("b")]);
        assert_eq!(only(&[], &["a"], &[]), [], "it is handled");
        assert_eq!(only(&[], &[], &[]), [None], "nobody would get it by mistake");
        assert_eq!(only(&["a", "b"], &["a", "b"], &["b"]), [one("a")]);
        assert_eq!(only(&["a"], &[], &["a"]), [], "left behind");
        let event = Event::new("1", "/s", "t").unwrap().with_attribute("redriveto", "a").unwrap();
        let marked = OpenEvent { event, ..open(&["a"]) };
        let copies = copies(marked, &names(&["a"]), &names(&[]));
        assert_eq!(copies.first().map(|copy| copy.only.clone()), Some(one("a")));
    }
}
