//! `duet.v1.EventBus`: the event buses of the mesh, served to sidecars. An embedded one is a folder below `bus/` of the
//! state folder; one on a NATS cluster is reached from here, and from nowhere else. Declared topics and subscriptions
//! are kept on them as the resources say. Imports [`crate::compile`], [`crate::store`] and below, and `duet_events`.

mod backup;
mod consume;
mod gate;
mod in_flight;
mod migrate;
pub mod monitor;
mod open;
mod publish;
mod receive;
mod reconcile;
mod selection;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use duet_api::proto::event_bus_server::EventBus;
use duet_api::resource::BusBackend;
use duet_api::{DEFAULT_BUS, proto};
use duet_events::bus::{ManagedBus, PublishError, PublishErrorKind};
use duet_events::log::LogError;
use duet_events::sparse::Sparse;
use parking_lot::RwLock;
use prometheus::IntGaugeVec;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::compile;
use crate::listen;
use crate::store::Store;
use crate::telemetry::Metrics;

pub use backup::Copied;
use gate::Gate;
use migrate::Moves;
pub use migrate::{Migration, Moved};
use open::NotMoved;
pub use receive::{BusServer, Room};
pub use reconcile::Reconciler;

const SERVICE: &str = "bus";

/// Where a bus is, once it is open. Locked while it opens, so that it opens once, and no other waits for it.
type Place = Arc<Mutex<Option<Arc<dyn ManagedBus>>>>;

/// Every bus that is open.
#[derive(Debug)]
pub struct Buses {
    dir: PathBuf,
    registry: prometheus::Registry,
    is_open: IntGaugeVec,
    store: Arc<Store>,
    open: RwLock<BTreeMap<String, Place>>,
    /// Topics of each bus that have a declared subscription which the bus does not know yet.
    held_back: RwLock<BTreeMap<String, BTreeSet<String>>>,
    /// What each open bus is kept on, and the number of its opening.
    backends: RwLock<BTreeMap<String, (BusBackend, u64)>>,
    openings: AtomicU64,
    /// Buses that are another one now, on which not every subscription was made yet.
    moving: RwLock<BTreeSet<String>>,
    /// Those that a resource has on something else by now, and why they are not there.
    not_moved: RwLock<BTreeMap<String, NotMoved>>,
    /// Buses that were embedded before.
    moves: Moves,
    /// Lines on publishes that a bus cannot take: applications cause as many as they like, and the log is often on the disk
    /// that is full.
    refusals: Sparse,
}

/// Why a bus cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// Nobody declared it.
    #[error("there is no bus {0:?}")]
    Unknown(String),
    /// Its folder cannot be used.
    #[error("bus {name:?} cannot be opened")]
    Open {
        /// Its name.
        name: String,
        /// What is wrong.
        source: LogError,
    },
    /// Its settings cannot be used.
    #[error("bus {name:?}: spec.backend.nats.{reason}")]
    Nats {
        /// Its name.
        name: String,
        /// The field, and what is wrong with it.
        reason: String,
    },
}

impl Buses {
    /// Opens the default bus; others open when they are declared or used.
    ///
    /// # Errors
    /// When another control plane uses the state folder, or the bus has settings that cannot be used. One that cannot be
    /// opened is tried again.
    pub async fn open(
        dir: PathBuf,
        registry: prometheus::Registry,
        metrics: &Metrics,
        store: Arc<Store>,
    ) -> Result<Self, BusError> {
        let (open, held_back) = (RwLock::default(), RwLock::default());
        let (backends, not_moved) = (RwLock::default(), RwLock::default());
        let (moving, moves) = (RwLock::default(), Moves::default());
        let openings = AtomicU64::default();
        let is_open = metrics.open_buses.clone();
        backup::clean(&dir);
        let buses = Self {
            dir,
            registry,
            is_open,
            store,
            open,
            held_back,
            backends,
            openings,
            moving,
            not_moved,
            moves,
            refusals: Sparse::default(),
        };
        match buses.get(DEFAULT_BUS).await {
            Err(BusError::Open { name, source }) if source != LogError::InUse => {
                // Calls need certificates and addresses, and no events.
                tracing::error!(bus = name, error = %source, "cannot be opened; going on without it");
            }
            opened => drop(opened?),
        }
        Ok(buses)
    }

    /// The bus of a name, opened if need be.
    ///
    /// # Errors
    /// When nobody declared it, or it cannot be used.
    pub async fn get(&self, name: &str) -> Result<Arc<dyn ManagedBus>, BusError> {
        if !self.store.read(|view| compile::knows_bus(view.index, name)) {
            return Err(BusError::Unknown(name.chars().take(255).collect()));
        }
        let place = self.place(name);
        let mut place = place.lock().await;
        if let Some(bus) = &*place {
            return Ok(Arc::clone(bus));
        }
        let made = Box::pin(self.make(name)).await;
        self.is_open.with_label_values(&[name]).set(i64::from(made.is_ok()));
        let bus = made?;
        *place = Some(Arc::clone(&bus));
        tracing::info!(bus = name, "bus opened");
        Ok(bus)
    }

