//! Whether what the application said of its subscriptions still holds: it may have been replaced, and so quickly that
//! nobody saw it away. Imports nothing of the relay.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// What the application said when it was in doubt holds for this long: handlers that answer 404 to every event are no
/// reason to ask it all the time.
const HOLDS: Duration = Duration::from_secs(1);

/// Reasons to ask the application again. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct Doubts(Arc<Times>);

#[derive(Debug, Default)]
struct Times {
    /// Of the youngest reason.
    raised: watch::Sender<Option<Instant>>,
    /// When it was asked what it last answered.
    asked: watch::Sender<Option<Instant>>,
    /// The youngest question of which somebody needed the answer.
    resolved: watch::Sender<Option<Instant>>,
}

impl Doubts {
    /// Something happened that may mean that the application is another one.
    pub(super) fn raise(&self) {
        self.0.raised.send_replace(Some(Instant::now()));
    }

    /// Returns when the application has said what it wants now, and that is in force.
    pub(super) async fn resolved(&self) {
        let now = Instant::now();
        let holds = |asked: Instant| asked + HOLDS > now && *self.0.raised.borrow() <= Some(asked);
        if self.0.resolved.borrow().is_some_and(holds) {
            return;
        }
        self.raise();
        let mut asked = self.0.asked.subscribe();
        // Never fails: the sender is ours.
        if let Ok(asked) = asked.wait_for(|asked| *asked >= Some(now)).await {
            self.0.resolved.send_replace(*asked);
        }
    }

    /// What the application answered to a question of that time is in force.
    pub(super) fn answered(&self, asked: Instant) {
        self.0.asked.send_replace(Some(asked));
    }

    /// Whether there is a reason to ask.
    pub(super) fn any(&self) -> bool {
        *self.0.raised.borrow() > *self.0.asked.borrow()
    }

    /// Waits for a reason to ask, and until what was said may be asked again.
    pub(super) async fn due(&self) {
        let asked = *self.0.asked.borrow();
        let mut raised = self.0.raised.subscribe();
        // Never fails: the sender is ours.
        raised.wait_for(|raised| *raised > asked).await.map(drop).unwrap_or_default();
        if let Some(asked) = asked {
            sleep_until(asked + HOLDS).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_doubt_is_resolved_by_a_question_that_is_not_older() {
        let doubts = Doubts::default();
        doubts.answered(Instant::now());
        tokio::time::advance(HOLDS / 2).await;
        let mut resolved = std::pin::pin!(doubts.resolved());
        assert!(resolved.as_mut().now_or_never().is_none(), "it may be another one by now");
        assert!(doubts.any());
        doubts.due().await;
        doubts.answered(Instant::now());
        resolved.await;
        assert!(!doubts.any());
        tokio::time::advance(HOLDS / 2).await;
        assert!(
            doubts.resolved().now_or_never().is_some(),
            "it was asked because of another event"
        );
        doubts.raise();
        assert!(doubts.resolved().now_or_never().is_none());
        doubts.answered(Instant::now());
        tokio::time::advance(HOLDS).await;
        assert!(doubts.resolved().now_or_never().is_none(), "that is long ago");
    }

    #[tokio::test(start_paused = true)]
    async fn the_application_is_not_asked_all_the_time() {
        let doubts = Doubts::default();
        doubts.raise();
        doubts.due().await;
        let first = Instant::now();
        doubts.answered(first);
        assert!(doubts.due().now_or_never().is_none());
        tokio::time::advance(HOLDS / 4).await;
        doubts.raise();
        doubts.due().await;
        assert_eq!(first.elapsed(), HOLDS);
    }
}
