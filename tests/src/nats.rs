//! A real `nats-server` with JetStream on a free port, ended with its value.

use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::Process;
use crate::{SOON, eventually, tools};

/// A server, with a folder of its own.
#[derive(Debug)]
pub struct NatsServer {
    /// `nats://host:port`.
    pub url: String,
    _process: Process,
    _folder: TempDir,
}

impl NatsServer {
    /// Starts one that flushes before it acknowledges. `None` where there is no such program: skipped.
    pub async fn start() -> Option<Self> {
        let program = tools::find("nats-server")?;
        let folder = tempfile::tempdir().unwrap();
        let ports = folder.path().join("ports");
        std::fs::create_dir(&ports).unwrap();
        let config = folder.path().join("nats.conf");
        let store = folder.path().join("store");
        let text = format!(
            "listen: 127.0.0.1:-1\nports_file_dir: {:?}\njetstream {{ store_dir: {:?}, max_file_store: 4TB, sync_interval: always }}\n",
            ports.display().to_string(),
            store.display().to_string()
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(program);
        command.arg("-c").arg(&config);
        let process = Process::start("nats-server", command, folder.path());
        let url = eventually("nats-server has written its ports", SOON, || async {
            let file = std::fs::read_dir(&ports).ok()?.next()?.ok()?.path();
            let ports: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
            Some(ports["nats"][0].as_str()?.to_owned())
        })
        .await;
        Some(Self { url, _process: process, _folder: folder })
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
