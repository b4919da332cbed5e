//! Who can read what the control plane writes, in a state folder that others can look into.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::bus::{event, publish};
use super::mesh::{Mesh, registration};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn events_and_registrations_are_the_owners_only() {
    let mut mesh = Mesh::start("").await;
    let state = mesh.args.state.clone();
    // As if the folder had been there first, and an older version had written to it.
    for (name, open) in [("", 0o755), ("bus/default", 0o755)] {
        fs::set_permissions(state.join(name), fs::Permissions::from_mode(open)).unwrap();
    }
    mesh.restart().await;
    let orders = mesh.sidecar("shop", "orders").await;
    assert!(publish(&orders, "default", event("1")).await.error.is_none());
    let _registered = orders.register(registration("orders", "orders-1", 15006)).await;
    mesh.restart().await;
    assert_eq!(mode(&state), 0o755, "that is for whoever made it to say");
    for folder in ["bus", "bus/default", "ca", "tokens"] {
        assert_eq!(mode(&state.join(folder)), 0o700, "{folder}");
    }
    for file in ["bus/default/log.redb", "bus/default/log.journal", "registrations.json"] {
        assert_eq!(mode(&state.join(file)), 0o600, "{file}");
    }
}
