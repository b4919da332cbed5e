//! The sidecar's durable spool: events whose bus is away wait here, and follow when it is back, those of each topic in
//! order.
//!
//! One [`crate::log`] for all buses, a topic for each, consumed by the one forwarder of that bus. The store is made when
//! it is first needed, so a sidecar whose bus never fails never has one. Whatever an event is published for, such as a
//! later time, it is forwarded as it is: that is for the bus to do. Imports [`crate::bus`] and [`crate::log`].

mod forward;
mod metrics;
mod rejected;
mod relay;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, Notify};

use crate::bus::{EventBus, PublishError, PublishErrorKind, Start, SubscriptionSpec, TopicConfig};
use crate::cloudevent::Event;
use crate::embedded::publish_error;
use crate::log::{Backlog, Entry, Log, LogError, LogMetrics, LogOptions, store};
use metrics::OutboxMetrics;

pub use rejected::Rejected;
pub use relay::{Accepted, RelayPublisher};

/// Subscriptions of the forwarders are called this and the bus's name.
const FORWARDER: &str = "outbox/";
/// Between two tries to open an outbox that could not be opened.
const OPEN_AGAIN: Duration = Duration::from_secs(10);
/// Events that a forwarder has in hand; of large ones the log gives it fewer. Those of topics that the bus does not take just
/// now are among them, so there must be room for others besides; with as many of them, the others wait, too.
const IN_HAND: u32 = 4096;

/// Where the outbox lives and how much it takes.
#[derive(Clone, Debug)]
pub struct OutboxOptions {
    /// Its folder; created when first needed.
    pub dir: PathBuf,
    /// Most bytes of waiting events, for all buses together. A sensible value is 256 MiB.
    pub capacity_bytes: u64,
}

/// Events that wait on this machine's disk for their bus.
#[derive(Debug)]
pub struct Outbox {
    options: OutboxOptions,
    metrics: OutboxMetrics,
    log_metrics: LogMetrics,
    /// An async lock, because opening waits for the disk: all who need the log first wait for one opening.
    log: AsyncMutex<Opened>,
    /// A plain lock, because it only guards counting.
    spools: Mutex<HashMap<String, Arc<Spool>>>,
    /// Of all spools.
    bytes: Mutex<u64>,
    /// Tells that nothing waits for some bus any more.
    left: Notify,
}

#[derive(Debug, Default)]
struct Opened {
    log: Option<Arc<Log>>,
    /// What the log held when it was first opened is counted in.
    counted: bool,
}

/// What waits for one bus.
#[derive(Debug)]
struct Spool {
    bus: String,
    waiting: Mutex<Waiting>,
    /// Wakes the forwarder.
    filled: Notify,
    /// Topic and subscription exist in the log.
    prepared: tokio::sync::OnceCell<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    events: u64,
    bytes: u64,
    /// Calls that have taken room and are not on disk yet.
    appending: u64,
    /// Calls that got there.
    kept: u64,
}

impl Outbox {
    /// Opens the store if it exists; otherwise it is made when first needed. One that cannot be opened is tried again: calls,
    /// and publishes to a bus that is there, need none.
    ///
    /// # Errors
    /// When another process uses the store, or when the registry has an outbox already.
    pub async fn open(
        options: OutboxOptions,
        registry: &prometheus::Registry,
    ) -> Result<Arc<Self>, LogError> {
        let refused = |error| LogError::Refused(format!("metrics of the outbox: {error}"));
        let outbox = Self {
            metrics: OutboxMetrics::register(registry).map_err(refused)?,
            log_metrics: LogMetrics::register_store(registry, "outbox").map_err(refused)?,
            log: AsyncMutex::default(),
            spools: Mutex::default(),
            bytes: Mutex::default(),
            left: Notify::new(),
            options,
        };
        let outbox = Arc::new(outbox);
        if outbox.options.dir.join(store::FILE_NAME).exists() {
            match outbox.log().await {
                // Somebody else forwards what is in it, and it is not ours.
                Err(LogError::InUse) => return Err(LogError::InUse),
                Err(error) => {
                    tracing::error!(%error, "the outbox cannot be opened; going on without it");
                    tokio::spawn(open_later(Arc::downgrade(&outbox)));
                }
                Ok(_) => {}
            }
        }
        Ok(outbox)
    }

