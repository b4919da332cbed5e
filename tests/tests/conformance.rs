//! Gateway API's conformance cases through real processes: for each test a control plane with the test's resources, a
//! sidecar in front of every backend, and a sidecar for every namespace that requests come from.
//!
//! The cases are files beside this repository, of a format that their own README describes. Where they are missing, the
//! test is skipped. Environment:
//! - `DUET_CONFORMANCE`: the folder of the cases, from the root of the repository; default
//!   `../shared/conformance/public`. Its sibling `base` has what all tests start from, `index.json` lists the cases.
//! - `DUET_CONFORMANCE_ONLY`: part of the names of the tests to run.
//! - `DUET_CONFORMANCE_REPORT`: file to write the result to, as Markdown; `docs/conformance.md` is made with it.
//!
//! `cargo test -p duet-tests --test conformance -- --nocapture` shows every case.
//!
//! The harness, in the order of its use: `case` reads the files, `objects` finds what has to run, `cluster` runs it
//! with the backends of `echo`, `run` and `shares` send requests by `client`, `check` compares, `report` counts.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::cast_precision_loss,
    clippy::float_cmp,
    reason = "tests: a failure here is a failed test; counts are small, and a share of zero is written as zero"
)]

mod conformance {
    pub(crate) mod case;
    pub(crate) mod check;
    pub(crate) mod client;
    pub(crate) mod cluster;
    pub(crate) mod echo;
    pub(crate) mod objects;
    pub(crate) mod report;
    pub(crate) mod run;
    pub(crate) mod shares;
    pub(crate) mod websocket;
}

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use conformance::case::{Suite, Test};
use conformance::report::{self, TestResult};
use conformance::run;
use futures::{FutureExt as _, StreamExt as _};

/// Tests at once: each is mostly processes that start.
const AT_ONCE: usize = 3;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_that_is_for_a_mesh_passes() {
    let folder = setting("DUET_CONFORMANCE");
    let folder = root().join(folder.as_deref().unwrap_or("../shared/conformance/public"));
    if !folder.is_dir() {
        // Not part of this repository: not having it is no failure, even in continuous integration.
        eprintln!("SKIPPED: there are no conformance cases in {}", folder.display());
        return;
    }
    let mut suite = Suite::read(&folder.canonicalize().unwrap());
    if let Some(part) = setting("DUET_CONFORMANCE_ONLY") {
        suite.tests.retain(|test| test.name.contains(&part));
    }
    let running = futures::stream::iter(suite.tests.iter().map(|test| run_one(&suite, test)));
    let results: Vec<TestResult> = running.buffered(AT_ONCE).collect().await;
    let text = report::markdown(&results, suite.index.as_ref());
    eprintln!("\n{text}");
    if let Some(file) = setting("DUET_CONFORMANCE_REPORT") {
        std::fs::write(root().join(file), text).unwrap();
    }
    let failed: usize = results.iter().map(TestResult::failed).sum();
    assert_eq!(failed, 0, "cases have failed");
}

/// Runs a test. A fixture that fails takes only this test with it.
async fn run_one(suite: &Suite, test: &Test) -> TestResult {
    let running = AssertUnwindSafe(Box::pin(run::test(suite, test))).catch_unwind();
    let result = running
        .await
        .unwrap_or_else(|_| TestResult::broken(test, "the fixture failed, as said above"));
    eprint!("{}", result.lines());
    result
}
