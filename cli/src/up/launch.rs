//! Starts the parts of a mesh, in order, and knows how each is started.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use duet_control_plane::token::{TokenRequest, create};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;

use super::config::{App, Mesh, expand};
use super::state::{
    AppState, ControlPlanePorts, Folder, Replica, SidecarPorts, SidecarState, State,
};
use super::supervise::{self, Event};
use super::{Stop, fixed_port};
use crate::output;
use crate::process::{Log, Process, Spec};

const POLL: Duration = Duration::from_millis(50);

/// A mesh being started and stopped.
#[derive(Debug)]
pub(crate) struct Launcher {
    mesh: Rc<Mesh>,
    folder: PathBuf,
    state: Rc<Folder>,
    stop: Stop,
    logs: RefCell<Vec<(String, Rc<Log>)>>,
    width: usize,
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct Tasks {
    apps: TaskTracker,
    sidecars: TaskTracker,
    control_plane: TaskTracker,
}

impl Launcher {
    /// Picks a port for every replica, so that a port that is taken is known before anything starts.
    pub(crate) fn new(
        mesh: Mesh,
        folder: PathBuf,
        state: Folder,
        stop: Stop,
    ) -> anyhow::Result<Self> {
        let mut given = Vec::new();
        let mut replicas = Vec::new();
        for (service, app) in &mesh.apps {
            for replica in 1..=app.replicas {
                let port = fixed_port(service, app.port, &mut given)?;
                replicas.push(Replica {
                    service: service.clone(),
                    replica,
                    instance: format!("{service}-{replica}"),
                    app: AppState {
                        pid: 0,
                        port,
                        url: format!("http://127.0.0.1:{port}"),
                        restarts: 0,
                    },
                    sidecar: SidecarState::default(),
                    ready: false,
                });
            }
        }
        let longest = replicas
            .iter()
            .map(|replica| replica.instance.len() + 5)
            .max();
        state.update(|state| state.apps = replicas)?;
        Ok(Self {
            mesh: Rc::new(mesh),
            folder,
            state: Rc::new(state),
            stop,
            logs: RefCell::default(),
            width: longest.unwrap_or_default().max("control-plane".len()),
            tasks: Tasks::default(),
        })
    }

    /// Runs the build command.
    pub(crate) async fn build(&self) -> anyhow::Result<()> {
        let Some(build) = &self.mesh.build else {
            return Ok(());
        };
        output::note(&format!("building: {build}"));
        let command = vec!["sh".to_owned(), "-c".to_owned(), build.clone()];
        let spec = Spec {
            command,
            env: Vec::new(),
            folder: self.folder.clone(),
        };
        let mut process = Process::start_attached(&spec)?;
        let status = process.wait().await?;
        if !status.success() {
            bail!("the build command failed: {build}");
        }
        Ok(())
    }

    /// Starts the control plane and waits until it is ready.
    pub(crate) async fn control_plane(&self, limit: Duration) -> anyhow::Result<()> {
        let (own, ports_file) = (
            self.state.join("control-plane"),
            self.ports_file("control-plane")?,
        );
        let mut command = vec![
            program()?,
            "control-plane".to_owned(),
            "--exit-with-parent".to_owned(),
        ];
        for path in &self.mesh.resources {
            command.extend([
                "--config".to_owned(),
                self.folder.join(path).display().to_string(),
            ]);
        }
        flags(
            &mut command,
            &[
                ("--state", own.display().to_string()),
                ("--trust-domain", self.mesh.trust_domain.clone()),
                ("--ports-file", ports_file.display().to_string()),
                ("--log-format", "text".to_owned()),
            ],
        );
        let log = self.log("control-plane")?;
        let state = Rc::clone(&self.state);
        let told = move |event| {
            record(&state, |state| match event {
                Event::Started(pid) => state.control_plane.pid = pid,
                Event::Crashed => state.control_plane.restarts += 1,
            });
        };
        let (folder, state) = (self.folder.clone(), Rc::clone(&self.state));
        let spec = move || {
            let known = state.state().control_plane;
            let mut command = command.clone();
            let admin = known
                .admin_url
                .strip_prefix("http://")
                .unwrap_or("127.0.0.1:0");
            let grpc = if known.grpc.is_empty() {
                "127.0.0.1:0"
            } else {
                &known.grpc
            };
            flags(
                &mut command,
                &[
                    ("--listen", grpc.to_owned()),
                    ("--admin-listen", admin.to_owned()),
                ],
            );
            Spec {
                command,
                env: Vec::new(),
                folder: folder.clone(),
            }
        };
        let end = (self.stop.control_plane.clone(), self.stop.clone());
        let run = supervise::run("control-plane".to_owned(), spec, Rc::clone(&log), end, told);
        self.tasks.control_plane.spawn_local(run);
        let what = "the control plane";
        let ports: ControlPlanePorts = ports(&ports_file, limit)
            .await
            .with_context(|| failed(what, &log))?;
        let url = format!("http://{}", ports.admin);
        self.state.update(|state| {
            state.control_plane.grpc = ports.grpc.to_string();
            state.control_plane.metrics_url = format!("{url}/metrics");
            state.control_plane.admin_url = url;
            state.control_plane.state = own;
        })?;
        let address = ports.admin.to_string();
        within(limit, || answers(&address, "/ready"))
            .await
            .with_context(|| failed(what, &log))
    }

