//! The composition root: builds everything, binds every socket before serving, runs, and leaves in order.
//!
//! Threads: one for control (identity, discovery, registration, events, admin), and one for each worker, which
//! carries calls and nothing else.

mod listener;
mod ports;
mod probe;
mod worker;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use duet_api::proto;
use duet_events::outbox::Outbox;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::admin::{Access, Admin};
use crate::config::{Args, Config};
use crate::connect::{Pool, Target};
use crate::discovery;
use crate::drain::Drain;
use crate::identity::{Identity, Store, uplink};
use crate::inbound::{guard, revoked};
use crate::outbound::destination;
use crate::outbound::replica::Healths;
use crate::register;
use crate::relay;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::logging;
use crate::telemetry::metrics::CallMetrics;

use ports::Sockets;
use worker::Shared;

/// Largest body of one publish, as in Dapr.
const MAX_PUBLISH_BYTES: usize = 4 << 20;
/// All publishes together, in memory: sixteen of the largest.
const PUBLISH_BYTES: usize = 16 * MAX_PUBLISH_BYTES;
/// Bound on the last phase, once nothing is left to wait for.
const LAST_PHASE: Duration = Duration::from_secs(2);

/// Runs a sidecar until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// When the flags do not make sense, a port is taken, or the state folder cannot be used.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.exit_with_parent {
        exit_with_parent()?;
    }
    logging::init(args.log_format, &args.log_level)?;
    let config = Config::try_from(args)?;
    let sockets = Sockets::bind(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(control(Arc::new(config), sockets));
    // Blocking work that hangs (a dead disk) must not keep the process.
    runtime.shutdown_timeout(LAST_PHASE);
    outcome
}

fn exit_with_parent() -> anyhow::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    // The parent may have died before the line above.
    if rustix::process::getppid() != parent {
        anyhow::bail!("the parent process is gone");
    }
    Ok(())
}

