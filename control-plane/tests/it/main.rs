//! A whole control plane in this process, on loopback with free ports and a temporary state folder, met by clients that
//! speak the sidecar's protocol.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests; helpers included"
)]

mod bus;
mod delivery;
mod discovery;
mod identity;
mod mesh;
mod private_files;
mod publish_bounds;
mod resources;
mod selection;
