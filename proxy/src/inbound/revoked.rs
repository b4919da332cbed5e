//! Identities that the mesh has shut out: their connections are cut at once, and they get no new ones. The list lies beside
//! the certificate as well: a sidecar that begins anew while the control plane is away lets none of them in.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use duet_api::proto;
use duet_api::tls::sha256;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::identity::Store;
use duet_events::sparse::Sparse;

/// `<namespace>/<service account>` of each.
pub type Identities = BTreeSet<String>;

/// A line that says what it is with a checksum of the others, then a line for each identity.
const FILE: &str = "revoked";
const MARK: &str = "duet-revoked 1 ";
/// Room for some ten thousand names.
const MAX_BYTES: u64 = 1 << 20;
/// Bound on the last write, when the sidecar ends.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// The list on disk.
#[derive(Debug)]
pub struct Kept {
    store: Store,
    /// What it says; `None` where it cannot be read.
    list: Option<Identities>,
    log: Sparse,
}

impl Kept {
    /// Reads what the state folder has. A damaged list is reported and counts as none, until the control plane has told
    /// the next one.
    #[must_use]
    pub fn load(store: Store) -> Self {
        let path = store.folder().join(FILE);
        let list = match read(&path) {
            Ok(list) => Some(list),
            Err(error) => {
                let (path, error) = (path.display(), format!("{error:#}"));
                tracing::error!(
                    %path,
                    error,
                    "who was revoked is not known until the control plane says it"
                );
                None
            }
        };
        Self { store, list, log: Sparse::default() }
    }

    /// Who was shut out when the control plane was last heard.
    #[must_use]
    pub fn list(&self) -> Identities {
        self.list.clone().unwrap_or_default()
    }

    /// Writes down what is told, until nobody tells it anything any more. Not where it is told: a disk that stalls must not
    /// keep anybody from being shut out.
    async fn keep_up(mut self, mut told: watch::Receiver<Vec<String>>) {
        while told.changed().await.is_ok() {
            let list = told.borrow_and_update().clone();
            self.keep(&list).await;
        }
    }

    /// Writes it down where it is another one.
    async fn keep(&mut self, list: &[String]) {
        // In order of names, as the set has them.
        if self.list.as_ref().is_some_and(|kept| kept.iter().eq(list)) {
            return;
        }
        let (store, text) = (self.store.clone(), encode(list));
        let written = spawn_blocking(move || store.write(FILE, &text)).await;
        match written.map_err(anyhow::Error::from).flatten() {
            Ok(()) => self.list = Some(list.iter().cloned().collect()),
            Err(error) => {
                if let Some(left_out) = self.log.pass("") {
                    let error = format!("{error:#}");
                    tracing::warn!(
                        error,
                        left_out,
                        "who is revoked cannot be stored for a restart"
                    );
                }
            }
        }
    }
}

fn encode(list: &[String]) -> String {
    let mut names = String::new();
    for name in list {
        if (names.len() + name.len()) as u64 + 256 > MAX_BYTES {
            tracing::warn!(
                all = list.len(),
                "too many are revoked: not all are stored for a restart"
            );
            break;
        }
        names.push_str(name);
        names.push('\n');
    }
    format!("{MARK}{}\n{names}", checksum(&names))
}

fn checksum(names: &str) -> String {
    sha256(names.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> anyhow::Result<Identities> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Identities::new()),
        opened => opened?,
    };
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    ensure!(text.len() as u64 <= MAX_BYTES, "it is too large");
    let (mark, names) = text.split_once('\n').context("it is empty")?;
    ensure!(mark.strip_prefix(MARK) == Some(&checksum(names)), "it is damaged");
    Ok(names.lines().map(str::to_owned).collect())
}

/// Follows the workload's configuration until told to stop. Who was shut out stays so while the control plane is away.
pub async fn follow(
    mut workload: watch::Receiver<Option<Arc<proto::Workload>>>,
    revoked: watch::Sender<Identities>,
    kept: Kept,
    stop: CancellationToken,
) {
    let (tell, told) = watch::channel(Vec::new());
    let keeper = tokio::spawn(kept.keep_up(told));
    while !stop.is_cancelled() {
        let current = workload.borrow_and_update().clone();
        if let Some(current) = current {
            revoked.send_if_modified(|former| {
                let changed = !former.iter().eq(&current.revoked);
                if changed {
                    *former = current.revoked.iter().cloned().collect();
                }
                changed
            });
            tell.send_replace(current.revoked.clone());
        }
        tokio::select! {
            changed = workload.changed() => if changed.is_err() { break },
            () = stop.cancelled() => break,
        }
    }
    drop(tell);
    // What was told last is stored, unless the disk stalls.
    timeout(LAST_WRITE, keeper).await.ok();
}

