//! Patience with a cluster on which nobody decides just now: a server is gone, and the others elect who leads in its place.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::shared::Shared;
use crate::bus::ManageError;

/// Longer than servers take to elect a leader (4 to 9 s for each vote); with the last try it is over before an operator's
/// command stops waiting (30 s).
const ELECTION: Duration = Duration::from_secs(15);
/// The same without a connection, which another server gives at once.
const CONNECTION: Duration = Duration::from_secs(2);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(250);

/// For the steps of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience<'a> {
    shared: &'a Shared,
    since: Instant,
}

impl Shared {
    /// From now on.
    pub(super) fn patience(&self) -> Patience<'_> {
        Patience { shared: self, since: Instant::now() }
    }
}

impl Patience<'_> {
    /// Does a step again for as long as the cluster is away. It may have been done although no answer came: only what may
    /// be done twice.
    pub(super) async fn with<T, F>(self, step: impl Fn() -> F) -> Result<T, ManageError>
    where
        F: Future<Output = Result<T, ManageError>>,
    {
        loop {
            let why = match step().await {
                Err(ManageError::Away(why)) => why,
                done => return done,
            };
            let most = if self.shared.connected_now() { ELECTION } else { CONNECTION };
            let waited = self.since.elapsed();
            if waited >= most {
                let waited = waited.as_secs();
                return Err(ManageError::Away(format!("{why}; tried for {waited} s")));
            }
            sleep(PAUSE).await;
        }
    }
}
