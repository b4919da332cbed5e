//! Registrations with their leases. They are kept on disk too: after a restart every replica is there again at once,
//! with one whole lease to come back, so that nobody is told that a service has no endpoints only because its
//! replicas have not reconnected yet.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::index::{Change, Replica, ReplicaKey};
use crate::store::Store;
use crate::telemetry::Metrics;

/// At least this long between two writes of the file.
const WRITE_PAUSE: Duration = Duration::from_millis(100);
/// Replicas at once, of the whole mesh.
const MAX_REPLICAS: usize = 100_000;

/// Names the stream that a registration came on.
pub type Owner = u64;

/// Every registration.
#[derive(Debug)]
pub struct Registry {
    leases: Mutex<BTreeMap<ReplicaKey, Lease>>,
    store: Arc<Store>,
    metrics: Metrics,
    lease: Duration,
    file: PathBuf,
    changed: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    until: Instant,
    /// None: restored from disk, not claimed yet.
    owner: Option<Owner>,
}

/// There is no room for another registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {MAX_REPLICAS} registrations; no more are taken")]
pub struct Full;

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    replicas: Vec<Replica>,
}

impl Registry {
    /// An empty registry, kept in `file`.
    #[must_use]
    pub fn new(file: PathBuf, lease: Duration, store: Arc<Store>, metrics: Metrics) -> Self {
        Self { leases: Mutex::default(), store, metrics, lease, file, changed: Notify::new() }
    }

    /// How long a registration lasts without renewal.
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Brings back what was registered when the process last ran. A file that cannot be read is reported and passed
    /// over: replicas register again by themselves.
    pub fn restore(&self) {
        let replicas = match load(&self.file) {
            Ok(replicas) => replicas,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                let file = self.file.display();
                tracing::warn!(%file, %error, "the saved registrations cannot be read");
                return;
            }
        };
        let until = Instant::now() + self.lease;
        let mut leases = self.leases.lock();
        for replica in &replicas {
            leases.insert(replica.key(), Lease { until, owner: None });
        }
        tracing::info!(replicas = replicas.len(), "registrations restored");
        self.store.apply(replicas.into_iter().map(Change::PutReplica));
        self.changed.notify_one();
    }

    /// Registers a replica or renews it. Whoever registers a name last owns it: a sidecar that reconnects is faster
    /// than the news that its old connection is gone.
    ///
    /// # Errors
    /// When there is no room.
    pub fn register(&self, owner: Owner, replica: Replica) -> Result<(), Full> {
        let key = replica.key();
        let mut leases = self.leases.lock();
        if leases.len() >= MAX_REPLICAS && !leases.contains_key(&key) {
            return Err(Full);
        }
        leases.insert(key, Lease { until: Instant::now() + self.lease, owner: Some(owner) });
        self.store.apply([Change::PutReplica(replica)]);
        self.changed.notify_one();
        Ok(())
    }

    /// Ends a registration at once, if this stream still owns it.
    pub fn release(&self, owner: Owner, key: &ReplicaKey) {
        let mut leases = self.leases.lock();
        if leases.get(key).is_some_and(|lease| lease.owner == Some(owner)) {
            leases.remove(key);
            self.store.apply([Change::RemoveReplica(key.clone())]);
            self.metrics.registrations_ended.with_label_values(&["closed"]).inc();
            self.changed.notify_one();
        }
    }

    /// Ends what was not renewed. Returns when to look again.
    fn expire(&self, now: Instant) -> Option<Instant> {
        let mut leases = self.leases.lock();
        let over = leases.iter().filter(|(_, lease)| lease.until <= now);
        let over: Vec<ReplicaKey> = over.map(|(key, _)| key.clone()).collect();
        for key in over {
            leases.remove(&key);
            let ReplicaKey { namespace, instance, account } = &key;
            tracing::info!(namespace, instance, account, "the lease of a replica ended");
            self.metrics.registrations_ended.with_label_values(&["lease"]).inc();
            self.store.apply([Change::RemoveReplica(key)]);
            self.changed.notify_one();
        }
        leases.values().map(|lease| lease.until).min()
    }

    /// Ends leases and writes the file until `stop`; the file is written once more then, with everything in it: the
    /// streams end because this process does, not because the replicas are gone.
    pub async fn run(&self, stop: CancellationToken) {
        let mut written: Option<Vec<Replica>> = None;
        while !stop.is_cancelled() {
            let next = self.expire(Instant::now());
            self.count();
            self.save(&mut written).await;
            let pause = Instant::now() + WRITE_PAUSE;
            let next = next.unwrap_or_else(|| Instant::now() + self.lease).max(pause);
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep_until(next) => {}
                () = async { self.changed.notified().await; tokio::time::sleep_until(pause).await } => {}
            }
        }
        self.save(&mut written).await;
    }

    fn count(&self) {
        let (ready, all) = self.store.read(|view| {
            let ready = view.index.replicas().filter(|replica| replica.ready).count();
            (ready, view.index.replicas().count())
        });
        let set = |label: &str, count: usize| {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.metrics.replicas.with_label_values(&[label]).set(count);
        };
        set("true", ready);
        set("false", all - ready);
    }

    async fn save(&self, written: &mut Option<Vec<Replica>>) {
        let replicas: Vec<Replica> =
            self.store.read(|view| view.index.replicas().cloned().collect());
        if written.as_ref() == Some(&replicas) {
            return;
        }
        let (file, content) = (self.file.clone(), replicas.clone());
        let outcome = tokio::task::spawn_blocking(move || store(&file, content)).await;
        match outcome.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => *written = Some(replicas),
            Err(error) => {
                let file = self.file.display();
                tracing::warn!(%file, %error, "cannot save the registrations");
            }
        }
    }
}

fn load(file: &Path) -> io::Result<Vec<Replica>> {
    let saved: Saved = serde_json::from_slice(&std::fs::read(file)?)?;
    if saved.version != 1 {
        return Err(io::Error::other(format!("version {} is not known", saved.version)));
    }
    Ok(saved.replicas)
}

/// Replaces the file as a whole. Not flushed: after a crash of the machine the replicas have to come back anyway.
fn store(file: &Path, replicas: Vec<Replica>) -> io::Result<()> {
    let fresh = file.with_extension("json.new");
    let text = serde_json::to_vec_pretty(&Saved { version: 1, replicas })?;
    let mut options = std::fs::OpenOptions::new();
    // Addresses and identities of the mesh are not for everybody on this machine.
    options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?.write_all(&text)?;
    std::fs::rename(&fresh, file)
}

#[cfg(test)]
mod tests;
