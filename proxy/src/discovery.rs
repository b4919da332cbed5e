//! The control-plane stream, turned into one `watch` per destination.
//!
//! A destination is subscribed to on its first use and dropped when nobody has looked at it for a while, so that
//! cost follows use. What the control plane sends is compiled here once, for all workers; a configuration that
//! does not compile is rejected with the reason and the last good one stays. When the control plane is gone, so
//! does everything stay as it was (fail static).

mod state;
mod stream;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use duet_api::proto;
use parking_lot::Mutex;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use tokio::sync::{mpsc, watch};

pub use state::{Endpoint, Snapshot, View};
pub use stream::run;

use crate::error::{ErrorType, Failure};

/// Destinations that one sidecar may watch; a runaway application cannot make it more.
const MAX_DESTINATIONS: usize = 10_000;
/// A destination without a watcher is unsubscribed from at the next look.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Turns a destination's configuration into what workers use; gets the former one, so that shared state (budgets)
/// can be carried over.
pub type Compile<T> = fn(&proto::Destination, Option<&T>) -> Result<T, String>;

type Entries<T> = Arc<Mutex<HashMap<Arc<str>, watch::Sender<View<T>>>>>;

/// Asks for destinations. Cheap to clone.
#[derive(Debug)]
pub struct Discovery<T> {
    entries: Entries<T>,
    wishes: mpsc::UnboundedSender<Arc<str>>,
}

impl<T> Clone for Discovery<T> {
    fn clone(&self) -> Self {
        Self { entries: Arc::clone(&self.entries), wishes: self.wishes.clone() }
    }
}

/// What the stream's task needs; made together with its [`Discovery`].
#[derive(Debug)]
pub struct Inputs<T> {
    /// Who we are.
    pub node: proto::Node,
    /// Our own configuration goes here; `None` until it is known.
    pub workload: watch::Sender<Option<Arc<proto::Workload>>>,
    /// See [`Compile`].
    pub compile: Compile<T>,
    entries: Entries<T>,
    wishes: mpsc::UnboundedReceiver<Arc<str>>,
    metrics: Metrics,
}

/// The two ends, and our own configuration.
type Ends<T> = (Discovery<T>, Inputs<T>, watch::Receiver<Option<Arc<proto::Workload>>>);

/// Makes the two ends. Wishes are bounded by the number of destinations, each being sent once per entry.
///
/// # Errors
/// When the metrics are registered already.
pub fn new<T>(
    node: proto::Node,
    compile: Compile<T>,
    registry: &Registry,
) -> prometheus::Result<Ends<T>> {
    let entries = Entries::default();
    let (wish, wishes) = mpsc::unbounded_channel();
    let (workload, workload_watch) = watch::channel(None);
    let metrics = Metrics::register(registry)?;
    let discovery = Discovery { entries: Arc::clone(&entries), wishes: wish };
    Ok((discovery, Inputs { node, workload, compile, entries, wishes, metrics }, workload_watch))
}

impl<T> Discovery<T> {
    /// The watch of an authority, as the application dialled it (lower case). Subscribes on first use.
    ///
    /// # Errors
    /// When too many destinations are watched.
    pub fn resolve(&self, authority: &str) -> Result<watch::Receiver<View<T>>, Failure> {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(authority) {
            return Ok(entry.subscribe());
        }
        if entries.len() >= MAX_DESTINATIONS {
            let text = format!("this sidecar watches {MAX_DESTINATIONS} destinations already");
            return Err(Failure::new(ErrorType::ProxyInternalError, text));
        }
        let key: Arc<str> = authority.into();
        let (sender, receiver) = watch::channel(View::Pending);
        entries.insert(Arc::clone(&key), sender);
        drop(entries);
        // Fails only when the stream's task has ended, at shutdown: the caller's wait then times out.
        self.wishes.send(key).ok();
        Ok(receiver)
    }

    /// Every destination watched, for the admin API.
    #[must_use]
    pub fn views(&self) -> Vec<(Arc<str>, View<T>)> {
        let entries = self.entries.lock();
        entries.iter().map(|(key, entry)| (Arc::clone(key), entry.borrow().clone())).collect()
    }
}

#[derive(Debug)]
struct Metrics {
    connected: IntGauge,
    destinations: IntGauge,
    updates: IntCounterVec,
}

impl Metrics {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let connected = IntGauge::new(
            "duet_discovery_connected_streams",
            "1 while the stream from the control plane is open, else 0.",
        )?;
        let destinations = IntGauge::new(
            "duet_discovery_destinations",
            "Destinations that this sidecar watches.",
        )?;
        let updates = IntCounterVec::new(
            Opts::new("duet_discovery_updates_total", "Updates received, by outcome."),
            &["outcome"],
        )?;
        registry.register(Box::new(connected.clone()))?;
        registry.register(Box::new(destinations.clone()))?;
        registry.register(Box::new(updates.clone()))?;
        Ok(Self { connected, destinations, updates })
    }
}