    /// A publisher to one bus, with this outbox behind it. Starts the task that forwards what waits for that bus;
    /// it ends with the publisher (keep one publisher for each bus, and share it). Must be called within a tokio runtime.
    #[must_use]
    pub fn relay(self: &Arc<Self>, bus_name: &str, bus: Arc<dyn EventBus>) -> RelayPublisher {
        RelayPublisher::start(Arc::clone(self), self.spool(bus_name), bus)
    }

    /// Events that wait for any bus.
    #[must_use]
    pub fn depth(&self) -> u64 {
        self.spools.lock().values().map(|spool| spool.waiting.lock().events).sum()
    }

    /// Returns once no event waits for any bus.
    pub async fn emptied(&self) {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            if self.depth() == 0 {
                return;
            }
            left.await;
        }
    }

    /// Writes what waits and closes the store. The publishers must be gone before; what they spool
    /// afterwards opens it again.
    pub async fn close(&self) {
        if let Some(log) = self.log.lock().await.log.take() {
            log.close().await;
        }
    }

    /// Keeps events for a bus; returns after the flush. Whoever asked may leave meanwhile: what is on its way to the disk
    /// is counted in all the same, since new events must not overtake it.
    async fn keep(
        self: &Arc<Self>,
        spool: &Arc<Spool>,
        topic: &str,
        events: Vec<Event>,
    ) -> Result<(), PublishError> {
        let (outbox, spool, topic) = (Arc::clone(self), Arc::clone(spool), topic.to_owned());
        let kept = tokio::spawn(async move { outbox.keep_all(&spool, &topic, events).await });
        kept.await.unwrap_or_else(|ended| {
            Err(PublishError::new(PublishErrorKind::Internal, format!("the outbox: {ended}")))
        })
    }

    async fn keep_all(
        &self,
        spool: &Spool,
        topic: &str,
        events: Vec<Event>,
    ) -> Result<(), PublishError> {
        let (count, bytes) = (events.len() as u64, events.iter().map(size).sum());
        if !self.reserve(spool, count, bytes) {
            self.metrics.full.with_label_values(&[&spool.bus]).inc();
            let message = format!("bus {} is away and the outbox is full", spool.bus);
            return Err(PublishError::new(PublishErrorKind::Full, message));
        }
        let reserved = Reserved::new(self, spool, count, bytes);
        let context = format!("outbox for bus {}", spool.bus);
        let kept = self.append(spool, topic, events).await;
        kept.map_err(|error| publish_error(&context, &error))?;
        reserved.keep();
        self.metrics.spooled.with_label_values(&[&spool.bus]).inc_by(count);
        spool.filled.notify_one();
        Ok(())
    }

    async fn append(&self, spool: &Spool, topic: &str, events: Vec<Event>) -> Result<(), LogError> {
        let log = self.log().await?;
        self.prepare(&log, spool).await?;
        let entries = events.into_iter().map(|event| Entry { event, route: topic.to_owned() });
        log.append(&spool.bus, entries.collect()).await?;
        Ok(())
    }

    /// The subscription comes first: without it, nothing would hold the events.
    async fn prepare(&self, log: &Log, spool: &Spool) -> Result<SubscriptionSpec, LogError> {
        let spec = SubscriptionSpec::new(&format!("{FORWARDER}{}", spool.bus), "", &spool.bus);
        let mut spec = spec.map_err(|error| LogError::Refused(error.to_string()))?;
        spec.start = Start::Earliest;
        spec.max_in_flight = IN_HAND;
        spec.dead_letter_topic = rejected::topic(&spool.bus);
        let declare = async {
            log.ensure_subscription(spec.clone()).await?;
            let forwarded_goes =
                TopicConfig { retention_age: Some(Duration::ZERO), ..TopicConfig::keep_all() };
            log.ensure_topic(&spool.bus, forwarded_goes).await?;
            // Poison must not fill the disk either.
            let room = Some(self.options.capacity_bytes / 4);
            let rejected = TopicConfig { retention_bytes: room, ..TopicConfig::keep_all() };
            log.ensure_topic(&spec.dead_letter_topic, rejected).await
        };
        spool.prepared.get_or_try_init(|| declare).await?;
        Ok(spec)
    }

    async fn log(&self) -> Result<Arc<Log>, LogError> {
        let mut opened = self.log.lock().await;
        if let Some(log) = &opened.log {
            return Ok(Arc::clone(log));
        }
        let options = LogOptions { cache_bytes: 2 << 20, ..LogOptions::default() };
        let log = Log::open(&self.options.dir, options, self.log_metrics.clone()).await?;
        // Before anything is added.
        if !opened.counted {
            self.count_waiting(log.backlogs().await?);
            opened.counted = true;
        }
        Ok(Arc::clone(opened.log.insert(Arc::new(log))))
    }

    /// Counts in what waits from before.
    fn count_waiting(&self, backlogs: BTreeMap<String, Backlog>) {
        for (name, backlog) in backlogs {
            let Some(bus) = name.strip_prefix(FORWARDER) else {
                continue;
            };
            if backlog.events > 0 {
                let (events, bytes) = (backlog.events, backlog.bytes);
                tracing::info!(bus, events, bytes, "the outbox holds events from before");
            }
            let spool = self.spool(bus);
            self.add(&spool, backlog.events, backlog.bytes);
            spool.filled.notify_one();
        }
    }

    fn spool(&self, bus: &str) -> Arc<Spool> {
        let mut spools = self.spools.lock();
        let spool = spools.entry(bus.to_owned()).or_insert_with(|| {
            Arc::new(Spool {
                bus: bus.to_owned(),
                waiting: Mutex::default(),
                filled: Notify::new(),
                prepared: tokio::sync::OnceCell::new(),
            })
        });
        Arc::clone(spool)
    }

    /// False: no room.
    fn reserve(&self, spool: &Spool, events: u64, bytes: u64) -> bool {
        let mut all = self.bytes.lock();
        if all.saturating_add(bytes) > self.options.capacity_bytes {
            return false;
        }
        *all += bytes;
        drop(all);
        // First: until it is on disk, nobody compares the count with what is there.
        spool.waiting.lock().appending += 1;
        self.count_in(spool, events, bytes);
        true
    }

    fn add(&self, spool: &Spool, events: u64, bytes: u64) {
        *self.bytes.lock() += bytes;
        self.count_in(spool, events, bytes);
    }

    fn count_in(&self, spool: &Spool, events: u64, bytes: u64) {
        let mut waiting = spool.waiting.lock();
        waiting.events += events;
        waiting.bytes += bytes;
        self.metrics.waiting(&spool.bus, waiting.events, waiting.bytes);
    }

    /// Events have left, one way or another.
    fn remove(&self, spool: &Spool, events: u64, bytes: u64) {
        let mut waiting = spool.waiting.lock();
        waiting.events = waiting.events.saturating_sub(events);
        // After a restart the bytes are an estimate; an empty spool is exact.
        let left = if waiting.events == 0 { 0 } else { waiting.bytes.saturating_sub(bytes) };
        let freed = waiting.bytes - left;
        waiting.bytes = left;
        self.metrics.waiting(&spool.bus, waiting.events, waiting.bytes);
        let empty = waiting.events == 0;
        drop(waiting);
        if empty {
            self.left.notify_waiters();
        }
        let mut all = self.bytes.lock();
        *all = all.saturating_sub(freed);
    }
}

/// Tries to open an outbox that could not be opened, so that what waits there is forwarded.
async fn open_later(outbox: Weak<Outbox>) {
    loop {
        tokio::time::sleep(OPEN_AGAIN).await;
        let Some(outbox) = outbox.upgrade() else { return };
        match outbox.log().await {
            Ok(_) => return tracing::info!("the outbox is open"),
            Err(error) => tracing::error!(%error, "the outbox cannot be opened; trying again"),
        }
    }
}

/// Room taken for events that are not on disk yet; given back unless they get there.
struct Reserved<'a> {
    outbox: &'a Outbox,
    spool: &'a Spool,
    count: u64,
    bytes: u64,
    kept: bool,
}

impl<'a> Reserved<'a> {
    fn new(outbox: &'a Outbox, spool: &'a Spool, count: u64, bytes: u64) -> Self {
        Self { outbox, spool, count, bytes, kept: false }
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut waiting = self.spool.waiting.lock();
        waiting.appending -= 1;
        waiting.kept += u64::from(self.kept);
        drop(waiting);
        if !self.kept {
            self.outbox.remove(self.spool, self.count, self.bytes);
        }
    }
}

fn size(event: &Event) -> u64 {
    event.size() as u64
}

#[cfg(test)]
mod tests;
