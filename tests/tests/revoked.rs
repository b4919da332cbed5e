//! A workload that is shut out, and let in again, with `duet token`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::process::{Command, Output};

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, metrics};

fn token(control_plane: &ControlPlane, arguments: &[&str]) -> Output {
    Command::new(duet_tests::process::program("duet"))
        .arg("token")
        .args(arguments)
        .arg("--state")
        .arg(control_plane.folder.path().join("control-plane"))
        .output()
        .unwrap()
}

async fn connections(control_plane: &ControlPlane) -> f64 {
    metrics::sum(control_plane.admin, "duet_control_plane_watches", &[]).await
}

#[tokio::test]
async fn a_revoked_sidecar_loses_its_streams_and_a_restored_one_comes_back() {
    let control_plane = ControlPlane::start(&[]).await;
    let _orders = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let _payments = Sidecar::ready(&control_plane, Options::client("payments")).await;
    let watches = |wanted: f64| {
        let control_plane = &control_plane;
        eventually("watches come and go", SOON, move || async move {
            ((connections(control_plane).await - wanted).abs() < 0.5).then_some(())
        })
    };
    watches(2.0).await;

    let revoked = token(&control_plane, &["revoke", "--identity", "default/orders"]);
    assert!(revoked.status.success(), "{}", String::from_utf8_lossy(&revoked.stderr));
    watches(1.0).await;
    eventually("it is refused when it comes back", SOON, || async {
        let reason = [("reason", "revoked")];
        let name = "duet_control_plane_refused_connections_total";
        (metrics::sum(control_plane.admin, name, &reason).await >= 1.0).then_some(())
    })
    .await;
    let list = token(&control_plane, &["list"]);
    let list = String::from_utf8(list.stdout).unwrap();
    assert!(list.contains("identity default/orders  revoked"), "{list}");
    let create = token(&control_plane, &["create", "--service-account", "orders"]);
    assert!(!create.status.success());
    assert!(String::from_utf8_lossy(&create.stderr).contains("default/orders was revoked"));

    let restored = token(&control_plane, &["restore", "--identity", "default/orders"]);
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    watches(2.0).await;
    for wrong in [
        &["revoke"][..],
        &["revoke", "--identity", "orders"],
        &["revoke", "x", "--identity", "a/b"],
    ] {
        assert!(!token(&control_plane, wrong).status.success(), "{wrong:?}");
    }
}