    /// Starts all sidecars and waits until each has bound its ports.
    pub(crate) async fn sidecars(&self, limit: Duration) -> anyhow::Result<()> {
        let tokens = self.tokens()?;
        let mut started: Vec<(usize, PathBuf, Rc<Log>)> = Vec::new();
        for (index, replica) in self.state.state().apps.iter().enumerate() {
            let ports_file = self.ports_file(&replica.instance)?;
            let log = self.log(&format!("{} duet", replica.instance))?;
            let token = tokens.join(&replica.service);
            self.start_sidecar(index, replica, (&ports_file, &token), &log)?;
            started.push((index, ports_file, log));
        }
        for (index, ports_file, log) in started {
            let ports: SidecarPorts = ports(&ports_file, limit)
                .await
                .with_context(|| failed("a sidecar", &log))?;
            self.state.update(|state| {
                if let Some(replica) = state.apps.get_mut(index) {
                    replica.sidecar.outbound = ports.outbound.to_string();
                    replica.sidecar.inbound = ports.inbound.to_string();
                    replica.sidecar.api = ports.api.to_string();
                    replica.sidecar.admin = ports.admin.to_string();
                    replica.sidecar.metrics = ports.metrics.to_string();
                }
            })?;
        }
        Ok(())
    }

    /// A reusable token for each service, in a file of its own.
    fn tokens(&self) -> anyhow::Result<PathBuf> {
        let folder = self.state.join("tokens");
        for service in self.mesh.apps.keys() {
            let request = TokenRequest {
                namespace: self.mesh.namespace.clone(),
                service_account: service.clone(),
                lifetime: Duration::from_secs(30 * 86_400),
                single_use: false,
                trust_domain: self.mesh.trust_domain.clone(),
            };
            let token = create(&self.state.join("control-plane"), &request)?;
            write_private(&folder.join(service), &token)?;
        }
        Ok(folder)
    }

    fn start_sidecar(
        &self,
        index: usize,
        replica: &Replica,
        (ports_file, token): (&Path, &Path),
        log: &Rc<Log>,
    ) -> anyhow::Result<()> {
        let app = self
            .mesh
            .apps
            .get(&replica.service)
            .context("no such app")?;
        let protocol = app
            .protocol
            .as_ref()
            .map(|name| format!("/{name}"))
            .unwrap_or_default();
        let own = self.state.join("sidecars").join(&replica.instance);
        let mut command = vec![
            program()?,
            "proxy".to_owned(),
            "--exit-with-parent".to_owned(),
        ];
        flags(
            &mut command,
            &[
                ("--service", replica.service.clone()),
                ("--namespace", self.mesh.namespace.clone()),
                ("--instance", replica.instance.clone()),
                ("--control-plane", self.state.state().control_plane.grpc),
                ("--token-file", token.display().to_string()),
                ("--state", own.display().to_string()),
                ("--app-port", format!("http={}{protocol}", replica.app.port)),
                ("--advertise", "127.0.0.1".to_owned()),
                ("--ports-file", ports_file.display().to_string()),
                (
                    "--workers",
                    app.sidecar
                        .workers
                        .clone()
                        .unwrap_or_else(|| "1".to_owned()),
                ),
                (
                    "--access-log",
                    app.sidecar
                        .access_log
                        .clone()
                        .unwrap_or_else(|| "off".to_owned()),
                ),
                ("--log-format", "text".to_owned()),
            ],
        );
        let (state, folder) = (Rc::clone(&self.state), self.folder.clone());
        let spec = move || {
            let known = state
                .state()
                .apps
                .get(index)
                .map(|replica| replica.sidecar.clone());
            let known = known.unwrap_or_default();
            let at = |address: &String| match address.as_str() {
                "" => "127.0.0.1:0".to_owned(),
                address => address.to_owned(),
            };
            let mut command = command.clone();
            flags(
                &mut command,
                &[
                    ("--outbound-listen", at(&known.outbound)),
                    ("--inbound-listen", at(&known.inbound)),
                    ("--api-listen", at(&known.api)),
                    ("--admin-listen", at(&known.admin)),
                    ("--metrics-listen", at(&known.metrics)),
                ],
            );
            Spec {
                command,
                env: Vec::new(),
                folder: folder.clone(),
            }
        };
        let state = Rc::clone(&self.state);
        let told = move |event| {
            record(&state, |state| {
                let Some(replica) = state.apps.get_mut(index) else {
                    return;
                };
                match event {
                    Event::Started(pid) => replica.sidecar.pid = pid,
                    Event::Crashed => replica.sidecar.restarts += 1,
                }
            });
        };
        let end = (self.stop.sidecars.clone(), self.stop.clone());
        let name = format!("the sidecar of {}", replica.instance);
        self.tasks
            .sidecars
            .spawn_local(supervise::run(name, spec, Rc::clone(log), end, told));
        Ok(())
    }