    fn place(&self, name: &str) -> Place {
        if let Some(place) = self.open.read().get(name) {
            return Arc::clone(place);
        }
        Arc::clone(self.open.write().entry(name.to_owned()).or_default())
    }

    /// Names of all buses that are declared, and the default one.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.store.read(|view| compile::bus_names(view.index))
    }

    /// Why a publish to the topic has to wait: a declared subscription would miss it, or it would overtake others.
    #[must_use]
    pub fn holds_back(&self, bus: &str, topic: &str) -> Option<&'static str> {
        if self.moves.waits(bus) {
            return Some(
                "the bus moved, and its older events did not yet: `duet events migrate` moves them",
            );
        }
        if self.moving.read().contains(bus) {
            return Some("the bus is moving");
        }
        let misses = self.held_back.read().get(bus).is_some_and(|topics| topics.contains(topic));
        misses.then_some("a declared subscription of the topic cannot be made yet")
    }

    /// Checks that publishes to a topic are taken, whoever publishes.
    ///
    /// # Errors
    /// When the bus takes declared topics only and this is none, or when the publish has to wait.
    pub fn takes(&self, bus: &str, topic: &str) -> Result<(), PublishError> {
        self.store
            .read(|view| compile::takes_topic(view.index, bus, topic))
            .map_err(|why| PublishError::new(PublishErrorKind::UnknownTopic, why))?;
        match self.holds_back(bus, topic) {
            Some(why) => Err(PublishError::new(PublishErrorKind::Unavailable, why.to_owned())),
            None => Ok(()),
        }
    }

    /// Whether a resource declares a subscription.
    #[must_use]
    pub fn declares(&self, bus: &str, subscription: &str) -> bool {
        self.store.read(|view| compile::declares_subscription(view.index, bus, subscription))
    }

    /// Takes note of what declared subscriptions would miss; and of buses that moved, only those are not ready that are
    /// named.
    fn hold_back(&self, topics: BTreeMap<String, BTreeSet<String>>, unknown: &BTreeSet<String>) {
        *self.held_back.write() = topics;
        self.moving.write().retain(|bus| unknown.contains(bus));
    }

    /// Flushes and closes every bus.
    pub async fn close(&self) {
        let places: Vec<Place> = self.open.read().values().map(Arc::clone).collect();
        for place in places {
            if let Some(bus) = &*place.lock().await {
                bus.close().await;
            }
        }
        self.moves.close().await;
    }
}

/// The service.
#[derive(Debug)]
pub struct BusService {
    /// The buses.
    pub buses: Arc<Buses>,
    /// Who may consume what.
    pub store: Arc<Store>,
    /// Counts refusals.
    pub metrics: Metrics,
    /// Runs the streams.
    pub tracker: TaskTracker,
    /// Ends the streams.
    pub stop: CancellationToken,
    /// Memory for what is published.
    pub room: Room,
}

#[tonic::async_trait]
impl EventBus for BusService {
    type PublishStream = ReceiverStream<Result<proto::PublishResponse, Status>>;
    type ConsumeStream = ReceiverStream<Result<proto::ConsumeResponse, Status>>;

    async fn publish(
        &self,
        request: Request<Streaming<proto::PublishRequest>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        let who = listen::identity(&request, SERVICE, &self.metrics)?;
        let (answers, stream) = mpsc::channel(publish::MAX_OPEN);
        let publisher = publish::Publisher {
            gate: Gate { who, store: Arc::clone(&self.store), metrics: self.metrics.clone() },
            buses: Arc::clone(&self.buses),
            room: self.room.clone(),
            admitted: request.extensions().get().cloned().unwrap_or_default(),
        };
        self.tracker.spawn(publish::run(
            publisher,
            request.into_inner(),
            answers,
            self.stop.clone(),
        ));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn consume(
        &self,
        request: Request<Streaming<proto::ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let who = listen::identity(&request, SERVICE, &self.metrics)?;
        let peer = listen::Peer::of(&request);
        let room = peer.map(|peer| Arc::clone(&peer.events)).unwrap_or_else(listen::event_room);
        let (deliveries, stream) = mpsc::channel(consume::QUEUE);
        let session = consume::Session {
            gate: Gate { who, store: Arc::clone(&self.store), metrics: self.metrics.clone() },
            buses: Arc::clone(&self.buses),
            deliveries,
            room,
        };
        self.tracker.spawn(session.run(request.into_inner(), self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
