//! One endpoint: its connections and latency estimate, of one worker, and its health, shared by all workers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::balance::maglev;
use crate::balance::peak_ewma::PeakEwma;
use crate::connect::{Pool, SharedConnector, Target};
use crate::policy::outlier::Health;

/// Share of requests that an endpoint gets at the least while it starts slowly.
const LEAST_SHARE: f64 = 0.1;

/// The health of every endpoint that some worker uses, and the clock that it is told by.
#[derive(Clone, Debug)]
pub struct Healths {
    known: Arc<Mutex<HashMap<Target, Weak<Health>>>>,
    started: Instant,
}

impl Default for Healths {
    fn default() -> Self {
        Self { known: Arc::default(), started: Instant::now() }
    }
}

impl Healths {
    fn of(&self, target: &Target) -> Arc<Health> {
        let mut known = self.known.lock();
        if let Some(health) = known.get(target).and_then(Weak::upgrade) {
            return health;
        }
        known.retain(|_, health| health.strong_count() > 0);
        let health = Arc::new(Health::default());
        known.insert(target.clone(), Arc::downgrade(&health));
        health
    }

    /// A moment, since the start of the process.
    #[must_use]
    pub fn at(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.started)
    }

    /// Since the start of the process.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// A time of that clock, as health counts it.
#[must_use]
pub fn millis(now: Duration) -> u64 {
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// One endpoint, of one worker.
#[derive(Debug)]
pub struct Replica {
    /// Open connections.
    pub pool: Arc<Pool>,
    /// Shared by all workers.
    pub health: Arc<Health>,
    /// Names it to clients that are to come back to it, without telling them its address.
    pub token: u64,
    in_flight: AtomicU32,
    latency: Mutex<PeakEwma>,
    /// When it was first seen, seconds of the clock of [`Healths`].
    since: f64,
}

/// Replicas of a worker by target, shared between destinations so that `orders` and `orders:80` use the same
/// connections.
pub type Replicas = HashMap<Target, Weak<Replica>>;

impl Replica {
    /// The replica at a target: the known one, or a new one.
    pub(super) fn at(
        target: Target,
        known: &mut Replicas,
        connector: &SharedConnector,
        healths: &Healths,
    ) -> Arc<Self> {
        if let Some(known) = known.get(&target).and_then(Weak::upgrade) {
            return known;
        }
        let now = healths.elapsed().as_secs_f64();
        let new = Arc::new(Self {
            pool: Pool::new(target.clone(), Arc::clone(connector)),
            health: healths.of(&target),
            token: maglev::hash(&(target.address, target.port)),
            in_flight: AtomicU32::new(0),
            latency: Mutex::new(PeakEwma::new(now)),
            since: now,
        });
        known.insert(target, Arc::downgrade(&new));
        new
    }

    /// What one more request would cost: expected latency times the requests that it would share with.
    #[must_use]
    pub fn cost(&self, now: f64) -> f64 {
        self.latency.lock().value(now) * (self.load() + 1.0)
    }

    /// Requests in flight.
    #[must_use]
    pub fn load(&self) -> f64 {
        f64::from(self.in_flight.load(Ordering::Relaxed))
    }

    /// Share of its full load that it should get, 0.1 to 1, where endpoints start slowly.
    #[must_use]
    pub fn share(&self, slow_start: Option<Duration>, now: f64) -> f64 {
        share(self.since, slow_start, now)
    }

    /// Takes in how long a try took.
    pub fn observe(&self, sample: Duration, now: f64) {
        self.latency.lock().observe(sample, now);
    }

    /// Counts a request in flight until dropped.
    #[must_use]
    pub(super) fn enter(self: &Arc<Self>, probe: bool) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight { replica: Arc::clone(self), probe }
    }
}

fn share(since: f64, slow_start: Option<Duration>, now: f64) -> f64 {
    let Some(window) = slow_start.filter(|window| !window.is_zero()) else {
        return 1.0;
    };
    ((now - since) / window.as_secs_f64()).clamp(LEAST_SHARE, 1.0)
}

/// A request in flight at a replica.
#[derive(Debug)]
pub(super) struct InFlight {
    replica: Arc<Replica>,
    /// It probes an ejected endpoint, and nobody has said how that went.
    probe: bool,
}

impl InFlight {
    /// Where.
    pub(super) fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    /// Whether it probes; says so once.
    pub(super) fn take_probe(&mut self) -> bool {
        std::mem::take(&mut self.probe)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.replica.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.probe {
            self.replica.health.abandoned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_endpoint_gets_its_full_share_step_by_step() {
        let window = Some(Duration::from_secs(30));
        assert!((share(100.0, window, 100.0) - LEAST_SHARE).abs() < 1e-9);
        assert!((share(100.0, window, 115.0) - 0.5).abs() < 1e-9);
        assert!((share(100.0, window, 200.0) - 1.0).abs() < 1e-9);
        assert!((share(100.0, None, 100.0) - 1.0).abs() < 1e-9);
        assert!((share(100.0, Some(Duration::ZERO), 100.0) - 1.0).abs() < 1e-9);
    }
}
