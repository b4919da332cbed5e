//! Files of resources: finds them, reads them, and keeps for each the last state that was good. [`FileSet`] is pure;
//! only [`scan`] and [`read`] touch the disk.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use duet_api::resource::{Field, Located, ObjectKey, ParseError, parse};

use crate::compile::lint;

/// Larger files are refused.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// Tells whether a file changed, without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

/// The files that there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// By path.
    pub files: BTreeMap<PathBuf, Stamp>,
    /// Paths that could not be looked at, and why.
    pub failed: BTreeMap<PathBuf, String>,
}

/// Finds the files of the given files and folders: in folders, recursively, every `*.yaml` and `*.yml`. Names that start
/// with a dot are passed over: a mounted `ConfigMap` keeps its versions in such folders.
#[must_use]
pub fn scan(paths: &[PathBuf]) -> Scan {
    let mut walk = Walk::default();
    for path in paths {
        walk.visit(path, true);
    }
    walk.scan
}

#[derive(Default)]
struct Walk {
    scan: Scan,
    /// Folders by device and inode: each is read once, so that links cannot lead in circles.
    folders: HashSet<(u64, u64)>,
}

impl Walk {
    fn visit(&mut self, path: &Path, given: bool) {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            // Deleted since its folder was listed, or a dangling link.
            Err(_) if !given => return,
            Err(error) => {
                self.scan.failed.insert(path.to_owned(), error.to_string());
                return;
            }
        };
        if metadata.is_dir() {
            if self.folders.insert((metadata.dev(), metadata.ino())) {
                self.visit_folder(path);
            }
        } else if given || is_yaml(path) {
            let stamp = Stamp {
                modified: metadata.modified().ok(),
                bytes: metadata.len(),
                inode: metadata.ino(),
            };
            self.scan.files.insert(path.to_owned(), stamp);
        }
    }

    fn visit_folder(&mut self, path: &Path) {
        let entries = fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match entries {
            Ok(mut entries) => {
                entries.sort_by_key(fs::DirEntry::file_name);
                for entry in entries {
                    if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                        self.visit(&entry.path(), false);
                    }
                }
            }
            Err(error) => {
                self.scan.failed.insert(path.to_owned(), error.to_string());
            }
        }
    }
}

fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
}

/// Texts of the files of a scan, or why one cannot be read.
#[must_use]
pub fn read(scan: &Scan) -> BTreeMap<PathBuf, Result<String, String>> {
    let read = |path: &PathBuf, stamp: &Stamp| {
        if stamp.bytes > MAX_FILE_BYTES {
            return Err(format!("has {} bytes, more than {MAX_FILE_BYTES}", stamp.bytes));
        }
        fs::read_to_string(path).map_err(|error| error.to_string())
    };
    scan.files.iter().map(|(path, stamp)| (path.clone(), read(path, stamp))).collect()
}

/// What the files come to.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// What applies, by key.
    pub resources: BTreeMap<ObjectKey, Arc<Located>>,
    /// What is wrong in the files as they are now.
    pub errors: Vec<ParseError>,
    /// What is there in vain, in the order of files and lines.
    pub warnings: Vec<ParseError>,
}

/// Every file with its last good state. A file with any error stays as it last was without one; a file that never
/// was without errors gives what is good of it.
#[derive(Debug, Default)]
pub struct FileSet {
    files: BTreeMap<PathBuf, File>,
}

#[derive(Debug, Default)]
struct File {
    text: Option<String>,
    found: Vec<Arc<Located>>,
    errors: Vec<ParseError>,
    warnings: Vec<ParseError>,
    /// What applies now.
    applied: Vec<Arc<Located>>,
    /// `applied` is what `text` says.
    current: bool,
    /// `applied` was a whole file once.
    was_good: bool,
}

