//! Free ports for processes that are told theirs.

use std::net::TcpListener;

/// A port of 127.0.0.1 that is free now, below those that Linux gives to connections: one of these could take it before
/// the process has started that is to listen there, or while it starts again.
#[must_use]
pub fn free_port() -> u16 {
    loop {
        let port = u16::try_from(10_000 + uuid::Uuid::new_v4().as_u128() % 20_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
