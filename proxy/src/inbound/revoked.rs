//! Identities that the mesh has shut out: their connections are cut at once, and they get no new ones.

use std::collections::BTreeSet;
use std::sync::Arc;

use duet_api::proto;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// `<namespace>/<service account>` of each.
pub type Identities = BTreeSet<String>;

/// Follows the workload's configuration until told to stop. Who was shut out stays so while the control plane is away.
pub async fn follow(
    mut workload: watch::Receiver<Option<Arc<proto::Workload>>>,
    revoked: watch::Sender<Identities>,
    stop: CancellationToken,
) {
    loop {
        if let Some(current) = &*workload.borrow_and_update() {
            revoked.send_if_modified(|former| {
                // In order of names, as the set has them.
                let changed = !former.iter().eq(&current.revoked);
                if changed {
                    *former = current.revoked.iter().cloned().collect();
                }
                changed
            });
        }
        tokio::select! {
            changed = workload.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
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
        let followed = tokio::spawn(follow(workload, sender, CancellationToken::new()));
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
    }
}
