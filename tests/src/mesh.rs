//! A control plane and sidecars as processes, beside applications that the test itself serves.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use tempfile::TempDir;

use crate::process::{Process, program};
use crate::{SOON, eventually, http};

/// A control plane.
#[derive(Debug)]
pub struct ControlPlane {
    /// The process.
    pub process: Process,
    /// gRPC.
    pub grpc: SocketAddr,
    /// Metrics and health.
    pub admin: SocketAddr,
    /// What `duet events` talks to.
    pub operator: SocketAddr,
    /// Everything of this mesh lies below.
    pub folder: TempDir,
}

#[derive(Clone, Copy, Deserialize)]
struct ControlPlanePorts {
    grpc: SocketAddr,
    admin: SocketAddr,
    operator: SocketAddr,
}

impl ControlPlane {
    /// Starts one with these resources (file name, YAML) and waits until it is ready.
    pub async fn start(resources: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("config")).unwrap();
        for (name, yaml) in resources {
            std::fs::write(folder.path().join("config").join(name), yaml).unwrap();
        }
        let any = "127.0.0.1:0".parse().unwrap();
        let any = ControlPlanePorts { grpc: any, admin: any, operator: any };
        let (process, ports) = Self::run(folder.path(), any).await;
        let ControlPlanePorts { grpc, admin, operator } = ports;
        Self { process, grpc, admin, operator, folder }
    }

    async fn run(folder: &Path, at: ControlPlanePorts) -> (Process, ControlPlanePorts) {
        let ports = folder.join("control-plane-ports.json");
        std::fs::remove_file(&ports).ok();
        let mut command = Command::new(program("duet"));
        command.args(["control-plane", "--exit-with-parent", "--log-format", "text"]);
        command.arg("--config").arg(folder.join("config"));
        command.arg("--state").arg(folder.join("control-plane"));
        command.arg("--ports-file").arg(&ports);
        command.args(["--listen", &at.grpc.to_string(), "--admin-listen", &at.admin.to_string()]);
        command.args(["--operator-listen", &at.operator.to_string()]);
        let process = Process::start("control-plane", command, folder);
        let ports: ControlPlanePorts = read_ports(&ports).await;
        eventually("the control plane is ready", SOON, || http::is_ok(ports.admin, "/ready")).await;
        (process, ports)
    }

    /// Writes a resource file, as a user would with an editor.
    pub fn write(&self, name: &str, yaml: &str) {
        std::fs::write(self.folder.path().join("config").join(name), yaml).unwrap();
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same ports and state.
    pub async fn restart(&mut self) {
        self.process.kill();
        let at = ControlPlanePorts { grpc: self.grpc, admin: self.admin, operator: self.operator };
        let (process, _) = Self::run(self.folder.path(), at).await;
        self.process = process;
    }

    /// Runs `duet token create` on its state; `more` are further flags.
    #[must_use]
    pub fn token(&self, namespace: &str, account: &str, more: &[&str]) -> String {
        let state = self.folder.path().join("control-plane");
        let output = Command::new(program("duet"))
            .args(["token", "create", "--namespace", namespace, "--service-account", account])
            .arg("--state")
            .arg(state)
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

/// How a sidecar is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Service, and service account.
    pub service: String,
    /// Default: `default`.
    pub namespace: String,
    /// Default: the service's name.
    pub instance: String,
    /// The application's port; `None` for a pure client.
    pub app_port: Option<u16>,
    /// `h2c` and so on.
    pub protocol: Option<String>,
    /// Join token; default: a new one.
    pub token: Option<String>,
    /// More flags.
    pub flags: Vec<String>,
}

impl Options {
    /// A replica of a service.
    #[must_use]
    pub fn service(service: &str, app_port: u16) -> Self {
        Self { app_port: Some(app_port), ..Self::client(service) }
    }

    /// A workload that only calls.
    #[must_use]
    pub fn client(service: &str) -> Self {
        Self {
            service: service.to_owned(),
            namespace: "default".to_owned(),
            instance: service.to_owned(),
            app_port: None,
            protocol: None,
            token: None,
            flags: Vec::new(),
        }
    }

    /// With more flags.
    #[must_use]
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
        self
    }

    /// With another name for the replica.
    #[must_use]
    pub fn instance(mut self, instance: &str) -> Self {
        instance.clone_into(&mut self.instance);
        self
    }

    /// With what the application speaks.
    #[must_use]
    pub fn protocol(mut self, protocol: &str) -> Self {
        self.protocol = Some(protocol.to_owned());
        self
    }

    /// In another namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }
}

