//! From what the application dialled to a destination at its newest version.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http::uri::Authority;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::destination::{Config, Context, Destination};
use super::replica::Replicas;
use crate::discovery::{Discovery, View};
use crate::error::{ErrorType, Failure};
use crate::telemetry::metrics::CallMetrics;

/// Longest wait for the control plane's first word on a destination.
const FIRST_USE_TIMEOUT: Duration = Duration::from_secs(3);
/// A destination that was not used between this many sweeps (one a minute) is let go.
const IDLE_SWEEPS: u32 = 10;
/// Longest wait for a first endpoint, for a destination that has none.
const NO_ENDPOINT_TIMEOUT: Duration = Duration::from_secs(1);

/// The destinations that one worker uses.
#[derive(Debug)]
pub(super) struct Destinations {
    discovery: Discovery<Config>,
    context: Arc<Context>,
    metrics: CallMetrics,
    // Held for a look-up or a rebuild, never across an await; only this worker's tasks take it.
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    entries: HashMap<Box<str>, Entry>,
    replicas: Replicas,
}

#[derive(Debug)]
struct Entry {
    view: watch::Receiver<View<Config>>,
    built: Option<Arc<Destination>>,
    /// Sweeps since the last use.
    unused: u32,
}

impl Destinations {
    pub(super) fn new(
        discovery: Discovery<Config>,
        context: Arc<Context>,
        metrics: CallMetrics,
    ) -> Self {
        Self { discovery, context, metrics, known: Mutex::default() }
    }

    /// The destination. One that has backends but no endpoint at all gets a moment to find one.
    pub(super) async fn get(&self, authority: &Authority) -> Result<Arc<Destination>, Failure> {
        let destination = self.known(authority).await?;
        if !destination.is_deserted() {
            return Ok(destination);
        }
        let found = async {
            loop {
                self.changed(authority).await;
                match self.known(authority).await {
                    Ok(destination) if destination.is_deserted() => {}
                    other => return other,
                }
            }
        };
        tokio::time::timeout(NO_ENDPOINT_TIMEOUT, found).await.unwrap_or(Ok(destination))
    }

    /// The destination; waits for the control plane on first use only.
    async fn known(&self, authority: &Authority) -> Result<Arc<Destination>, Failure> {
        if let Some(destination) = self.look_up(authority.as_str())? {
            return Ok(destination);
        }
        let name = authority.as_str().to_ascii_lowercase();
        let mut view = self.watch(&name)?;
        let known = view.wait_for(|view| !matches!(view, View::Pending));
        let waited = tokio::time::timeout(FIRST_USE_TIMEOUT, known).await;
        if waited.is_err() {
            let text = format!(
                "the control plane did not say within {} s what {name:?} is",
                FIRST_USE_TIMEOUT.as_secs()
            );
            return Err(Failure::new(ErrorType::DestinationUnavailable, text));
        }
        drop(waited);
        self.look_up(&name)?.ok_or_else(|| {
            Failure::new(ErrorType::DestinationUnavailable, "the destination is going away")
        })
    }

    /// Waits until a destination's endpoints or configuration change.
    async fn changed(&self, authority: &Authority) {
        let name = authority.as_str().to_ascii_lowercase();
        if let Ok(mut view) = self.watch(&name) {
            // Ends with an error at shutdown only.
            view.changed().await.ok();
        }
    }

    fn watch(&self, name: &str) -> Result<watch::Receiver<View<Config>>, Failure> {
        let mut known = self.known.lock();
        if let Some(entry) = known.entries.get(name) {
            return Ok(entry.view.clone());
        }
        let view = self.discovery.resolve(name)?;
        let entry = Entry { view: view.clone(), built: None, unused: 0 };
        known.entries.insert(name.into(), entry);
        Ok(view)
    }

    /// `None` while nothing is known.
    fn look_up(&self, name: &str) -> Result<Option<Arc<Destination>>, Failure> {
        let mut known = self.known.lock();
        let known = &mut *known;
        let Some(entry) = known.entries.get_mut(name) else {
            return Ok(None);
        };
        entry.unused = 0;
        if let (Some(built), Ok(false)) = (&entry.built, entry.view.has_changed()) {
            return Ok(Some(Arc::clone(built)));
        }
        let view = entry.view.borrow_and_update().clone();
        match view {
            View::Pending => Ok(None),
            View::NotFound(reason) => {
                entry.built = None;
                let text = format!("{name:?}: {reason}");
                Err(Failure::new(ErrorType::DestinationNotFound, text))
            }
            View::Known(snapshot) => {
                let service = &snapshot.config.service;
                let metrics = match &entry.built {
                    Some(built) if built.service() == service => Arc::clone(&built.metrics),
                    _ => Arc::new(self.metrics.service("outbound", service)),
                };
                let replicas = &mut known.replicas;
                let destination = Destination::new(&snapshot, replicas, metrics, &self.context);
                let built = Arc::new(destination);
                entry.built = Some(Arc::clone(&built));
                Ok(Some(built))
            }
        }
    }

    pub(super) fn sweep_idle(&self) {
        for replica in self.known.lock().replicas.values().filter_map(Weak::upgrade) {
            replica.pool.sweep();
        }
    }

    pub(super) fn sweep(&self) {
        self.known.lock().entries.retain(|_, entry| {
            entry.unused += 1;
            entry.unused <= IDLE_SWEEPS
        });
    }
}
