//! The state folder: a lock, and `state.json`, which tells tools where everything is (see `docs/state.md`).

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

/// `state.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) version: u32,
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) trust_domain: String,
    /// Of `duet up`.
    pub(crate) pid: u32,
    /// Everything was ready at least once.
    pub(crate) ready: bool,
    pub(crate) control_plane: ControlPlane,
    pub(crate) apps: Vec<Replica>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ControlPlane {
    pub(crate) pid: u32,
    /// Address of its gRPC port.
    pub(crate) grpc: String,
    /// Its state folder: CA, tokens, bus.
    pub(crate) state: PathBuf,
    pub(crate) admin_url: String,
    pub(crate) metrics_url: String,
    /// What `duet events` talks to.
    #[serde(default)]
    pub(crate) operator_url: String,
    pub(crate) restarts: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Replica {
    pub(crate) service: String,
    /// From 1.
    pub(crate) replica: u32,
    pub(crate) instance: String,
    pub(crate) app: AppState,
    pub(crate) sidecar: SidecarState,
    pub(crate) ready: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AppState {
    pub(crate) pid: u32,
    pub(crate) port: u16,
    pub(crate) url: String,
    pub(crate) restarts: u32,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct SidecarState {
    pub(crate) pid: u32,
    pub(crate) outbound: String,
    pub(crate) inbound: String,
    pub(crate) api: String,
    #[serde(default)]
    pub(crate) grpc_api: String,
    pub(crate) admin: String,
    pub(crate) metrics: String,
    pub(crate) restarts: u32,
}

/// What a sidecar writes to its ports file.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct SidecarPorts {
    pub(crate) outbound: SocketAddr,
    pub(crate) inbound: SocketAddr,
    pub(crate) api: SocketAddr,
    pub(crate) grpc_api: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) metrics: SocketAddr,
}

/// What a control plane writes to its ports file.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct ControlPlanePorts {
    pub(crate) grpc: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) operator: SocketAddr,
}

/// A state folder that is ours as long as this lives.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    state: RefCell<State>,
    _lock: File,
}

impl Folder {
    /// Makes and locks the folder.
    pub(crate) fn open(path: &Path, state: State) -> anyhow::Result<Self> {
        for folder in ["", "logs", "ports", "tokens", "sidecars"] {
            let inside = !folder.is_empty();
            let folder = path.join(folder);
            make_private(&folder, inside)
                .with_context(|| format!("state folder {}", folder.display()))?;
        }
        let path = path.canonicalize()?;
        fs::write(path.join(".gitignore"), "*\n")?;
        let lock = path.join("lock");
        let mut file =
            File::options().create(true).truncate(false).read(true).write(true).open(&lock)?;
        if file.try_lock().is_err() {
            let holder = fs::read_to_string(&lock).unwrap_or_default();
            bail!(
                "{} is in use by `duet up` with process id {}; stop it, or use another folder with --state",
                path.display(),
                holder.trim()
            );
        }
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { path, state: RefCell::new(state), _lock: file })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Changes the state and writes `state.json`, whole or not at all.
    pub(crate) fn update(&self, change: impl FnOnce(&mut State)) -> anyhow::Result<()> {
        let mut state = self.state.borrow_mut();
        change(&mut state);
        let (file, temporary) = (self.path.join("state.json"), self.path.join("state.json.tmp"));
        let text = serde_json::to_string_pretty(&*state)?;
        fs::write(&temporary, text + "\n")
            .and_then(|()| fs::rename(&temporary, &file))
            .with_context(|| file.display().to_string())
    }
}

/// Makes a folder that only its owner can look into: applications log what they like. One that is there already is made
/// so if it is `ours`; an older version may have made it.
fn make_private(folder: &Path, ours: bool) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    if ours {
        // Fails in somebody else's folder, which is theirs to protect.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).ok();
    }
    Ok(())
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Nothing runs any more: what it says would mislead.
        fs::remove_file(self.path.join("state.json")).ok();
    }
}

/// The state of a mesh that runs, from its folder.
pub(crate) fn read(folder: &Path) -> anyhow::Result<State> {
    let file = folder.join("state.json");
    let text = fs::read(&file).with_context(|| {
        format!(
            "{}: no mesh runs there (a mesh's folder is the .duet beside its duet.yaml)",
            file.display()
        )
    })?;
    serde_json::from_slice(&text).with_context(|| file.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inside_is_the_owners_only_and_the_folder_that_was_there_stays_as_it_is() {
        let base = tempfile::tempdir().unwrap();
        let mode = |folder: &Path| fs::metadata(folder).unwrap().permissions().mode() & 0o777;
        let open = fs::Permissions::from_mode(0o755);
        fs::create_dir(base.path().join("logs")).unwrap();
        for folder in [base.path().to_owned(), base.path().join("logs")] {
            fs::set_permissions(folder, open.clone()).unwrap();
        }
        let _folder = Folder::open(base.path(), State::default()).unwrap();
        assert_eq!(mode(base.path()), 0o755);
        for inside in ["logs", "ports", "tokens", "sidecars"] {
            assert_eq!(mode(&base.path().join(inside)), 0o700, "{inside}");
        }
        let fresh = base.path().join("new/.duet");
        let _folder = Folder::open(&fresh, State::default()).unwrap();
        assert_eq!(mode(&fresh), 0o700);
    }
}
