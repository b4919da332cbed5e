//! `duet events`, driven as an operator drives it: every command of docs/events.md by the `duet` binary, against a real
//! mesh; for people and as JSON, and what it says when it cannot. Moving a bus (`migrate`) is in migrate.rs.
//!
//! `operator` is what all of them use; the others have a group of commands each.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

mod operate {
    pub(crate) mod dead_letters;
    pub(crate) mod look;
    pub(crate) mod operator;
    pub(crate) mod publish;
    pub(crate) mod steer;
}
