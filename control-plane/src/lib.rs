//! Duet's control plane: turns resources and registrations into what each sidecar needs, gives out identities, and
//! serves the embedded event bus. The `duet` command and the lean `duet-control-plane` binary both run it.
//!
//! # The life of a change
//!
//! Somebody saves a YAML file, or a sidecar registers its replica. A source ([`sources`]) reads it and puts it into the
//! one [`index`] through the [`store`], which says what the change touches. Every `Watch` stream ([`serve`]) whose
//! subscriptions are touched compiles them again ([`compile`], pure) and sends what is different.
//!
//! # Rooms, by rank
//!
//! A room imports only rooms of a lower rank; `tests/layering.rs` checks it.
//!
//! | rank | rooms |
//! | --- | --- |
//! | 7 | this file: flags, signals, the ports file |
//! | 6 | [`app`]: builds and runs everything |
//! | 5 | [`admin`], [`check`], [`operate`] |
//! | 4 | [`sources`], [`serve`], [`certify`], [`bus`] |
//! | 3 | [`compile`], [`store`], [`listen`], [`token`] |
//! | 2 | [`index`], [`ca`], [`config`], [`expression`] |
//! | 1 | [`telemetry`], [`revoked`] |

pub mod admin;
pub mod app;
pub mod bus;
pub mod ca;
pub mod certify;
pub mod check;
pub mod compile;
pub mod config;
pub mod expression;
pub mod index;
pub mod listen;
pub mod operate;
pub mod revoked;
pub mod serve;
pub mod sources;
pub mod store;
pub mod telemetry;
pub mod token;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

pub use config::Args;

use crate::app::ControlPlane;

/// Runs a control plane until `SIGTERM` or `SIGINT`, and takes it down in order.
///
/// # Errors
/// When it cannot start.
pub fn run(args: Args) -> anyhow::Result<()> {
    telemetry::init_log(args.log_format, &args.log_level)?;
    if args.exit_with_parent {
        exit_with_parent()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(args.workers)
        .thread_name("duet-control")
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(run_until_signal(args))
}

async fn run_until_signal(args: Args) -> anyhow::Result<()> {
    // Before anything else, so that an early signal is not lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let control_plane = Box::pin(ControlPlane::start(&args)).await?;
    if let Some(file) = &args.ports_file {
        write_ports(file, &control_plane)
            .with_context(|| format!("cannot write the ports file {}", file.display()))?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    control_plane.shutdown().await;
    Ok(())
}

/// Asks the kernel for `SIGTERM` when the parent dies, and looks whether it died before that.
fn exit_with_parent() -> anyhow::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .context("--exit-with-parent is not possible here")?;
    if parent.is_none() || rustix::process::getppid() != parent {
        bail!("the parent process is gone already");
    }
    Ok(())
}

/// Writes the ports as a whole file or not at all. Addresses that mean every interface are written as loopback, since the
/// file is for readers on this machine.
fn write_ports(file: &Path, at: &ControlPlane) -> anyhow::Result<()> {
    let reachable = |address: SocketAddr| {
        let ip = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            IpAddr::V4(_) | IpAddr::V6(_) => address.ip(),
        };
        SocketAddr::new(ip, address.port()).to_string()
    };
    let ports = serde_json::json!({
        "pid": std::process::id(),
        "grpc": reachable(at.grpc),
        "admin": reachable(at.admin),
        "operator": reachable(at.operator),
    });
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, format!("{ports}\n"))?;
    std::fs::rename(&fresh, file)?;
    Ok(())
}