    /// Starts the services, each when those that it depends on are ready.
    pub(crate) async fn apps(&self, limit: Duration) -> anyhow::Result<()> {
        for group in self.mesh.order()? {
            let mut waiting = Vec::new();
            for (index, replica) in self.state.state().apps.iter().enumerate() {
                if !group.contains(&replica.service.as_str()) {
                    continue;
                }
                let app = self
                    .mesh
                    .apps
                    .get(&replica.service)
                    .context("no such app")?;
                let log = self.log(&replica.instance)?;
                self.start_app(index, replica, app, &log)?;
                waiting.push((index, replica.clone(), app, log));
            }
            for (index, replica, app, log) in waiting {
                let ready = within(limit, || ready(&replica, app)).await;
                ready.with_context(|| failed(&replica.instance, &log))?;
                self.state.update(|state| {
                    if let Some(replica) = state.apps.get_mut(index) {
                        replica.ready = true;
                    }
                })?;
            }
        }
        self.state.update(|state| state.ready = true)
    }

    fn start_app(
        &self,
        index: usize,
        replica: &Replica,
        app: &App,
        log: &Rc<Log>,
    ) -> anyhow::Result<()> {
        let mut command = vec![program()?, "exec-app".to_owned(), "--parent".to_owned()];
        command.extend([std::process::id().to_string(), "--".to_owned()]);
        command.extend(app.command.arguments());
        let mut env = app_env(&self.mesh.namespace, replica);
        env.push((
            "DUET_STATE".to_owned(),
            self.state.path().display().to_string(),
        ));
        let given = env.clone();
        let lookup = |name: &str| {
            let own = given
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.clone());
            own.or_else(|| std::env::var(name).ok())
        };
        env.extend(
            app.env
                .iter()
                .map(|(key, value)| (key.clone(), expand(value, lookup))),
        );
        let spec = Spec {
            command,
            env,
            folder: self.folder.clone(),
        };
        let state = Rc::clone(&self.state);
        let told = move |event| {
            record(&state, |state| {
                let Some(replica) = state.apps.get_mut(index) else {
                    return;
                };
                match event {
                    Event::Started(pid) => replica.app.pid = pid,
                    Event::Crashed => replica.app.restarts += 1,
                }
            });
        };
        let end = (self.stop.apps.clone(), self.stop.clone());
        let run = supervise::run(
            replica.instance.clone(),
            move || spec.clone(),
            Rc::clone(log),
            end,
            told,
        );
        self.tasks.apps.spawn_local(run);
        Ok(())
    }

    fn log(&self, name: &str) -> anyhow::Result<Rc<Log>> {
        let file = self
            .state
            .join("logs")
            .join(format!("{}.log", name.replace(' ', "-")));
        let mut logs = self.logs.borrow_mut();
        let log = Log::open(name, (logs.len(), self.width), Some(&file))?;
        logs.push((name.to_owned(), Rc::clone(&log)));
        Ok(log)
    }

