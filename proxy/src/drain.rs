//! The order of leaving: readiness goes, then new work stops, then what is in flight ends or the grace period
//! does.
//!
//! Two phases (see `ARCHITECTURE.md`): in the first, peers' calls and subscriptions drain while the
//! application's own calls and publishes go on; in the second, those end too. Then what waits in the outbox goes to its
//! bus: a replica's disk often goes with it.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Signals and task sets of the two phases. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Phase one: stop accepting peers' calls, stop pulling events.
    pub inbound: CancellationToken,
    /// Phase two: stop accepting the application's calls and publishes.
    pub outbound: CancellationToken,
    /// The application is done: bring what waits to the bus.
    pub flush: CancellationToken,
    /// The grace period is over: drop what is left.
    pub force: CancellationToken,
    /// Peers' connections.
    pub inbound_tasks: TaskTracker,
    /// The application's connections.
    pub outbound_tasks: TaskTracker,
    /// What has to reach the bus before the process ends.
    pub flush_tasks: TaskTracker,
    /// Background work without a connection: renewals, discovery, relays.
    pub background: TaskTracker,
}
