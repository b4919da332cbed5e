//! The mesh's buses, by name, each with its publisher and the outbox behind it.

use std::collections::HashMap;
use std::sync::Arc;

use duet_api::DEFAULT_BUS;
use duet_api::proto::{Bus, Workload};
use duet_events::bus::EventBus;
use duet_events::outbox::{Outbox, RelayPublisher};
use duet_events::remote::RemoteBus;
use http::StatusCode;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::problem::Problem;

/// Makes publishers and consumers of buses.
#[derive(Debug)]
pub(super) struct Buses {
    outbox: Arc<Outbox>,
    /// Kept open for as long as the buses live: its end would tell them that the process ends.
    channel: watch::Sender<Option<Channel>>,
    workload: watch::Receiver<Option<Arc<Workload>>>,
    // Guards the map only; never held across an await.
    open: Mutex<HashMap<String, OpenBus>>,
}

#[derive(Clone, Debug)]
struct OpenBus {
    bus: Arc<RemoteBus>,
    publisher: Arc<RelayPublisher>,
}

impl Buses {
    pub(super) fn new(
        outbox: Arc<Outbox>,
        channel: Channel,
        workload: watch::Receiver<Option<Arc<Workload>>>,
    ) -> Arc<Self> {
        // The channel reconnects by itself: there is one from the start, for ever.
        let channel = watch::Sender::new(Some(channel));
        Arc::new(Self { outbox, channel, workload, open: Mutex::default() })
    }

    /// Opens every bus as soon as it is known, so that what waits in the outbox from before a restart follows even
    /// if nobody publishes.
    pub(super) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut workload = self.workload.clone();
        let follow = async {
            loop {
                let names = self.names();
                for bus in &names {
                    self.open(bus);
                }
                // What waits for a bus that is gone stays in the outbox, in case that it comes back.
                self.open.lock().retain(|name, _| names.contains(name));
                if workload.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = follow => {}
            () = stop.cancelled() => {}
        }
    }

    /// Names of all buses. Before the control plane has said anything, the default one is there.
    pub(super) fn names(&self) -> Vec<String> {
        match &*self.workload.borrow() {
            Some(workload) => workload.buses.iter().map(|bus| bus.name.clone()).collect(),
            None => vec![DEFAULT_BUS.to_owned()],
        }
    }

    /// Checks that there is a bus of this name.
    ///
    /// # Errors
    /// 404 when there is none, 503 while nobody can know.
    pub(super) fn check(&self, name: &str) -> Result<(), Problem> {
        if self.knows(name) {
            return Ok(());
        }
        let shown: String = name.chars().take(64).collect();
        if self.workload.borrow().is_none() {
            // Not told yet: anything but the default bus may or may not exist.
            let text = format!("it is not known yet whether there is a bus {shown:?}");
            let status = StatusCode::SERVICE_UNAVAILABLE;
            let mut problem = Problem::new(status, "ERR_PUBSUB_NOT_READY", text);
            problem.retry_after = Some(1);
            return Err(problem);
        }
        let names = self.names().join(", ");
        let text = format!("there is no bus {shown:?}; known are: {names}");
        Err(Problem::new(StatusCode::NOT_FOUND, "ERR_PUBSUB_NOT_FOUND", text))
    }

    /// Whether there is a bus of this name, as far as [`Self::names`] knows.
    pub(super) fn knows(&self, name: &str) -> bool {
        match &*self.workload.borrow() {
            Some(workload) => declared(workload, name).is_some(),
            None => name == DEFAULT_BUS,
        }
    }

    /// A bus, for consuming.
    pub(super) fn bus(&self, name: &str) -> Arc<dyn EventBus> {
        self.open(name).bus
    }

    /// The publisher for a topic.
    ///
    /// # Errors
    /// When the bus is unknown, takes declared topics only and this is none, or policies forbid the publish.
    pub(super) fn publisher(&self, bus: &str, topic: &str) -> Result<Arc<RelayPublisher>, Problem> {
        self.check(bus)?;
        if let Some(declared) =
            self.workload.borrow().as_ref().and_then(|workload| declared(workload, bus))
        {
            if refuses(declared, topic) {
                let text = format!("bus {bus:?} takes declared topics only, and {topic:?} is none");
                return Err(Problem::new(StatusCode::NOT_FOUND, "ERR_TOPIC_NOT_FOUND", text));
            }
            if let Some(reason) = denied(declared, topic) {
                return Err(Problem::new(StatusCode::FORBIDDEN, "ERR_PUBSUB_FORBIDDEN", reason));
            }
        }
        Ok(self.open(bus).publisher)
    }

    fn open(&self, name: &str) -> OpenBus {
        let mut open = self.open.lock();
        if let Some(known) = open.get(name) {
            return known.clone();
        }
        let bus = Arc::new(RemoteBus::new(name, self.channel.subscribe()));
        let shared: Arc<dyn EventBus> = Arc::<RemoteBus>::clone(&bus);
        let new = OpenBus { bus, publisher: Arc::new(self.outbox.relay(name, shared)) };
        open.insert(name.to_owned(), new.clone());
        new
    }
}

fn declared<'w>(workload: &'w Workload, name: &str) -> Option<&'w Bus> {
    workload.buses.iter().find(|bus| bus.name == name)
}

fn refuses(bus: &Bus, topic: &str) -> bool {
    bus.declared_topics_only && !bus.topics.iter().any(|declared| declared == topic)
}

/// Why policies keep this workload from a topic.
fn denied<'b>(bus: &'b Bus, topic: &str) -> Option<&'b str> {
    let denied = bus.denied.iter().find(|denied| denied.topic == topic);
    denied.map(|denied| denied.reason.as_str())
}
