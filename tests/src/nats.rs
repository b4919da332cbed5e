//! A real `nats-server` with JetStream on a free port, ended with its value; and running a test on both buses.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::Process;
use crate::{SOON, eventually, tools};

/// Where the events of a mesh are kept.
#[derive(Debug)]
pub enum Backend {
    /// In the control plane's own log.
    Embedded,
    /// On a server of its own.
    Nats(NatsServer),
}

impl Backend {
    /// A `nats-server`. `None` where there is no such program: skipped.
    pub async fn nats() -> Option<Self> {
        NatsServer::start().await.map(Self::Nats)
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Nats(_) => "nats",
        }
    }

    /// Resources that make it the default bus, to be put behind others.
    #[must_use]
    pub fn yaml(&self) -> String {
        match self {
            Self::Embedded => String::new(),
            Self::Nats(server) => server.default_bus(),
        }
    }
}

/// Makes each of these functions, which borrow a [`nats::Backend`](crate::nats::Backend), a test on either bus.
#[macro_export]
macro_rules! on_both_buses {
    ($($name:ident),* $(,)?) => {
        mod on_the_embedded_bus {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(&mut $crate::nats::Backend::Embedded).await;
            })*
        }
        mod on_nats {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                if let Some(mut backend) = $crate::nats::Backend::nats().await {
                    super::$name(&mut backend).await;
                }
            })*
        }
    };
}

/// A server, with a folder of its own.
#[derive(Debug)]
pub struct NatsServer {
    /// `nats://host:port`.
    pub url: String,
    process: Process,
    program: PathBuf,
    folder: TempDir,
}

impl NatsServer {
    /// Starts one that flushes before it acknowledges. `None` where there is no such program: skipped.
    pub async fn start() -> Option<Self> {
        Self::start_program("nats-server").await
    }

    /// The same of version 2.10, which pauses no consumers and keeps no events for later.
    pub async fn start_old() -> Option<Self> {
        Self::start_program("nats-server-2.10").await
    }

    async fn start_program(name: &str) -> Option<Self> {
        let program = tools::find(name)?;
        let folder = tempfile::tempdir().unwrap();
        let ports = folder.path().join("ports");
        std::fs::create_dir(&ports).unwrap();
        let process = run(&program, &folder, "127.0.0.1:-1");
        let url = eventually("nats-server has written its ports", SOON, || async {
            let file = std::fs::read_dir(&ports).ok()?.next()?.ok()?.path();
            let ports: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
            Some(ports["nats"][0].as_str()?.to_owned())
        })
        .await;
        Some(Self { url, process, program, folder })
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again, on the same port and with what it has stored.
    pub async fn restart(&mut self) {
        self.process.kill();
        let address = self.url.trim_start_matches("nats://").to_owned();
        self.process = run(&self.program, &self.folder, &address);
        eventually("nats-server answers", SOON, || async {
            tokio::net::TcpStream::connect(&address).await.ok().map(drop)
        })
        .await;
    }

    /// The default bus, on it.
    #[must_use]
    pub fn default_bus(&self) -> String {
        let url = &self.url;
        format!(
            "---\napiVersion: duet.dev/v1alpha1\nkind: EventBus\nmetadata: {{name: default}}\nspec: {{backend: {{nats: {{servers: [{url:?}]}}}}}}\n"
        )
    }
}

fn run(program: &Path, folder: &TempDir, address: &str) -> Process {
    let path = |name: &str| folder.path().join(name).display().to_string();
    let text = format!(
        "listen: \"{address}\"\nports_file_dir: {:?}\njetstream {{ store_dir: {:?}, max_file_store: 4TB, sync_interval: always }}\n",
        path("ports"),
        path("store"),
    );
    std::fs::write(path("nats.conf"), text).unwrap();
    let mut command = Command::new(program);
    command.args(["-c", &path("nats.conf")]);
    Process::start("nats-server", command, folder.path())
}
