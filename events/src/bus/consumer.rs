//! The receiving end of a subscription, the same for every bus.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use futures::stream::{BoxStream, Stream, StreamExt};
use parking_lot::Mutex;

use super::{ConsumeError, Settle};
use crate::cloudevent::Event;

/// One event, handed out once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Names this delivery to [`Settler::settle`]; unique in its consumer.
    pub id: u64,
    /// The event's position in its topic.
    pub position: u64,
    /// 1 for the first try.
    pub attempt: u32,
    /// Another one since the subscription was moved: an event of an older generation that comes again was replayed, and
    /// one of the same is delivered again because nobody knows whether it was handled.
    pub generation: u64,
    /// The event.
    pub event: Event,
    /// Where the subscription's routes send it; `None` for the subscription's own path.
    pub path: Option<String>,
}

/// What a bus does for its consumers.
pub trait ConsumerBackend: Send + Sync {
    /// A delivery is decided. Called at most once for each delivery; must not block. False: the bus will not hear of it,
    /// as the way to it is gone.
    fn settle(&self, delivery: u64, outcome: Settle) -> bool;
    /// The consumer wants nothing more, and still settles what it has. Called at most once; must not block. What was
    /// handed out and not read by then may still come.
    fn retire(&self);
    /// The consumer is gone: everything unsettled goes back, unspent. Called once; must not block. The stream of
    /// deliveries ends when every settle before it has arrived.
    fn close(&self);
}

/// One consumer of a subscription. The bus keeps at most `max_in_flight` deliveries open: the next comes when one
/// is settled. Dropping it returns everything unsettled, unspent, and later settles are ignored.
pub struct Consumer {
    deliveries: BoxStream<'static, Result<Delivery, ConsumeError>>,
    settler: Settler,
}

impl Consumer {
    /// Joins the two halves that a bus made.
    #[must_use]
    pub fn new(
        deliveries: impl Stream<Item = Result<Delivery, ConsumeError>> + Send + 'static,
        backend: Arc<dyn ConsumerBackend>,
    ) -> Self {
        let shared = Shared { open: Mutex::new(Some(HashSet::new())), backend };
        Self { deliveries: deliveries.boxed(), settler: Settler { shared: Arc::new(shared) } }
    }

    /// The next delivery. After an error, or with `None`, this consumer is over; consume again.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Result<Delivery, ConsumeError>> {
        let next = self.deliveries.next().await;
        if let Some(Ok(delivery)) = &next
            && let Some(open) = self.settler.shared.open.lock().as_mut()
        {
            open.insert(delivery.id);
        }
        next
    }

    /// Asks for nothing more, so that others get it: what this consumer has can still be settled. What is on its way
    /// already still comes out of [`Self::next`], and is to be released.
    pub fn retire(&self) {
        // Under the lock, so that it does not come after the close.
        let open = self.settler.shared.open.lock();
        if open.is_some() {
            self.settler.shared.backend.retire();
        }
    }

    /// Ends the consumer and returns when the bus has taken every settle, or is gone. What is still unsettled goes back,
    /// unspent.
    pub async fn finish(mut self) {
        self.settler.shared.close();
        while self.deliveries.next().await.is_some() {}
    }

    /// A handle that decides on deliveries; cheap to clone into the tasks that call the app.
    #[must_use]
    pub fn settler(&self) -> Settler {
        self.settler.clone()
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.settler.shared.close();
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").finish_non_exhaustive()
    }
}

/// Decides on deliveries of one [`Consumer`].
#[derive(Clone)]
pub struct Settler {
    shared: Arc<Shared>,
}

struct Shared {
    /// Deliveries handed out and not settled; `None` once the consumer is gone. Bounds what can be
    /// queued for the bus: each delivery is settled at most once.
    open: Mutex<Option<HashSet<u64>>>,
    backend: Arc<dyn ConsumerBackend>,
}

impl Shared {
    fn close(&self) {
        // Under the lock, so that no settle comes after the close.
        let mut open = self.open.lock();
        if open.take().is_some() {
            self.backend.close();
        }
    }
}

impl Settler {
    /// Decides on a delivery; never blocks. False: it was settled before or the consumer is gone, and nothing happened.
    pub fn settle(&self, delivery: u64, outcome: Settle) -> bool {
        let mut open = self.shared.open.lock();
        let known = open.as_mut().is_some_and(|open| open.remove(&delivery));
        known && self.shared.backend.settle(delivery, outcome)
    }

    /// Whether the consumer is gone: no settle arrives any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shared.open.lock().is_none()
    }
}

impl fmt::Debug for Settler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settler").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl ConsumerBackend for Recorder {
        fn settle(&self, delivery: u64, outcome: Settle) -> bool {
            self.0.lock().push(format!("{delivery} {outcome:?}"));
            true
        }
        fn retire(&self) {}
        fn close(&self) {
            self.0.lock().push("close".into());
        }
    }

    #[tokio::test]
    async fn a_delivery_is_settled_once_and_never_after_the_close() {
        let recorder = Arc::new(Recorder::default());
        let backend: Arc<dyn ConsumerBackend> = Arc::<Recorder>::clone(&recorder);
        let event = Event::new("1", "/s", "t").unwrap();
        let deliveries = [7, 8].map(|id| {
            let event = event.clone();
            Ok(Delivery { id, position: id, attempt: 1, generation: 0, event, path: None })
        });
        let mut consumer = Consumer::new(futures::stream::iter(deliveries), backend);
        let settler = consumer.settler();
        assert!(!settler.settle(7, Settle::Ack), "not handed out yet");
        consumer.next().await.unwrap().unwrap();
        consumer.next().await.unwrap().unwrap();
        assert!(settler.settle(7, Settle::Ack));
        assert!(!settler.settle(7, Settle::Ack));
        consumer.finish().await;
        assert!(!settler.settle(8, Settle::Ack));
        assert_eq!(*recorder.0.lock(), ["7 Ack", "close"]);
    }
}
