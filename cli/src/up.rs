//! `duet up`: a whole mesh on this machine, from a `duet.yaml`.
//!
//! Everything runs as a child process: the control plane, a sidecar for each replica, the replicas. What crashes is
//! started again on the same ports; Ctrl-C ends all of it in order: applications, sidecars, control plane.

pub(crate) mod commands;
pub(crate) mod config;
pub(crate) mod launch;
mod port;
pub(crate) mod probe;
pub(crate) mod state;
pub(crate) mod supervise;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use duet_api::resource::{ParseError, parse};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

use crate::output;
use crate::resources::expected;
use config::Mesh;
use launch::Launcher;
use state::{ControlPlane, Folder, State};

/// Run a mesh on this machine.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet up examples/shop
  duet up . --state /tmp/second-mesh     a second mesh beside the first
  duet up . --no-build

The format of duet.yaml is in docs/duet-yaml.md, that of state.json in docs/state.md.")]
pub(crate) struct Args {
    /// Folder with a duet.yaml, or the file itself.
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// Folder for the state: CA, bus, outboxes, logs, state.json [default: .duet beside duet.yaml].
    #[arg(long)]
    state: Option<PathBuf>,
    /// Skip the build command.
    #[arg(long)]
    no_build: bool,
    /// How long everything may take to be ready.
    #[arg(long, default_value = "60s", value_parser = duet_api::duration::parse)]
    ready_timeout: Duration,
}

/// Tells processes when to end, in the order of leaving.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop {
    pub(crate) apps: CancellationToken,
    pub(crate) sidecars: CancellationToken,
    pub(crate) control_plane: CancellationToken,
    /// A second Ctrl-C: at once.
    pub(crate) now: CancellationToken,
}

/// Runs until Ctrl-C.
pub(crate) fn up(args: Args) -> anyhow::Result<ExitCode> {
    // One thread: children are bound to the thread that started them (see `process`).
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(LocalSet::new().run_until(run(args)))
}

async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let file = match args.folder.is_dir() {
        true => args.folder.join("duet.yaml"),
        false => args.folder.clone(),
    };
    let mesh = Mesh::load(&file)?;
    let folder = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).canonicalize()?;
    let state = args.state.clone().unwrap_or_else(|| folder.join(".duet"));
    let state = Folder::open(&state, initial(&mesh, &folder))?;
    check_resources(&mesh, &folder)?;

    let mut signals = Signals::new()?;
    let stop = Stop::default();
    let launcher = Launcher::new(mesh, folder, state, stop.clone())?;
    let started = tokio::select! {
        started = start(&launcher, &args) => started.map(|()| true),
        () = signals.any() => Ok(false),
    };
    if let Ok(true) = started {
        launcher.report();
        signals.any().await;
    }
    output::note("stopping (Ctrl-C again to stop at once)");
    tokio::select! {
        () = launcher.leave() => {}
        () = signals.any() => {
            stop.now.cancel();
            launcher.leave().await;
        }
    }
    started.map(|_ready| ExitCode::SUCCESS)
}

/// The ways in which people and systems say "stop".
struct Signals {
    term: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

/// Returns when everything is ready.
async fn start(launcher: &Launcher, args: &Args) -> anyhow::Result<()> {
    if !args.no_build {
        launcher.build().await?;
    }
    let limit = args.ready_timeout;
    launcher.control_plane(limit).await?;
    launcher.sidecars(limit).await?;
    launcher.apps(limit).await
}

fn initial(mesh: &Mesh, folder: &Path) -> State {
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    State {
        version: 1,
        name: mesh.name.clone().or(name).unwrap_or_default(),
        namespace: mesh.namespace.clone(),
        trust_domain: mesh.trust_domain.clone(),
        pid: std::process::id(),
        ready: false,
        control_plane: ControlPlane::default(),
        apps: Vec::new(),
    }
}

/// A mesh is not started with files that cannot be read: the control plane would have no good state to keep. What
/// else is wrong (a reference to a service that nobody declared, …) is told, as the control plane goes on without it.
fn check_resources(mesh: &Mesh, folder: &Path) -> anyhow::Result<()> {
    let paths: Vec<PathBuf> = mesh.resources.iter().map(|path| folder.join(path)).collect();
    for path in &paths {
        if !path.exists() {
            bail!("resources: {} does not exist", path.display());
        }
    }
    let report = duet_control_plane::check::check(&paths, &expected(mesh)?);
    let unreadable = |error: &&ParseError| {
        let text = std::fs::read_to_string(&*error.file);
        text.map_or(true, |text| !parse(&error.file, &text).errors.is_empty())
    };
    let fatal: String =
        report.errors.iter().filter(unreadable).map(|error| format!("\n  {error}")).collect();
    if !fatal.is_empty() {
        bail!("the resources have errors:{fatal}");
    }
    for finding in report.errors.iter().chain(&report.warnings) {
        output::note(&format!("warning: {finding}"));
    }
    Ok(())
}
