//! Starts the parts of a mesh, in order, and knows how each is started.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use duet_control_plane::token::{TokenRequest, create};
use tokio_util::task::TaskTracker;

use super::Stop;
use super::commands;
use super::config::{App, Mesh, Port};
use super::port::Reserved;
use super::probe::{answers, ports, ready, within};
use super::state::{
    AppState, ControlPlanePorts, Folder, Replica, SidecarPorts, SidecarState, State,
};
use super::supervise::{self, Event};
use crate::output;
use crate::process::{Log, Process, Spec};

/// A mesh being started and stopped.
#[derive(Debug)]
pub(crate) struct Launcher {
    mesh: Rc<Mesh>,
    folder: PathBuf,
    state: Rc<Folder>,
    stop: Stop,
    logs: RefCell<Vec<(String, Rc<Log>)>>,
    width: usize,
    /// The ports of applications that were not started yet, by the replica's number in the state.
    reserved: RefCell<HashMap<usize, Reserved>>,
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
        let fixed = mesh.fixed_ports();
        let (mut reserved, mut replicas) = (HashMap::new(), Vec::new());
        for (service, app) in &mesh.apps {
            for replica in 1..=app.replicas {
                let (port, own) = match app.port {
                    Port::Fixed(port) => (port, Reserved::fixed(service, port)?),
                    Port::Auto => {
                        let own = Reserved::free(&fixed)?;
                        (own.port, Some(own))
                    }
                };
                reserved.extend(own.map(|own| (replicas.len(), own)));
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
        let longest = replicas.iter().map(|replica| replica.instance.len() + 5).max();
        state.update(|state| state.apps = replicas)?;
        Ok(Self {
            mesh: Rc::new(mesh),
            folder,
            state: Rc::new(state),
            stop,
            logs: RefCell::default(),
            width: longest.unwrap_or_default().max("control-plane".len()),
            reserved: RefCell::new(reserved),
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
        let spec = Spec { command, env: Vec::new(), folder: self.folder.clone() };
        let mut process = Process::start_attached(&spec)?;
        let status = process.wait().await?;
        if !status.success() {
            bail!("the build command failed: {build}");
        }
        Ok(())
    }

    /// Starts the control plane and waits until it is ready.
    pub(crate) async fn control_plane(&self, limit: Duration) -> anyhow::Result<()> {
        let ports_file = self.ports_file("control-plane")?;
        let state = Rc::clone(&self.state);
        let spec = commands::control_plane(&self.mesh, &self.folder, &state, &ports_file)?;
        let log = self.log("control-plane")?;
        let told = move |event| {
            record(&state, |state| {
                let own = &mut state.control_plane;
                note(event, (&mut own.pid, &mut own.restarts));
            });
        };
        let end = (self.stop.control_plane.clone(), self.stop.clone());
        let run = supervise::run("control-plane".to_owned(), spec, Rc::clone(&log), end, told);
        self.tasks.control_plane.spawn_local(run);
        let what = "the control plane";
        let ports: ControlPlanePorts =
            ports(&ports_file, limit).await.map_err(|error| failed(what, &log, &error))?;
        let (url, own) = (format!("http://{}", ports.admin), self.state.join("control-plane"));
        self.state.update(|state| {
            state.control_plane.grpc = ports.grpc.to_string();
            state.control_plane.metrics_url = format!("{url}/metrics");
            state.control_plane.admin_url = url;
            state.control_plane.operator_url = format!("http://{}", ports.operator);
            state.control_plane.state = own;
        })?;
        let address = ports.admin.to_string();
        within(limit, || answers(&address, "/ready"))
            .await
            .map_err(|error| failed(what, &log, &error))
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
                .map_err(|error| failed("a sidecar", &log, &error))?;
            self.state.update(|state| {
                if let Some(replica) = state.apps.get_mut(index) {
                    replica.sidecar.outbound = ports.outbound.to_string();
                    replica.sidecar.inbound = ports.inbound.to_string();
                    replica.sidecar.api = ports.api.to_string();
                    replica.sidecar.grpc_api = ports.grpc_api.to_string();
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
        files: (&Path, &Path),
        log: &Rc<Log>,
    ) -> anyhow::Result<()> {
        let state = Rc::clone(&self.state);
        let spec = commands::sidecar(&self.mesh, &self.folder, &state, (index, replica), files)?;
        let told = move |event| {
            record(&state, |state| {
                if let Some(replica) = state.apps.get_mut(index) {
                    let own = &mut replica.sidecar;
                    note(event, (&mut own.pid, &mut own.restarts));
                }
            });
        };
        let end = (self.stop.sidecars.clone(), self.stop.clone());
        let name = format!("the sidecar of {}", replica.instance);
        self.tasks.sidecars.spawn_local(supervise::run(name, spec, Rc::clone(log), end, told));
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
                let app = self.mesh.apps.get(&replica.service).context("no such app")?;
                let log = self.log(&replica.instance)?;
                self.start_app(index, replica, app, &log)?;
                waiting.push((index, replica.clone(), app, log));
            }
            for (index, replica, app, log) in waiting {
                let ready = within(limit, || ready(&replica, app)).await;
                ready.map_err(|error| failed(&replica.instance, &log, &error))?;
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
        let at = (self.folder.as_path(), self.state.path());
        let spec = commands::app(&self.mesh.namespace, at, (replica, app))?;
        let state = Rc::clone(&self.state);
        let told = move |event| {
            record(&state, |state| {
                if let Some(replica) = state.apps.get_mut(index) {
                    let own = &mut replica.app;
                    note(event, (&mut own.pid, &mut own.restarts));
                }
            });
        };
        let (name, log) = (replica.instance.clone(), Rc::clone(log));
        let end = (self.stop.apps.clone(), self.stop.clone());
        let spec = move || spec.clone();
        drop(self.reserved.borrow_mut().remove(&index));
        self.tasks.apps.spawn_local(supervise::run(name, spec, log, end, told));
        Ok(())
    }

    fn log(&self, name: &str) -> anyhow::Result<Rc<Log>> {
        let file = self.state.join("logs").join(format!("{}.log", name.replace(' ', "-")));
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
        let row = |name: &str, url: &str, [calls, events, metrics]: [&str; 3]| {
            let row = format!("  {name:18} {url:24} {calls:17} {events:17} {metrics}");
            output::line(row.trim_end());
        };
        row("", "", ["sidecar: calls", "events", "metrics"]);
        for replica in &state.apps {
            let sidecar = &replica.sidecar;
            let ports = [&sidecar.outbound, &sidecar.api, &sidecar.metrics].map(String::as_str);
            row(&replica.instance, &replica.app.url, ports);
        }
        row("control plane", &state.control_plane.metrics_url, ["", "", ""]);
        output::line(&format!(
            "\n  All ports and process ids: {}",
            self.state.join("state.json").display()
        ));
        output::line(&format!("  Logs: {}", self.state.join("logs").display()));
        output::line("  Press Ctrl-C to stop.\n");
    }
}

/// Takes note of what happened to a process: its id (0 while it is away) and its restarts.
fn note(event: Event, (pid, restarts): (&mut u32, &mut u32)) {
    match event {
        Event::Started(started) => *pid = started,
        Event::Crashed => {
            *pid = 0;
            *restarts += 1;
        }
    }
}

/// Writing `state.json` must not stop the mesh: a full disk is reported, and the next change tries again.
fn record(state: &Folder, change: impl FnOnce(&mut State)) {
    if let Err(error) = state.update(change) {
        output::note(&format!("state.json: {error:#}"));
    }
}

/// Writes a file that only its owner can read.
pub(crate) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::OpenOptions::new();
    let file = options.create(true).truncate(true).write(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| path.display().to_string())
}

/// Its last lines come last, as they are many.
fn failed(what: &str, log: &Log, error: &anyhow::Error) -> anyhow::Error {
    anyhow!("{what} did not become ready: {error:#}; its last lines:{}", log.tail())
}