    /// Where a process will write its ports; gone until it does.
    fn ports_file(&self, name: &str) -> anyhow::Result<PathBuf> {
        let file = self.state.join("ports").join(format!("{name}.json"));
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(file),
        }
    }

    /// Ends everything, in order.
    pub(crate) async fn leave(&self) {
        let tiers = [
            (&self.stop.apps, &self.tasks.apps),
            (&self.stop.sidecars, &self.tasks.sidecars),
            (&self.stop.control_plane, &self.tasks.control_plane),
        ];
        for (stop, tasks) in tiers {
            stop.cancel();
            tasks.close();
            tasks.wait().await;
        }
    }

    /// What runs where, for people.
    pub(crate) fn report(&self) {
        let state = self.state.state();
        output::line(&format!("\n{} is ready.\n", state.name));
        for replica in &state.apps {
            let (name, url) = (&replica.instance, &replica.app.url);
            output::line(&format!(
                "  {name:18} {url:26} sidecar http://{}/metrics",
                replica.sidecar.metrics
            ));
        }
        output::line(&format!(
            "  {:18} {}",
            "control plane", state.control_plane.metrics_url
        ));
        output::line(&format!(
            "\n  All ports and process ids: {}",
            self.state.join("state.json").display()
        ));
        output::line(&format!("  Logs: {}", self.state.join("logs").display()));
        output::line("  Press Ctrl-C to stop.\n");
    }
}

/// Writing `state.json` must not stop the mesh: a full disk is reported, and the next change tries again.
fn record(state: &Folder, change: impl FnOnce(&mut State)) {
    if let Err(error) = state.update(change) {
        output::note(&format!("state.json: {error:#}"));
    }
}

/// What an application is told of its sidecar.
pub(crate) fn app_env(namespace: &str, replica: &Replica) -> Vec<(String, String)> {
    let proxy = format!("http://{}", replica.sidecar.outbound);
    let local = "localhost,127.0.0.1,::1";
    let (host, api) = replica
        .sidecar
        .api
        .rsplit_once(':')
        .unwrap_or(("127.0.0.1", "3500"));
    let pairs = [
        ("PORT", replica.app.port.to_string()),
        ("HTTP_PROXY", proxy.clone()),
        ("http_proxy", proxy),
        ("NO_PROXY", local.to_owned()),
        ("no_proxy", local.to_owned()),
        ("DAPR_HTTP_PORT", api.to_owned()),
        ("DAPR_HTTP_ENDPOINT", format!("http://{host}:{api}")),
        ("DUET_OUTBOUND", replica.sidecar.outbound.clone()),
        ("DUET_SERVICE", replica.service.clone()),
        ("DUET_NAMESPACE", namespace.to_owned()),
        ("DUET_REPLICA", replica.replica.to_string()),
    ];
    pairs
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// This program.
pub(crate) fn program() -> anyhow::Result<String> {
    let path = std::env::current_exe().context("finding this program")?;
    Ok(path.display().to_string())
}

pub(crate) fn flags(command: &mut Vec<String>, flags: &[(&str, String)]) {
    for (flag, value) in flags {
        command.extend([(*flag).to_owned(), value.clone()]);
    }
}

/// Writes a file that only its owner can read.
pub(crate) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::OpenOptions::new();
    let file = options
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| path.display().to_string())
}

fn failed(what: &str, log: &Log) -> String {
    format!(
        "{what} did not become ready; its last lines:{}\n",
        log.tail()
    )
}

/// The ports file of a process, once it is there.
pub(crate) async fn ports<T: DeserializeOwned>(file: &Path, limit: Duration) -> anyhow::Result<T> {
    within(limit, || async { file.exists() }).await?;
    let text = std::fs::read(file)?;
    serde_json::from_slice(&text).with_context(|| file.display().to_string())
}

/// Asks again and again until the answer is yes.
pub(crate) async fn within<F: Future<Output = bool>>(
    limit: Duration,
    ask: impl Fn() -> F,
) -> anyhow::Result<()> {
    let asking = async {
        while !ask().await {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(limit, asking)
        .await
        .with_context(|| format!("waited {limit:?}"))
}

async fn ready(replica: &Replica, app: &App) -> bool {
    let address = format!("127.0.0.1:{}", replica.app.port);
    let own = match &app.readiness {
        Some(path) => answers(&address, path).await,
        None => TcpStream::connect(&address).await.is_ok(),
    };
    own && answers(&replica.sidecar.metrics, "/ready").await
}

/// Whether a `GET` is answered with 2xx.
pub(crate) async fn answers(address: &str, path: &str) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        Ok::<_, std::io::Error>(head.starts_with(b"HTTP/1.1 2") || head.starts_with(b"HTTP/1.0 2"))
    };
    matches!(
        tokio::time::timeout(Duration::from_secs(2), ask).await,
        Ok(Ok(true))
    )
}
