//! Foreign programs, and skipping.

use std::path::PathBuf;

/// A program of the test tools (`scripts/test-deps.sh`), or of the machine. `None` where it is missing: the test is
/// then skipped, loudly; with `CI=true` that is a failure.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    let tools = std::env::var_os("DUET_TEST_TOOLS").map(PathBuf::from);
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-tools/venv/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = tools.into_iter().chain([default]).chain(std::env::split_paths(&path));
    let found = folders.map(|folder| folder.join(name)).find(|program| program.is_file());
    if found.is_none() {
        skip(&format!("{name} is missing; run scripts/test-deps.sh"));
    }
    found
}

/// Says that a test is skipped; fails it with `CI=true`.
pub fn skip(reason: &str) {
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "may not be skipped in CI: {reason}"
    );
    eprintln!("SKIPPED: {reason}");
}
