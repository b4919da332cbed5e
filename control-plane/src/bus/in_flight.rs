//! What a sidecar has in hand of one subscription, by bytes. Its consumers share the room of its connection, so that many
//! large events at a slow application do not take more memory than a sidecar has.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::listen::EVENT_BYTES;

/// The deliveries of one consumer without an answer.
#[derive(Debug)]
pub(super) struct InFlight {
    room: Arc<Semaphore>,
    open: HashMap<u64, Space>,
}

/// What one delivery takes of the room; nothing if it went without.
pub(super) type Space = Option<OwnedSemaphorePermit>;

impl InFlight {
    /// In a room of [`EVENT_BYTES`].
    pub(super) fn new(room: Arc<Semaphore>) -> Self {
        Self { room, open: HashMap::new() }
    }

    /// Waits until there is room for one more. A consumer that has nothing gets one at once, whatever others have.
    ///
    /// # Cancel safety
    /// Dropping the future takes nothing.
    pub(super) async fn space(&self, bytes: usize) -> Space {
        // One that is larger than the room takes all of it.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(EVENT_BYTES);
        let room = Arc::clone(&self.room);
        if self.open.is_empty() {
            return room.try_acquire_many_owned(bytes).ok();
        }
        // Nobody closes it.
        room.acquire_many_owned(bytes).await.ok()
    }

    /// A delivery is on its way.
    pub(super) fn add(&mut self, delivery: u64, space: Space) {
        self.open.insert(delivery, space);
    }

    /// A delivery is decided.
    pub(super) fn remove(&mut self, delivery: u64) {
        self.open.remove(&delivery);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn consumers_of_one_connection_share_its_room_and_each_gets_one() {
        let room = Arc::new(Semaphore::new(EVENT_BYTES as usize));
        let (mut first, mut second) = (InFlight::new(Arc::clone(&room)), InFlight::new(room));
        let quarter = EVENT_BYTES as usize / 4;
        for delivery in 1..=4 {
            first.add(delivery, first.space(quarter).now_or_never().unwrap());
        }
        assert!(first.space(1).now_or_never().is_none(), "full");
        second.add(1, second.space(quarter).now_or_never().unwrap());
        assert!(second.space(1).now_or_never().is_none(), "it has one");
        first.remove(1);
        second.add(2, second.space(quarter).now_or_never().unwrap());
        assert!(first.space(1).now_or_never().is_none(), "what one leaves is for all");
        drop(second);
        first.add(5, first.space(quarter).now_or_never().unwrap());
        (2..=5).for_each(|delivery| first.remove(delivery));
        first.add(6, first.space(2 * EVENT_BYTES as usize).now_or_never().unwrap());
        assert!(first.space(1).now_or_never().is_none());
        first.remove(6);
        assert_eq!(first.room.available_permits(), EVENT_BYTES as usize);
    }
}
