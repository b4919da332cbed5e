//! The composition root: builds everything, binds every socket before anything is served, runs, and takes it down in
//! order.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use duet_api::proto::discovery_server::DiscoveryServer;
use duet_api::proto::identity_server::IdentityServer;
use duet_api::proto::workloads_server::WorkloadsServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::Router;

use crate::admin::{self, Admin, Overtime};
use crate::bus::{BusServer, BusService, Buses, Reconciler, Room};
use crate::ca::Ca;
use crate::certify::IdentityService;
use crate::config::Args;
use crate::listen::{self, ServerTls};
use crate::operate::{self, Operate};
use crate::revoked::Revoked;
use crate::serve::DiscoveryService;
use crate::sources::registry::Registry;
use crate::sources::workloads::WorkloadsService;
use crate::sources::yaml::{Watching, YamlSource};
use crate::store::Store;
use crate::telemetry::Metrics;

/// A silent connection is asked whether it lives after this, and cut when it does not answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams of one connection: a sidecar has a handful, and one for each subscription.
const MAX_STREAMS: u32 = 1024;
/// Largest header block of a request.
const MAX_HEADER_BYTES: u32 = 64 << 10;
/// Largest request for a certificate, also of a peer without one: a token and a signing request.
const MAX_IDENTITY_BYTES: usize = 64 << 10;
/// Largest registration. What a replica may say is far less; more would be elements without content, which take many
/// times as much memory as they have bytes.
const MAX_REGISTRATION_BYTES: usize = 128 << 10;
/// Largest request on a sidecar's watch: a rejection with its reason.
const MAX_WATCH_BYTES: usize = 256 << 10;
/// Bound on the orderly end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A control plane that runs.
#[derive(Debug)]
pub struct ControlPlane {
    /// Where sidecars connect.
    pub grpc: SocketAddr,
    /// Where the admin pages are.
    pub admin: SocketAddr,
    /// Where `duet events` asks.
    pub operator: SocketAddr,
    ready: Arc<AtomicBool>,
    tracker: TaskTracker,
    /// Ends sources of work: listeners and streams.
    stop: CancellationToken,
    /// Ends what must outlive the streams.
    end: CancellationToken,
    buses: Arc<Buses>,
    watching: Watching,
}

/// What the services share.
struct Parts {
    store: Arc<Store>,
    metrics: Metrics,
    tracker: TaskTracker,
    stop: CancellationToken,
    ca: Arc<Ca>,
    buses: Arc<Buses>,
    registry: Arc<Registry>,
}

impl ControlPlane {
    /// Starts everything. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When a port is taken or the state folder cannot be used. Errors in the resources are logged and are none here.
    pub async fn start(args: &Args) -> anyhow::Result<Self> {
        let registry = prometheus::Registry::new();
        let grpc = bind(args.listen).await?;
        let admin_listener = bind(args.admin_listen).await?;
        let operator_listener = operate::bind(args.operator_listen, args.operator_anywhere).await?;
        let operator = operator_listener.local_addr()?;
        let addresses = (grpc.local_addr()?, admin_listener.local_addr()?);
        let (parts, source) = Parts::open(args, &registry).await?;
        let end = CancellationToken::new();
        let ready = Arc::new(AtomicBool::new(false));
        let (buses, store) = (Arc::clone(&parts.buses), Arc::clone(&parts.store));
        let operate = Operate::new(Arc::<Buses>::clone(&buses), !args.operator_anywhere);
        let reconciler = Reconciler::start(buses, store).await;
        parts.serve_grpc(args, grpc)?;
        let (page, tracker) = (Admin { registry, ready: Arc::clone(&ready) }, &parts.tracker);
        tracker.spawn(admin::serve(admin_listener, page, tracker.clone(), end.clone()));
        let pages = (operate.router(), Overtime::Finish);
        tracker.spawn(admin::serve_router(operator_listener, pages, tracker.clone(), end.clone()));
        let (registrations, until) = (Arc::clone(&parts.registry), end.clone());
        tracker.spawn(async move { registrations.run(until).await });
        tracker.spawn(reconciler.run(parts.stop.clone()));
        let watching = source.watch().context("cannot start the configuration thread")?;
        ready.store(true, Ordering::Release);
        let (grpc, admin) = addresses;
        let (trust_domain, ca) = (&args.trust_domain, parts.ca.fingerprint());
        tracing::info!(%grpc, %admin, %operator, trust_domain, ca, "control plane ready");
        let Parts { tracker, stop, buses, .. } = parts;
        Ok(Self { grpc, admin, operator, ready, tracker, stop, end, buses, watching })
    }

