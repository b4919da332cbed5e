//! Rows of an application's own table, published as events: the relay behind an `OutboxSource`.
//!
//! # The life of a row
//!
//! 1. The application inserts it, in the transaction that it is about. Nothing of ours sees it before the commit.
//! 2. The sidecar that leads (one of the service's replicas, by a lock in the database) reads the rows that are
//!    there, in the order of their sequence (`table`: `sqlite` and `postgres`).
//! 3. `row` makes events of them; `plan` leaves out what cannot be published, and what would overtake that.
//! 4. `relay` publishes them to the bus itself, not to the sidecar's outbox: until the bus has them, the table is the
//!    safer place.
//! 5. What was acknowledged is deleted, or marked. `owed` remembers it until that is done, so that whatever is in the
//!    way of it, nothing is published twice. If the sidecar dies before, the rows are published again with the same
//!    ids, and the bus knows them.
//!
//! Modules from the top, each imports only those below: `relay`, `plan` `owed`, `table`, `sqlite` `postgres`, `row`
//! `columns` `excluded` `metrics`, `spec`. Of the workspace: `duet_events` and `duet_api`.

mod columns;
mod excluded;
mod metrics;
mod owed;
mod plan;
mod postgres;
mod relay;
mod row;
mod spec;
mod sqlite;
mod table;

pub use metrics::SourceMetrics;
pub use relay::Relay;
pub use spec::{SourceError, SourceSpec};
