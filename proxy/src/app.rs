//! The composition root: builds everything, binds every socket before serving, runs, and leaves in order.
//!
//! Threads: one for control (identity, discovery, registration, events, admin), and one for each worker, which
//! carries calls and nothing else.

mod ports;
mod probe;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use duet_api::proto;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::admin::{Access, Admin};
use crate::config::{Args, Config};
use crate::discovery;
use crate::drain::Drain;
use crate::identity::{Identity, Store, uplink};
use crate::outbound::destination;
use crate::register;
//use crate::relay;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::logging;
use crate::telemetry::metrics::CallMetrics;

use ports::Sockets;
use worker::Shared;

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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
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
    let metrics = CallMetrics::register(&registry)?;
    let access_log = AccessLog::open(&config.access_log, &registry)?;
    let drain = Drain::default();
    let args = &config.args;

    let store = Store::open(&args.state)?;
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
    let app_ready = probe::start(&config, &drain);

    let shared = Shared {
        config: Arc::clone(&config),
        svid: svid.clone(),
        discovery: discovery.clone(),
        metrics,
        access_log,
        drain: drain.clone(),
    };
    let background = &drain.background;
    background.spawn(identity.run(channel.clone(), drain.force.clone()));
    background.spawn(discovery::run(
        inputs,
        channel.clone(),
        svid.clone(),
        drain.force.clone(),
    ));
    if !config.app_ports.is_empty() {
        let registration = ports::registration(&config, &sockets)?;
        background.spawn(register::run(
            registration,
            channel.clone(),
            svid.clone(),
            app_ready.clone(),
            drain.inbound.clone(),
        ));
    }
    let admin = Admin {
        registry: registry.clone(),
        svid,
        workload: workload.clone(),
        app_ready: app_ready.clone(),
        discovery,
        drain: drain.inbound.clone(),
        instance: config.instance.as_str().into(),
    };
    let (metrics_listener, admin_listener) = (sockets.metrics()?, sockets.admin()?);
    background.spawn(
        admin
            .clone()
            .serve(metrics_listener, Access::Public, drain.force.clone()),
    );
    background.spawn(admin.serve(admin_listener, Access::Operator, drain.force.clone()));

    //start_relay(&shared, &sockets, (workload, channel, app_ready.clone()), &registry).await?;
    let workers = worker::start(&shared, sockets.workers)?;
    ports::announce(&config, &sockets.ports)?;
    leave(&config, &drain, app_ready).await?;
    worker::join(workers).await;
    Ok(())
}

fn build_info(registry: &Registry) -> anyhow::Result<()> {
    let info = IntGaugeVec::new(
        Opts::new("duet_build_info", "Version of the software."),
        &["version"],
    )?;
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
    mut app_ready: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
        () = drain.inbound.cancelled() => {}
    }
    tracing::info!("draining: peers' calls and subscriptions end, the application's own go on");
    drain.inbound.cancel();
    drain.inbound_tasks.close();
    let phases = async {
        drain.inbound_tasks.wait().await;
        if config.app_ports.is_empty() {
            drain.outbound_tasks.close();
        } else {
            // Ends with an error when the probe has, at shutdown.
            app_ready
                .wait_for(|accepts| !*accepts)
                .await
                .map(|_gone| ())
                .ok();
        }
        drain.outbound.cancel();
        drain.outbound_tasks.close();
        drain.outbound_tasks.wait().await;
    };
    tokio::select! {
        () = phases => tracing::info!("drained"),
        () = tokio::time::sleep(config.args.drain_timeout) => {
            tracing::warn!("the drain timeout ran out; dropping what is left");
        }
        _ = term.recv() => tracing::warn!("second signal; dropping what is left"),
        _ = interrupt.recv() => tracing::warn!("second signal; dropping what is left"),
    }
    drain.outbound.cancel();
    drain.force.cancel();
    drain.background.close();
    // What does not end by then has nothing left that could be lost.
    tokio::time::timeout(LAST_PHASE, drain.background.wait())
        .await
        .ok();
    Ok(())
}
