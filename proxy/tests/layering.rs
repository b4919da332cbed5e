//! Reads the sources and makes sure that every module imports only modules of a lower rank.

#![allow(clippy::unwrap_used, reason = "a test: what cannot be read fails it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Ranks, as `lib.rs` documents them.
const RANKS: [(&str, u32); 24] = [
    ("config", 1),
    ("telemetry", 2),
    ("error", 2),
    ("drain", 2),
    ("net", 2),
    ("identity", 3),
    ("http", 4),
    ("discovery", 5),
    ("register", 5),
    ("detect", 6),
    ("listen", 6),
    ("route", 6),
    ("filter", 6),
    ("policy", 6),
    ("balance", 6),
    ("connect", 6),
    ("record", 6),
    ("outbound", 7),
    ("inbound", 7),
    ("relay", 7),
    ("admin", 8),
    ("app", 9),
    ("lib", 10),
    ("main", 10),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The top-level module that a file belongs to.
fn module(root: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(root).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

#[test]
fn modules_import_only_lower_ranks() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let ranks: BTreeMap<&str, u32> = RANKS.into_iter().collect();
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 20, "the sources were not found");
    let mut wrong = Vec::new();
    for file in files {
        let own = module(&root, &file);
        let own_rank = *ranks.get(own.as_str()).unwrap_or_else(|| panic!("{own} has no rank"));
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for (_, rest) in
                code.match_indices("crate::").map(|(at, hit)| (at, &code[at + hit.len()..]))
            {
                let name: String =
                    rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let Some(rank) = ranks.get(name.as_str()) else {
                    continue;
                };
                if name != own && *rank >= own_rank {
                    wrong.push(format!("{}:{}: {own} imports {name}", file.display(), number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