/// A sidecar's ports.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Ports {
    /// The application's calls.
    pub outbound: SocketAddr,
    /// Peers' calls, mTLS.
    pub inbound: SocketAddr,
    /// Dapr-compatible API.
    pub api: SocketAddr,
    /// The same over gRPC.
    pub grpc_api: SocketAddr,
    /// Operator.
    pub admin: SocketAddr,
    /// Metrics and health.
    pub metrics: SocketAddr,
}

/// A sidecar.
#[derive(Debug)]
pub struct Sidecar {
    /// The process.
    pub process: Process,
    /// Its ports.
    pub ports: Ports,
    /// Its state folder.
    pub state: PathBuf,
    command: Vec<String>,
    folder: PathBuf,
    instance: String,
}

impl Sidecar {
    /// Starts one and waits until it has bound its ports.
    pub async fn start(control_plane: &ControlPlane, options: Options) -> Self {
        let folder = control_plane.folder.path().to_owned();
        let state = folder.join("sidecars").join(&options.instance);
        let token = options
            .token
            .unwrap_or_else(|| control_plane.token(&options.namespace, &options.service, &[]));
        let mut command: Vec<String> = ["proxy", "--exit-with-parent"].map(str::to_owned).to_vec();
        let mut flag =
            |name: &str, value: &str| command.extend([name.to_owned(), value.to_owned()]);
        flag("--log-format", "text");
        flag("--service", &options.service);
        flag("--namespace", &options.namespace);
        flag("--instance", &options.instance);
        flag("--control-plane", &control_plane.grpc.to_string());
        flag("--token", &token);
        flag("--state", &state.display().to_string());
        if !options.flags.iter().any(|flag| flag == "--drain-timeout") {
            flag("--drain-timeout", "5s");
        }
        if let Some(port) = options.app_port {
            let protocol = options.protocol.map(|name| format!("/{name}")).unwrap_or_default();
            flag("--app-port", &format!("http={port}{protocol}"));
        }
        command.extend(options.flags);
        let any = "127.0.0.1:0".parse().unwrap();
        let any = Ports {
            outbound: any,
            inbound: any,
            api: any,
            grpc_api: any,
            admin: any,
            metrics: any,
        };
        let (process, ports) = Self::run(&folder, &options.instance, &command, any).await;
        Self { process, ports, state, command, folder, instance: options.instance }
    }

    /// Starts one and waits until it is ready to call and be called.
    pub async fn ready(control_plane: &ControlPlane, options: Options) -> Self {
        let sidecar = Self::start(control_plane, options).await;
        sidecar.wait_ready().await;
        sidecar
    }

    /// Waits until `/ready`.
    pub async fn wait_ready(&self) {
        let what = format!("{} is ready", self.instance);
        eventually(&what, SOON, || http::is_ok(self.ports.metrics, "/ready")).await;
    }

    async fn run(folder: &Path, instance: &str, command: &[String], at: Ports) -> (Process, Ports) {
        let file = folder.join(format!("{instance}-ports.json"));
        std::fs::remove_file(&file).ok();
        let mut start = Command::new(program("duet"));
        start.args(command).arg("--ports-file").arg(&file);
        for (flag, address) in [
            ("--outbound-listen", at.outbound),
            ("--inbound-listen", at.inbound),
            ("--api-listen", at.api),
            ("--grpc-api-listen", at.grpc_api),
            ("--admin-listen", at.admin),
            ("--metrics-listen", at.metrics),
        ] {
            start.args([flag, &address.to_string()]);
        }
        let process = Process::start(instance, start, folder);
        let ports = read_ports(&file).await;
        (process, ports)
    }

    /// `SIGTERM`, as a rolling update begins.
    pub fn leave(&self) {
        self.process.signal(rustix::process::Signal::TERM);
    }

    /// The process has not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        crate::process::exists(self.process.pid())
    }

    /// Waits for the end of the process.
    pub async fn gone(&self) {
        eventually(&format!("{} ends", self.instance), SOON, || {
            let gone = !crate::process::exists(self.process.pid());
            async move { gone.then_some(()) }
        })
        .await;
    }

    /// `kill -9`, then the same again on the same ports and state.
    pub async fn restart(&mut self) {
        self.process.kill();
        let (process, _) = Self::run(&self.folder, &self.instance, &self.command, self.ports).await;
        self.process = process;
    }
}

async fn read_ports<T: serde::de::DeserializeOwned>(file: &Path) -> T {
    eventually(&format!("{} is written", file.display()), SOON, || async {
        let text = std::fs::read(file).ok()?;
        serde_json::from_slice(&text).ok()
    })
    .await
}
