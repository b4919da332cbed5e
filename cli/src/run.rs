//! `duet run`: a sidecar beside one process, in a mesh that runs already.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use duet_control_plane::token::{TokenRequest, create};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

use crate::output;
use crate::process::{GRACE, Process, Spec, describe};
use crate::up::commands::{app_env, exec_app, flags, program};
use crate::up::launch::write_private;
use crate::up::probe::ports;
use crate::up::state::{self, AppState, Replica, SidecarPorts, SidecarState};
use crate::up::supervise::backoff;

/// The sidecar's own bound on its drain, and a little.
const SIDECAR_GRACE: Duration = Duration::from_secs(35);

/// Put a sidecar beside one process.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet run --service web --port 8000 -- python3 -m http.server 8000
        joins the mesh of the `duet up` whose .duet folder is here or further up
  duet run --service web --port 8000 --mesh examples/shop/.duet -- ./web
  duet run --service web --port 8000 --control-plane 10.0.0.1:15012 --token-file web.token -- ./web

The process gets PORT, HTTP_PROXY, DAPR_HTTP_PORT, DAPR_GRPC_PORT, and more that docs/duet-yaml.md
lists; its exit code becomes that of `duet run`.")]
pub(crate) struct Args {
    /// Name of the service.
    #[arg(long)]
    service: String,
    /// Port that the process listens on; none for a pure client.
    #[arg(long)]
    port: Option<u16>,
    /// What it speaks: http, h2c or grpc [default: as callers speak].
    #[arg(long)]
    protocol: Option<String>,
    /// Namespace [default: the mesh's].
    #[arg(long)]
    namespace: Option<String>,
    /// Unique name of this replica (default: `<service>-run-<number>`).
    #[arg(long)]
    name: Option<String>,
    /// The control plane's gRPC address, host:port.
    #[arg(long, requires = "token_file")]
    control_plane: Option<String>,
    /// File with a join token for the service.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// State folder of a running `duet up` [default: .duet here or further up].
    #[arg(long, conflicts_with = "control_plane")]
    mesh: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Where to join, as what, and where to keep the sidecar's state.
struct Joining {
    control_plane: String,
    namespace: String,
    token_file: PathBuf,
    slot: Slot,
}

/// A state folder that no other `duet run` uses, and the replica's name that goes with it. It stays after the end: what
/// waits in its outbox is sent by the next `duet run` of the service.
struct Slot {
    name: String,
    folder: PathBuf,
    _lock: File,
}

impl Slot {
    fn take(base: &Path, service: &str) -> anyhow::Result<Self> {
        for number in 1..1000 {
            let name = format!("{service}-run-{number}");
            let folder = base.join(&name);
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            let lock = File::create(folder.join("lock"))?;
            if lock.try_lock().is_ok() {
                return Ok(Self { name, folder, _lock: lock });
            }
        }
        bail!("{} has no free slot", base.display())
    }
}

/// Runs until the process ends.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(LocalSet::new().run_until(beside(args)))
}

async fn beside(args: &Args) -> anyhow::Result<ExitCode> {
    let joining = joining(args)?;
    let instance = args.name.clone().unwrap_or_else(|| joining.slot.name.clone());
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    let at = SidecarPorts {
        outbound: any,
        inbound: any,
        api: any,
        grpc_api: any,
        admin: any,
        metrics: any,
    };
    let (mut sidecar, ports) = start_sidecar(args, &joining, &instance, at).await?;
    let replica = Replica {
        service: args.service.clone(),
        replica: 1,
        instance,
        app: AppState { pid: 0, port: args.port.unwrap_or(0), url: String::new(), restarts: 0 },
        sidecar: SidecarState {
            outbound: ports.outbound.to_string(),
            api: ports.api.to_string(),
            grpc_api: ports.grpc_api.to_string(),
            ..SidecarState::default()
        },
        ready: false,
    };
    output::note(&format!(
        "sidecar ready: calls through http://{}, API at http://{}, metrics at http://{}/metrics",
        ports.outbound, ports.api, ports.metrics
    ));
    let code = app(args, &joining, &replica, (&mut sidecar, ports)).await;
    sidecar.end(SIDECAR_GRACE, CancellationToken::new()).await;
    code
}