impl FileSet {
    /// Takes in what was read.
    pub fn update(
        &mut self,
        texts: BTreeMap<PathBuf, Result<String, String>>,
        failed: &BTreeMap<PathBuf, String>,
    ) -> Loaded {
        // Files under a folder that cannot be read now are not gone: they stay as they were.
        let lost = |path: &Path| failed.keys().any(|folder| path.starts_with(folder));
        self.files.retain(|path, _| texts.contains_key(path) || lost(path));
        for (path, text) in texts {
            self.files.entry(path.clone()).or_default().take(&path, text);
        }
        let mut loaded = Loaded::default();
        for (path, why) in failed {
            loaded.errors.push(unreadable(path, why));
        }
        for file in self.files.values() {
            loaded.warnings.extend(file.warnings.iter().cloned());
        }
        self.settle(&mut loaded);
        loaded.errors.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
        loaded
    }

    /// Decides for each file what applies. Files that nobody touched keep their names; of files that changed, the first
    /// to claim a name has it.
    fn settle(&mut self, loaded: &mut Loaded) {
        for file in self.files.values().filter(|file| file.current) {
            loaded.claim(&file.applied);
        }
        for file in self.files.values().filter(|file| !file.current && !file.errors.is_empty()) {
            loaded.errors.extend(file.errors.iter().cloned());
            if file.was_good {
                loaded.claim(&file.applied);
            }
        }
        for file in self.files.values_mut().filter(|file| !file.current) {
            let twice = if file.errors.is_empty() { loaded.conflicts(&file.found) } else { vec![] };
            if file.errors.is_empty() && twice.is_empty() {
                file.applied.clone_from(&file.found);
                (file.current, file.was_good) = (true, true);
            } else if !file.was_good {
                file.applied.clone_from(&file.found);
            }
            loaded.errors.extend(twice);
            loaded.claim(&file.applied);
        }
    }
}

impl File {
    fn take(&mut self, path: &Path, text: Result<String, String>) {
        match text {
            Ok(text) if self.text.as_ref() == Some(&text) => {}
            Ok(text) => {
                let parsed = parse(&path.display().to_string(), &text);
                (self.errors, self.warnings) = (parsed.errors, parsed.warnings);
                self.found.clear();
                for located in parsed.resources {
                    let wrong = lint::lint(&located);
                    if wrong.is_empty() {
                        self.found.push(Arc::new(located));
                    }
                    self.errors.extend(wrong);
                }
                self.text = Some(text);
                self.current = false;
            }
            Err(why) => {
                self.errors = vec![unreadable(path, &why)];
                (self.text, self.current) = (None, false);
            }
        }
    }
}

impl Loaded {
    /// Adds resources under names that are free.
    fn claim(&mut self, resources: &[Arc<Located>]) {
        for located in resources {
            let key = located.resource.key();
            self.resources.entry(key).or_insert_with(|| Arc::clone(located));
        }
    }

    /// An error for each resource whose name is taken, here or elsewhere in the same list.
    fn conflicts(&self, resources: &[Arc<Located>]) -> Vec<ParseError> {
        let mut own: BTreeMap<ObjectKey, &Located> = BTreeMap::new();
        let mut errors = Vec::new();
        for located in resources {
            let key = located.resource.key();
            let other = self.resources.get(&key).map(|other| &**other).or(own.get(&key).copied());
            if let Some(other) = other {
                let place = &other.origin;
                let path = [Field::Name("metadata"), Field::Name("name")];
                let text = format!("{key} is already defined at {}:{}", place.file, place.line);
                errors.push(located.origin.error(&path, text));
            } else {
                own.insert(key, located);
            }
        }
        errors
    }
}

fn unreadable(path: &Path, why: &str) -> ParseError {
    ParseError {
        file: path.display().to_string().into(),
        line: 1,
        column: 1,
        field: String::new(),
        message: format!("cannot be read: {why}"),
    }
}

/// The names in a list of errors, to tell new ones from old.
#[must_use]
pub fn texts(errors: &[ParseError]) -> BTreeSet<String> {
    errors.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests;
