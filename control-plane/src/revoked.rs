//! Identities that were revoked: marked and restored offline on the state folder, also while a control plane runs on
//! it, which then cuts their connections and gives them no certificate. Imports nothing of this crate.
//!
//! The folder `revoked/` (mode 0700) holds one empty file for each, `<namespace>/<service account>`.

use std::collections::BTreeSet;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use duet_api::spiffe::SpiffeId;
use tokio::sync::watch;

/// How often a control plane looks.
const LOOK: Duration = Duration::from_secs(1);

/// A workload's identity in whatever trust domain the mesh has: `namespace/service-account`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    namespace: String,
    account: String,
}

impl From<&SpiffeId> for Identity {
    fn from(id: &SpiffeId) -> Self {
        Self { namespace: id.namespace().to_owned(), account: id.account().to_owned() }
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.account)
    }
}

impl std::str::FromStr for Identity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/');
        let (namespace, account) =
            parts.ok_or_else(|| "give NAMESPACE/SERVICE_ACCOUNT".to_owned())?;
        // Which trust domain does not matter; what can be in the parts does, since they become names of files.
        let id = SpiffeId::new("any", namespace, account).map_err(|error| error.to_string())?;
        if id.is_control_plane() {
            return Err("that is the control plane's own identity".to_owned());
        }
        Ok(Self::from(&id))
    }
}

impl Identity {
    fn marker(&self, state: &Path) -> PathBuf {
        folder(state).join(&self.namespace).join(&self.account)
    }

    /// Whether the identity is revoked now.
    ///
    /// # Errors
    /// When the state folder cannot be read.
    pub fn is_revoked(&self, state: &Path) -> io::Result<bool> {
        self.marker(state).try_exists()
    }
}

fn folder(state: &Path) -> PathBuf {
    state.join("revoked")
}

/// Revokes an identity. Twice is the same as once.
///
/// # Errors
/// When the folder is no control plane's, or cannot be written.
pub fn revoke(state: &Path, identity: &Identity) -> anyhow::Result<()> {
    ensure!(
        state.join("ca").is_dir(),
        "{} is not the state folder of a control plane: it has no mesh CA",
        state.display()
    );
    let marker = identity.marker(state);
    let mark = || {
        let namespace = folder(state).join(&identity.namespace);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&namespace)?;
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&marker)?;
        // It must not come back after a crash of the machine.
        for folder in [&namespace, &folder(state), state] {
            fs::File::open(folder)?.sync_all()?;
        }
        io::Result::Ok(())
    };
    mark().with_context(|| marker.display().to_string())
}

/// Takes a revocation back.
///
/// # Errors
/// When the identity is not revoked, or the state folder cannot be written.
pub fn restore(state: &Path, identity: &Identity) -> anyhow::Result<()> {
    match fs::remove_file(identity.marker(state)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            anyhow::bail!("{identity} is not revoked")
        }
        done => done.with_context(|| format!("{identity} cannot be restored")),
    }
}

/// Every identity that is revoked, by name.
///
/// # Errors
/// When the state folder cannot be read.
pub fn list(state: &Path) -> io::Result<BTreeSet<Identity>> {
    let mut found = BTreeSet::new();
    for namespace in names(&folder(state))? {
        for account in names(&folder(state).join(&namespace))? {
            // What is no identity was not put there by us.
            found.extend(format!("{namespace}/{account}").parse::<Identity>().ok());
        }
    }
    Ok(found)
}

fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// What a running control plane knows of it.
#[derive(Clone, Debug)]
pub struct Revoked {
    state: PathBuf,
    known: Arc<watch::Sender<BTreeSet<Identity>>>,
}

impl Revoked {
    /// With what the state folder says now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(state: &Path) -> anyhow::Result<Self> {
        let known = list(state).with_context(|| folder(state).display().to_string())?;
        Ok(Self { state: state.to_owned(), known: Arc::new(watch::Sender::new(known)) })
    }

    /// Follows the state folder, for ever.
    pub async fn follow(self) {
        let mut failed = false;
        loop {
            tokio::time::sleep(LOOK).await;
            let state = self.state.clone();
            let read = tokio::task::spawn_blocking(move || list(&state)).await;
            match read.map_err(io::Error::other).and_then(|read| read) {
                Ok(now) => {
                    failed = false;
                    self.known.send_if_modified(|known| {
                        for identity in now.difference(known) {
                            tracing::warn!(%identity, "revoked: its connections are cut");
                        }
                        for identity in known.difference(&now) {
                            tracing::warn!(%identity, "no longer revoked");
                        }
                        let changed = *known != now;
                        *known = now;
                        changed
                    });
                }
                // What was revoked stays so.
                Err(error) if !failed => {
                    failed = true;
                    tracing::error!(%error, "the revoked identities cannot be read");
                }
                Err(_) => {}
            }
        }
    }

    /// Whether an identity is revoked, as of the last look.
    #[must_use]
    pub fn contains(&self, id: &SpiffeId) -> bool {
        self.known.borrow().contains(&Identity::from(id))
    }

    /// All of them, by name.
    pub(crate) fn names(&self) -> Vec<String> {
        self.known.borrow().iter().map(Identity::to_string).collect()
    }

    /// What changes it.
    pub(crate) fn changes(&self) -> watch::Receiver<BTreeSet<Identity>> {
        self.known.subscribe()
    }

    /// Ends when the identity is revoked.
    pub fn revoked(&self, id: &SpiffeId) -> impl Future<Output = ()> + Send + use<> {
        let (mut known, identity) = (self.known.subscribe(), Identity::from(id));
        async move {
            // The sender lives as long as anybody accepts connections; without it, nothing is revoked any more.
            if known.wait_for(|known| known.contains(&identity)).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn identity(text: &str) -> Identity {
        text.parse().unwrap()
    }

    #[test]
    fn an_identity_is_revoked_until_it_is_restored() {
        let state = tempfile::tempdir().unwrap();
        fs::create_dir(state.path().join("ca")).unwrap();
        let (orders, payments) = (identity("shop/orders"), identity("shop/payments"));
        for _ in 0..2 {
            revoke(state.path(), &orders).unwrap();
        }
        assert!(orders.is_revoked(state.path()).unwrap());
        assert!(!payments.is_revoked(state.path()).unwrap());
        assert_eq!(list(state.path()).unwrap(), [orders.clone()].into());
        let mode = fs::metadata(state.path().join("revoked")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        restore(state.path(), &orders).unwrap();
        assert!(!orders.is_revoked(state.path()).unwrap());
        let again = restore(state.path(), &orders).unwrap_err();
        assert_eq!(again.to_string(), "shop/orders is not revoked");
    }

    #[test]
    fn only_identities_of_workloads_can_be_revoked_and_on_a_state_folder_only() {
        for bad in
            ["orders", "shop/", "../ca", "shop/..", "a/b/c", "duet-system/duet-control-plane"]
        {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
        let folder = tempfile::tempdir().unwrap();
        let error = revoke(folder.path(), &identity("shop/orders")).unwrap_err();
        assert!(error.to_string().contains("no mesh CA"), "{error}");
    }
}
