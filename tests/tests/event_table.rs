//! One table of what events promise, run on the embedded bus and on a real `nats-server`, with the same expectations.
//!
//! Each case has a topic and a subscription of its own; all share one mesh of real processes, and run beside each
//! other. `DUET_EVENT_CASES` is part of the names of the cases to run. One line a case:
//! `cargo test -p duet-tests --test event_table -- --nocapture`.
//!
//! The rooms, in the order of their use: `world` is the mesh, `case` one row of the table, the others are the rows.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    clippy::wildcard_imports,
    reason = "tests: a failure here is a failed test, and a table is long"
)]

mod event_table {
    pub(crate) mod answers;
    pub(crate) mod case;
    pub(crate) mod envelopes;
    pub(crate) mod operate;
    pub(crate) mod order;
    pub(crate) mod selection;
    pub(crate) mod time;
    pub(crate) mod types;
    pub(crate) mod world;
}

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use duet_tests::nats::Backend;
use event_table::case::Case;
use event_table::world::World;
use event_table::{answers, envelopes, operate, order, selection, time, types};
use futures::{FutureExt as _, StreamExt as _};

/// Cases at once: most of each is waiting.
const AT_ONCE: usize = 16;

fn table() -> Vec<Case> {
    let mut table = envelopes::cases();
    table.extend(answers::cases());
    table.extend(order::cases());
    table.extend(time::cases());
    table.extend(selection::cases());
    table.extend(operate::cases());
    table.extend(types::cases());
    let only = std::env::var("DUET_EVENT_CASES").unwrap_or_default();
    table.retain(|case| case.name.contains(&only));
    table
}

async fn run(backend: Backend) {
    let table = table();
    let name = backend.name();
    let world = Arc::new(World::start(backend, &table).await);
    let outcomes: Vec<(String, bool)> = futures::stream::iter(table)
        .map(|case| {
            let world = Arc::clone(&world);
            async move {
                let run = AssertUnwindSafe((case.run)(world, case.names()));
                // A task of its own: a panic ends the case and not the table.
                let passed = tokio::spawn(run.catch_unwind()).await.unwrap().is_ok();
                eprintln!("{name}: {}: {}", if passed { "passed" } else { "FAILED" }, case.name);
                (case.name, passed)
            }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let failed: Vec<&str> =
        outcomes.iter().filter(|(_, passed)| !passed).map(|(name, _)| name.as_str()).collect();
    eprintln!("{name}: {} of {} cases passed", outcomes.len() - failed.len(), outcomes.len());
    assert!(failed.is_empty(), "{name}: {failed:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_the_embedded_bus() {
    run(Backend::Embedded).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_nats_jetstream() {
    if let Some(backend) = Backend::nats().await {
        run(backend).await;
    }
}

#[test]
fn the_table_is_as_long_as_it_says() {
    if std::env::var_os("DUET_EVENT_CASES").is_some() {
        return;
    }
    let table = table();
    assert!(table.len() >= 80, "{}", table.len());
    let mut names: Vec<&str> = table.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), table.len(), "names are unique");
}
