//! The rooms of the control plane import only rooms of a lower rank (see the crate's documentation).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};

const RANKS: [(&str, u32); 20] = [
    ("lib", 7),
    ("main", 7),
    ("app", 6),
    ("admin", 5),
    ("check", 5),
    ("operate", 5),
    ("sources", 4),
    ("serve", 4),
    ("certify", 4),
    ("bus", 4),
    ("compile", 3),
    ("store", 3),
    ("listen", 3),
    ("token", 3),
    ("index", 2),
    ("ca", 2),
    ("config", 2),
    ("expression", 2),
    ("telemetry", 1),
    ("revoked", 1),
];

fn rank(room: &str) -> u32 {
    let found = RANKS.iter().find(|(name, _)| *name == room);
    found.unwrap_or_else(|| panic!("the room {room:?} has no rank")).1
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Rooms that a source names after `crate::`.
fn imports(text: &str) -> impl Iterator<Item = &str> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.flat_map(|line| line.split("crate::").skip(1)).map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
        rest.split_at(end).0
    })
}

#[test]
fn rooms_import_lower_ranks_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 30, "{files:?}");
    for file in files {
        let relative = file.strip_prefix(&root).unwrap().to_str().unwrap();
        let room = relative.split(['/', '.']).next().unwrap();
        // Tests may build what they look at from any room below the root.
        let is_test = relative.ends_with("tests.rs");
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            let lower = rank(import) < rank(room) || import == room || is_test;
            assert!(lower, "{relative} (rank {}) imports {import}", rank(room));
        }
    }
}