async fn control(config: Arc<Config>, sockets: Sockets) -> anyhow::Result<()> {
    let registry = Registry::new();
    build_info(&registry)?;
    let args = &config.args;
    let drain = Drain::default();
    let store = Store::open(&args.state)?;
    let kept = revoked::Kept::load(store.clone());
    let (identity, svid) =
        Identity::load(&args.control_plane, config.token.clone(), store, &registry)?;
    let channel = uplink::channel(&args.control_plane, svid.clone())?;
    let node = proto::Node {
        services: args.service.clone(),
        namespace: args.namespace.clone(),
        instance: config.instance.clone(),
        software_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let (discovery, inputs, workload) = discovery::new(node, destination::compile, &registry)?;
    let (guard, guards) = watch::channel(Arc::default());
    drain.background.spawn(guard::follow(workload.clone(), guard, drain.force.clone()));
    let (shut_out, revoked) = watch::channel(kept.list());
    drain.background.spawn(revoked::follow(workload.clone(), shut_out, kept, drain.force.clone()));
    let shared = Shared {
        config: Arc::clone(&config),
        svid: svid.clone(),
        discovery,
        metrics: CallMetrics::register(&registry)?,
        access_log: AccessLog::open(&config.access_log, &registry)?,
        drain: drain.clone(),
        healths: Healths::default(),
        guards,
        revoked,
    };
    let known =
        Known { channel: channel.clone(), workload, app_ready: probe::start(&config, &drain) };
    let stop = || drain.force.clone();
    drain.background.spawn(identity.run(channel.clone(), stop()));
    drain.background.spawn(discovery::run(inputs, channel.clone(), svid.clone(), stop()));
    if !config.app_ports.is_empty() {
        let registration = ports::registration(&config, &sockets)?;
        let (ready, stop) = (known.app_ready.clone(), drain.inbound.clone());
        drain.background.spawn(register::run(registration, channel, svid, ready, stop));
    }
    let outbox = Arc::default();
    start_admin(&shared, &known, &sockets, (&registry, &outbox))?;
    let opened = start_relay(&shared, &known, &sockets, &registry).await?;
    outbox.get_or_init(|| opened);
    let (worker_sockets, ports) = sockets.rest();
    let workers = worker::start(&shared, worker_sockets)?;
    ports::announce(&config, &ports)?;
    leave(&config, &drain, known.app_ready).await?;
    worker::join(workers).await;
    Ok(())
}

/// What control-side parts follow.
struct Known {
    channel: Channel,
    workload: watch::Receiver<Option<Arc<proto::Workload>>>,
    app_ready: watch::Receiver<bool>,
}

fn start_admin(
    shared: &Shared,
    known: &Known,
    sockets: &Sockets,
    (registry, outbox): (&Registry, &Arc<OnceLock<Arc<Outbox>>>),
) -> anyhow::Result<()> {
    let drain = &shared.drain;
    let admin = Admin {
        registry: registry.clone(),
        svid: shared.svid.clone(),
        workload: known.workload.clone(),
        app_ready: known.app_ready.clone(),
        discovery: shared.discovery.clone(),
        drain: drain.inbound.clone(),
        instance: shared.config.instance.as_str().into(),
        refused: shared.metrics.refused.with_label_values(&["admin", "web_page"]),
        outbox: Arc::clone(outbox),
    };
    let public = admin.clone().serve(sockets.metrics()?, Access::Public, drain.force.clone());
    let operator = admin.serve(sockets.admin()?, Access::Operator, drain.force.clone());
    drain.background.spawn(public);
    drain.background.spawn(operator);
    Ok(())
}

/// The event half has connections of its own, to the application and into the mesh, on the control thread.
async fn start_relay(
    shared: &Shared,
    known: &Known,
    sockets: &Sockets,
    registry: &Registry,
) -> anyhow::Result<Arc<Outbox>> {
    let (config, connector) = (&shared.config, shared.connector());
    let app = config.app_ports.first().map(|app| {
        let address = SocketAddr::new(config.args.app_host, app.port);
        let target = Target { address, identity: None, port: app.port };
        (Pool::new(target, Arc::clone(&connector)), app.protocol)
    });
    let outbound = shared.outbound(connector);
    let invoke: relay::InvokeFn = Arc::new(move |request| {
        let outbound = Arc::clone(&outbound);
        Box::pin(async move { outbound.call(request).await })
    });
    let relay_config = relay::RelayConfig {
        namespace: config.args.namespace.clone(),
        services: config.args.service.clone(),
        instance: config.instance.clone(),
        outbox: config.args.state.join("outbox"),
        inbox: config.args.state.join("inbox"),
        max_body_bytes: MAX_PUBLISH_BYTES,
        publish_bytes: PUBLISH_BYTES,
        outbox_bytes: config.args.outbox_capacity,
    };
    let inputs = relay::RelayInputs {
        workload: known.workload.clone(),
        control_plane: known.channel.clone(),
        invoke,
        app_ready: known.app_ready.clone(),
        app,
        drain: shared.drain.clone(),
    };
    relay::start(
        relay_config,
        inputs,
        [sockets.api()?, sockets.grpc_api()?],
        (registry, &shared.metrics),
    )
    .await
}

fn build_info(registry: &Registry) -> anyhow::Result<()> {
    let info =
        IntGaugeVec::new(Opts::new("duet_build_info", "Version of the software."), &["version"])?;
    info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    registry.register(Box::new(info))?;
    let start = IntGauge::new(
        "duet_process_start_timestamp_seconds",
        "When this process started, seconds since the Unix epoch.",
    )?;
    start.set(jiff::Timestamp::now().as_second());
    registry.register(Box::new(start))?;
    Ok(())
}

/// Leaves in two phases; see [`crate::drain`]. A second signal skips to the end.
async fn leave(
    config: &Config,
    drain: &Drain,
    app_ready: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
        () = drain.inbound.cancelled() => {}
    }
    tracing::info!("draining: peers' calls and subscriptions end, the application's own go on");
    let end = tokio::select! {
        () = phases(config, drain, app_ready) => "drained",
        () = tokio::time::sleep(config.args.drain_timeout) => "drain timeout: dropping what is left",
        _ = term.recv() => "second signal: dropping what is left",
        _ = interrupt.recv() => "second signal: dropping what is left",
    };
    tracing::info!("{end}");
    drain.outbound.cancel();
    drain.force.cancel();
    drain.background.close();
    // What does not end by then has nothing left that could be lost.
    tokio::time::timeout(LAST_PHASE, drain.background.wait()).await.ok();
    Ok(())
}

async fn phases(config: &Config, drain: &Drain, mut app_ready: watch::Receiver<bool>) {
    drain.inbound.cancel();
    drain.inbound_tasks.close();
    drain.inbound_tasks.wait().await;
    if !config.app_ports.is_empty() {
        // The application has left when it does not accept any more. Fails when the probe has ended.
        app_ready.wait_for(|accepts| !*accepts).await.map(|_gone| ()).ok();
    }
    drain.outbound.cancel();
    drain.outbound_tasks.close();
    drain.outbound_tasks.wait().await;
    drain.flush.cancel();
    drain.flush_tasks.close();
    drain.flush_tasks.wait().await;
}
