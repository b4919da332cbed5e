//! Fixtures for end-to-end tests: real processes, real sockets, everything on 127.0.0.1, everything ended and
//! removed at the end of a test.
//!
//! - [`mesh`]: a control plane and sidecars, each a process of its own, beside applications in the test itself;
//! - [`web`]: the same with one service and a caller, for tests of policies;
//! - [`up`]: a whole mesh by `duet up`;
//! - [`app`]: an application that says what it was asked; [`http`]: a client; [`metrics`]: reading `/metrics`;
//! - [`nats`]: a real server of the other kind of bus;
//! - [`outbox`]: applications with an outbox table;
//! - [`port`]: free ports; [`postgres`]: a PostgreSQL server;
//! - [`tools`]: foreign programs, and how a test is skipped loudly where one is missing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::missing_panics_doc,
    clippy::missing_errors_doc,
    clippy::cast_precision_loss,
    reason = "fixtures of tests: a failure here is a failed test"
)]

pub mod app;
pub mod http;
pub mod mesh;
pub mod metrics;
pub mod nats;
pub mod outbox;
pub mod port;
pub mod postgres;
pub mod process;
pub mod tools;
pub mod up;
pub mod web;

use std::time::{Duration, Instant};

/// Asks again until the answer is `Some`, and fails the test with `what` after `limit`.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    ask: impl Fn() -> F,
) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Long enough for a slow machine that builds something else.
pub const SOON: Duration = Duration::from_secs(30);