/// Ends when a peer is shut out. `name`: its `namespace/account`.
pub(super) async fn shut_out(mut revoked: watch::Receiver<Identities>, name: Arc<str>) {
    if revoked.wait_for(|revoked| revoked.contains(&*name)).await.is_err() {
        // The sidecar is about to end.
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_who_is_shut_out_is_told() {
        let (tell, workload) = watch::channel(None);
        let (sender, revoked) = watch::channel(Identities::new());
        let mut seen = revoked.clone();
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::load(Store::open(folder.path()).unwrap());
        let followed = tokio::spawn(follow(workload, sender, kept, CancellationToken::new()));
        let carts = tokio::spawn(shut_out(revoked.clone(), "shop/carts".into()));
        let orders = tokio::spawn(shut_out(revoked, "shop/orders".into()));
        for names in [&["shop/carts"][..], &["shop/carts", "shop/orders"]] {
            assert!(!orders.is_finished());
            let revoked = names.iter().map(|name| (*name).to_owned()).collect();
            tell.send_replace(Some(Arc::new(proto::Workload { revoked, ..Default::default() })));
            seen.wait_for(|set| set.iter().eq(names)).await.unwrap();
        }
        orders.await.unwrap();
        carts.await.unwrap();
        drop(tell);
        followed.await.unwrap();
        let kept = Kept::load(Store::open(folder.path()).unwrap());
        assert!(kept.list().iter().eq(["shop/carts", "shop/orders"]), "after a restart as well");
    }

    #[tokio::test]
    async fn a_disk_that_stalls_keeps_nobody_from_being_shut_out() {
        let folder = tempfile::tempdir().unwrap();
        // Whoever writes here waits for a reader.
        let stalls = folder.path().join(format!("{FILE}.{}.tmp", std::process::id()));
        assert!(std::process::Command::new("mkfifo").arg(&stalls).status().unwrap().success());
        let kept = Kept::load(Store::open(folder.path()).unwrap());
        let (tell, workload) = watch::channel(None);
        let (sender, mut revoked) = watch::channel(Identities::new());
        let followed = tokio::spawn(follow(workload, sender, kept, CancellationToken::new()));
        for names in [&["shop/carts"][..], &["shop/carts", "shop/orders"]] {
            let all: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            let seen = revoked.wait_for(|revoked| revoked.iter().eq(&all));
            let workload = proto::Workload { revoked: all.clone(), ..Default::default() };
            tell.send(Some(Arc::new(workload))).unwrap();
            timeout(Duration::from_secs(20), seen).await.unwrap().unwrap();
        }
        drop(tell);
        followed.await.unwrap();
        let reader = spawn_blocking(move || fs::File::open(stalls));
        drop(reader.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn a_damaged_list_is_none_and_the_next_one_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let load = || Kept::load(Store::open(folder.path()).unwrap());
        assert_eq!(load().list, Some(Identities::new()), "there is none yet");
        let orders = ["shop/orders".to_owned()];
        load().keep(&orders).await;
        let path = folder.path().join(FILE);
        let good = fs::read(&path).unwrap();
        assert!(load().list().iter().eq(&orders));
        let large = vec![b'a'; 2 << 20];
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for bad in [&b""[..], b"\xff\n", &good[..good.len() - 2], &flipped, &large] {
            fs::write(&path, bad).unwrap();
            let mut damaged = load();
            assert_eq!((&damaged.list, damaged.list()), (&None, Identities::new()));
            damaged.keep(&[]).await;
            assert_eq!(load().list, Some(Identities::new()));
        }
        let many: Vec<_> = (0..100_000).map(|number| format!("shop/orders-{number:06}")).collect();
        load().keep(&many).await;
        let kept = load().list();
        assert!(kept.len() > 10_000 && kept.iter().eq(&many[..kept.len()]));
    }
}