    /// Ends everything in order: no new work, streams told, registrations and events on disk, then the rest.
    pub async fn shutdown(self) {
        tracing::info!("stopping");
        self.ready.store(false, Ordering::Release);
        self.stop.cancel();
        // Joins its thread.
        if tokio::task::spawn_blocking(move || drop(self.watching)).await.is_err() {
            tracing::error!("the configuration thread could not be joined");
        }
        self.end.cancel();
        self.tracker.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.tracker.wait()).await.is_err() {
            tracing::warn!("connections were still open after 5 s");
        }
        self.buses.close().await;
        tracing::info!("stopped");
    }
}

impl Parts {
    /// Opens what is on disk: the CA, the registrations, the resources, the buses.
    async fn open(
        args: &Args,
        registry: &prometheus::Registry,
    ) -> anyhow::Result<(Self, YamlSource)> {
        let metrics = Metrics::register(registry)?;
        let ca = Arc::new(Ca::open_or_create(&args.state, &args.trust_domain)?);
        let store = Arc::new(Store::new(args.require_reference_grants));
        let file = args.state.join("registrations.json");
        let shared = Arc::clone(&store);
        let registrations = Registry::new(file, args.lease, shared, metrics.clone());
        // Before the resources, whose references they make good.
        registrations.restore();
        let source = YamlSource::load(args.config.clone(), Arc::clone(&store), metrics.clone());
        let bus_dir = args.state.join("bus");
        let shared = Arc::clone(&store);
        let buses = Buses::open(bus_dir, registry.clone(), &metrics, shared).await?;
        let parts = Self {
            store,
            metrics,
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
            ca,
            buses: Arc::new(buses),
            registry: Arc::new(registrations),
        };
        Ok((parts, source))
    }

    fn serve_grpc(&self, args: &Args, listener: TcpListener) -> anyhow::Result<()> {
        let (material, lifetime) = self.ca.control_plane_material()?;
        let tls = Arc::new(ServerTls::new(&material)?);
        let (ca, renewed, stop) = (Arc::clone(&self.ca), Arc::clone(&tls), self.stop.clone());
        self.tracker.spawn(async move {
            tokio::select! {
                () = renew(&ca, &renewed, lifetime) => {}
                () = stop.cancelled() => {}
            }
        });
        let revoked = Revoked::read(&args.state)?;
        let (follow, stop) = (revoked.clone().follow(), self.stop.clone());
        self.tracker.spawn(async move {
            tokio::select! {
                () = follow => {}
                () = stop.cancelled() => {}
            }
        });
        let (metrics, tracker, stop) = (&self.metrics, &self.tracker, self.stop.clone());
        let connections = listen::accept(listener, tls, revoked.clone(), metrics, tracker, stop);
        let router = self.router(&args.state, revoked);
        let stop = self.stop.clone();
        self.tracker.spawn(async move {
            let incoming = ReceiverStream::new(connections);
            let served =
                router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await;
            if let Err(error) = served {
                tracing::error!("the gRPC server ended: {:#}", anyhow::Error::from(error));
            }
        });
        Ok(())
    }

    fn router(&self, state: &Path, revoked: Revoked) -> Router {
        let discovery = DiscoveryService {
            store: Arc::clone(&self.store),
            revoked,
            metrics: self.metrics.clone(),
            tracker: self.tracker.clone(),
            stop: self.stop.clone(),
        };
        let workloads = WorkloadsService::new(
            Arc::clone(&self.registry),
            Arc::clone(&self.store),
            self.metrics.clone(),
            self.tracker.clone(),
            self.stop.clone(),
        );
        let identity = IdentityService {
            ca: Arc::clone(&self.ca),
            state: state.to_owned(),
            metrics: self.metrics.clone(),
        };
        let bus = BusService {
            buses: Arc::clone(&self.buses),
            store: Arc::clone(&self.store),
            metrics: self.metrics.clone(),
            tracker: self.tracker.clone(),
            stop: self.stop.clone(),
            room: Room::default(),
        };
        Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .add_service(DiscoveryServer::new(discovery).max_decoding_message_size(MAX_WATCH_BYTES))
            .add_service(
                WorkloadsServer::new(workloads).max_decoding_message_size(MAX_REGISTRATION_BYTES),
            )
            .add_service(
                IdentityServer::new(identity).max_decoding_message_size(MAX_IDENTITY_BYTES),
            )
            .add_service(BusServer::new(bus))
    }
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Renews the control plane's own certificate at half its life; after a failure every minute.
async fn renew(ca: &Ca, tls: &ServerTls, mut lifetime: Duration) {
    loop {
        tokio::time::sleep((lifetime / 2).max(Duration::from_secs(60))).await;
        let renewed = ca.control_plane_material().and_then(|(material, lifetime)| {
            tls.replace(&material)?;
            Ok(lifetime)
        });
        match renewed {
            Ok(next) => {
                tracing::info!("the control plane's certificate was renewed");
                lifetime = next;
            }
            Err(error) => {
                tracing::error!("the control plane's certificate could not be renewed: {error:#}");
                lifetime = Duration::ZERO;
            }
        }
    }
}