async fn app(
    args: &Args,
    joining: &Joining,
    replica: &Replica,
    (sidecar, at): (&mut Process, SidecarPorts),
) -> anyhow::Result<ExitCode> {
    let command = exec_app(args.command.clone())?;
    let env = app_env(&joining.namespace, replica);
    let spec = Spec { command, env, folder: std::env::current_dir()? };
    let mut app = Process::start_attached(&spec)?;
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let status = loop {
        tokio::select! {
            status = app.wait() => break status?,
            _ = term.recv() => app.signal(rustix::process::Signal::TERM),
            _ = interrupt.recv() => app.signal(rustix::process::Signal::INT),
            ended = sidecar.wait() => {
                output::note(&format!("the sidecar {}; starting it again", describe(ended?)));
                tokio::time::sleep(backoff(1)).await;
                match start_sidecar(args, joining, &replica.instance, at).await {
                    Ok((again, _ports)) => *sidecar = again,
                    Err(error) => {
                        app.end(GRACE, CancellationToken::new()).await;
                        return Err(error);
                    }
                }
            }
        }
    };
    // As shells have it: 128 and the signal's number.
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

async fn start_sidecar(
    args: &Args,
    joining: &Joining,
    instance: &str,
    at: SidecarPorts,
) -> anyhow::Result<(Process, SidecarPorts)> {
    let folder = &joining.slot.folder;
    let ports_file = folder.join("ports.json");
    if ports_file.exists() {
        std::fs::remove_file(&ports_file)?;
    }
    let mut command = vec![program()?, "proxy".to_owned(), "--exit-with-parent".to_owned()];
    let inbound = SocketAddr::new(inbound(&joining.control_plane), at.inbound.port());
    let settings = [
        ("--service", args.service.clone()),
        ("--namespace", joining.namespace.clone()),
        ("--instance", instance.to_owned()),
        ("--control-plane", joining.control_plane.clone()),
        ("--token-file", joining.token_file.display().to_string()),
        ("--state", folder.join("sidecar").display().to_string()),
        ("--ports-file", ports_file.display().to_string()),
        ("--outbound-listen", at.outbound.to_string()),
        ("--inbound-listen", inbound.to_string()),
        ("--api-listen", at.api.to_string()),
        ("--grpc-api-listen", at.grpc_api.to_string()),
        ("--admin-listen", at.admin.to_string()),
        ("--metrics-listen", at.metrics.to_string()),
    ];
    flags(&mut command, &settings);
    if let Some(port) = args.port {
        let protocol = args.protocol.as_ref().map(|name| format!("/{name}")).unwrap_or_default();
        flags(&mut command, &[("--app-port", format!("http={port}{protocol}"))]);
    }
    let spec = Spec { command, env: Vec::new(), folder: std::env::current_dir()? };
    let mut sidecar = Process::start_attached(&spec)?;
    let limit = Duration::from_secs(30);
    tokio::select! {
        ports = ports(&ports_file, limit) => Ok((sidecar, ports.context("the sidecar did not start")?)),
        ended = sidecar.wait() => bail!("the sidecar {}", describe(ended?)),
    }
}

/// A mesh on this machine stays on this machine.
fn inbound(control_plane: &str) -> IpAddr {
    let host = control_plane.rsplit_once(':').map_or("", |(host, _)| host);
    let local = host == "localhost" || host.starts_with("127.") || host == "[::1]";
    if local { [127, 0, 0, 1].into() } else { [0, 0, 0, 0].into() }
}

fn joining(args: &Args) -> anyhow::Result<Joining> {
    if let (Some(control_plane), Some(token_file)) = (&args.control_plane, &args.token_file) {
        let namespace = args.namespace.clone();
        return Ok(Joining {
            control_plane: control_plane.clone(),
            namespace: namespace.unwrap_or_else(|| duet_api::DEFAULT_NAMESPACE.to_owned()),
            token_file: token_file.clone(),
            slot: Slot::take(&std::env::current_dir()?.join(".duet/run"), &args.service)?,
        });
    }
    let folder = match &args.mesh {
        Some(folder) => folder.clone(),
        None => find_mesh()?,
    };
    let mesh = state::read(&folder)?;
    let slot = Slot::take(&folder.canonicalize()?.join("run"), &args.service)?;
    let namespace = args.namespace.clone().unwrap_or_else(|| mesh.namespace.clone());
    let token_file = match &args.token_file {
        Some(file) => file.clone(),
        None => {
            let request = TokenRequest {
                namespace: namespace.clone(),
                service_account: args.service.clone(),
                lifetime: Duration::from_secs(86_400),
                single_use: false,
                trust_domain: mesh.trust_domain.clone(),
            };
            let file = slot.folder.join("token");
            write_private(&file, &create(&mesh.control_plane.state, &request)?)?;
            file
        }
    };
    Ok(Joining { control_plane: mesh.control_plane.grpc, namespace, token_file, slot })
}

/// The state folder of a mesh that runs from here or from further up.
pub(crate) fn find_mesh() -> anyhow::Result<PathBuf> {
    let here = std::env::current_dir()?;
    let found = here.ancestors().map(|folder| folder.join(".duet"));
    found.into_iter().find(|folder| folder.join("state.json").exists()).context(
        "no running mesh was found from here upward; name it with --mesh STATE_FOLDER, or give \
         --control-plane and --token-file",
    )
}
