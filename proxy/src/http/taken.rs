//! Knowing that a request is on its way.

use std::sync::Arc;

use tokio::sync::Notify;

/// For the extensions of a request with a body that goes out by HTTP/2: told once the connection takes the first of it.
/// Until then the peer has seen nothing of that: peers say how many requests they take at once, and how much they read.
#[derive(Clone, Debug, Default)]
pub struct Taken(Arc<Notify>);

impl Taken {
    /// Tells whoever waits, now or later.
    pub fn tell(&self) {
        self.0.notify_one();
    }

    /// Waits for it.
    pub async fn told(&self) {
        self.0.notified().await;
    }
}
