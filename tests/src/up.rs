//! A whole mesh by `duet up`.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::eventually;
use crate::process::{Process, program};

/// A running `duet up`.
#[derive(Debug)]
pub struct Up {
    /// The process.
    pub process: Process,
    /// The mesh's folder: a copy, free to be edited.
    pub folder: TempDir,
}

impl Up {
    /// The shop of `examples/shop`, with the binary that was built beside the tests. `change` may edit `duet.yaml`.
    pub async fn shop(change: impl FnOnce(String) -> String) -> Self {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/shop");
        let yaml = std::fs::read_to_string(example.join("duet.yaml")).unwrap();
        let shop = program("shop").display().to_string();
        // What the user builds is built already, and the storefront's own port may be in use.
        let yaml = yaml.replace("${CARGO_TARGET_DIR:-../../target}/release/shop", &shop);
        let yaml = yaml.replace("port: 8080", "port: auto").replace("build: ", "# build: ");
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("mesh")).unwrap();
        for entry in std::fs::read_dir(example.join("mesh")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join("mesh").join(entry.file_name()))
                .unwrap();
        }
        Self::start(folder, &change(yaml)).await
    }

    /// Any mesh.
    pub async fn start(folder: TempDir, yaml: &str) -> Self {
        std::fs::write(folder.path().join("duet.yaml"), yaml).unwrap();
        let mut command = Command::new(program("duet"));
        command.arg("up").arg(folder.path()).env("NO_COLOR", "1");
        let mut up = Self { process: Process::start("up", command, folder.path()), folder };
        let limit = std::time::Duration::from_secs(120);
        let started = std::time::Instant::now();
        while up.try_state().is_none_or(|state| state["ready"] != true) {
            assert!(up.process.is_running(), "duet up ended:\n{}", up.process.log());
            assert!(started.elapsed() < limit, "not ready:\n{}", up.process.log());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        up
    }

    /// The state folder.
    #[must_use]
    pub fn state_folder(&self) -> PathBuf {
        self.folder.path().join(".duet")
    }

    fn try_state(&self) -> Option<Value> {
        let text = std::fs::read(self.state_folder().join("state.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// `state.json`.
    #[must_use]
    pub fn state(&self) -> Value {
        self.try_state().expect("state.json")
    }

    /// A replica in `state.json`, such as `orders-1`.
    #[must_use]
    pub fn replica(&self, instance: &str) -> Value {
        let state = self.state();
        let mut replicas = state["apps"].as_array().unwrap().iter();
        replicas.find(|replica| replica["instance"] == instance).expect(instance).clone()
    }

    /// An application's URL.
    #[must_use]
    pub fn url(&self, instance: &str) -> String {
        self.replica(instance)["app"]["url"].as_str().unwrap().to_owned()
    }

    /// Process ids of everything that runs.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        let state = self.state();
        let pid = |value: &Value| u32::try_from(value.as_u64().unwrap()).unwrap();
        let mut pids = vec![pid(&state["control_plane"]["pid"])];
        for replica in state["apps"].as_array().unwrap() {
            pids.extend([pid(&replica["app"]["pid"]), pid(&replica["sidecar"]["pid"])]);
        }
        pids
    }

    /// Ctrl-C, and waits; its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.process.signal(Signal::INT);
        self.process.wait()
    }

    /// `GET` of JSON.
    pub async fn json(&self, instance: &str, path: &str) -> Value {
        let url = format!("{}{path}", self.url(instance));
        let what = format!("{url} answers");
        eventually(&what, crate::SOON, || async {
            let response = crate::http::client().get(&url).send().await.ok()?;
            response.json().await.ok()
        })
        .await
    }
}
