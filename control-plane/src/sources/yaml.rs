//! Watches the configured files and folders and keeps the index as they say. The operating system tells of changes; a
//! look twice a second finds those that it does not tell of (swapped `ConfigMap` links, network file systems). A change
//! is read once the files have been still for a moment, so that half-written files are not.
//!
//! Runs on a thread of its own: it only ever waits and reads files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use duet_api::resource::ParseError;
use notify::{RecursiveMode, Watcher as _};

use super::files::{self, FileSet, Scan};
use crate::compile::validate::{Findings, validate};
use crate::store::Store;
use crate::telemetry::Metrics;

/// How often files are looked at without being told of a change.
const POLL: Duration = Duration::from_millis(500);
/// How long files must be still before they are read.
const STILL: Duration = Duration::from_millis(50);
/// Files that never are still are read anyway after this many looks.
const MAX_LOOKS: usize = 6;

/// How long a service that nobody knows may be one whose replicas are still to register, or register again: those that were
/// there before this process, or lost their connection, are back within some seconds.
const REGISTRATION: Duration = Duration::from_secs(10);

/// The YAML source.
pub struct YamlSource {
    paths: Vec<PathBuf>,
    store: Arc<Store>,
    metrics: Metrics,
    set: FileSet,
    scan: Scan,
    /// Errors and warnings of the files themselves.
    errors: Vec<ParseError>,
    warnings: Vec<ParseError>,
    /// Everything that is wrong and was logged.
    reported: BTreeSet<String>,
    validated: u64,
    /// Some services that nobody knows are not reported before.
    registered: Option<Instant>,
}

impl std::fmt::Debug for YamlSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("YamlSource").field("paths", &self.paths).finish_non_exhaustive()
    }
}

enum Wake {
    Changed,
    Stop,
}

/// Stops the watching when dropped.
#[derive(Debug)]
pub struct Watching {
    stop: Sender<Wake>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        let running = self.stop.send(Wake::Stop).is_ok();
        if let Some(thread) = self.thread.take()
            && running
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches the configuration panicked");
        }
    }
}

impl YamlSource {
    /// Reads everything once. What is wrong is logged and counted; what is good applies.
    #[must_use]
    pub fn load(paths: Vec<PathBuf>, store: Arc<Store>, metrics: Metrics) -> Self {
        let mut source = Self {
            paths,
            store,
            metrics,
            set: FileSet::default(),
            scan: Scan::default(),
            errors: Vec::new(),
            warnings: Vec::new(),
            reported: BTreeSet::new(),
            validated: 0,
            registered: None,
        };
        source.reload(false);
        source
    }

    /// Goes on with every change until the result is dropped.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn watch(self) -> std::io::Result<Watching> {
        let (wake, woken) = channel();
        let stop = wake.clone();
        let thread = std::thread::Builder::new()
            .name("duet-config".to_owned())
            .spawn(move || self.run(&woken, wake))?;
        Ok(Watching { stop, thread: Some(thread) })
    }

    fn run(mut self, woken: &Receiver<Wake>, wake: Sender<Wake>) {
        // Dropped, it stops telling.
        let _watcher = watch_paths(&self.paths, wake);
        // What changed before the watch was there.
        let mut told = true;
        loop {
            let seen = files::scan(&self.paths);
            if told || seen != self.scan {
                self.wait_until_still(seen);
                self.reload(true);
            } else {
                self.revalidate(false);
            }
            told = match woken.recv_timeout(POLL) {
                Ok(Wake::Changed) => true,
                Err(RecvTimeoutError::Timeout) => false,
                Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            };
            while let Ok(more) = woken.try_recv() {
                if matches!(more, Wake::Stop) {
                    return;
                }
            }
        }
    }

    fn wait_until_still(&self, mut seen: Scan) {
        for _ in 0..MAX_LOOKS {
            std::thread::sleep(STILL);
            let again = files::scan(&self.paths);
            if again == seen {
                return;
            }
            seen = again;
        }
    }

    /// `at_once`: a service that nobody knows, in what is different, is said and not waited for.
    fn reload(&mut self, at_once: bool) {
        // The scan comes first: a change during the reading makes the next scan differ.
        self.scan = files::scan(&self.paths);
        let loaded = self.set.update(files::read(&self.scan), &self.scan.failed);
        // First: nobody is to take what an error hides for gone.
        self.store.set_incomplete(!loaded.errors.is_empty());
        let affected = self.store.replace_resources(&loaded.resources);
        (self.errors, self.warnings) = (loaded.errors, loaded.warnings);
        let mut kinds: BTreeMap<&str, i64> = BTreeMap::new();
        for key in loaded.resources.keys() {
            *kinds.entry(key.kind).or_default() += 1;
        }
        self.metrics.resources.reset();
        for (kind, count) in kinds {
            self.metrics.resources.with_label_values(&[kind]).set(count);
        }
        if !affected.is_empty() {
            self.metrics.config_applied.inc();
            let (resources, services) = (loaded.resources.len(), affected.services.len());
            tracing::info!(resources, services_changed = services, "configuration applied");
        }
        self.validated = 0;
        self.revalidate(at_once && !affected.is_empty());
    }

    /// Looks for references that lead nowhere again when anything changed: replicas that come make services known.
    fn revalidate(&mut self, at_once: bool) {
        let generation = self.store.read(|view| view.generation);
        let due = self.registered.is_some_and(|at| Instant::now() >= at);
        if generation == self.validated && !due {
            return;
        }
        self.validated = generation;
        let Findings { mut errors, mut unregistered, mut warnings } =
            self.store.read(|view| validate(view.index));
        if at_once || due {
            self.registered = None;
        } else {
            let all = unregistered.len();
            unregistered.retain(|error| self.reported.contains(&error.to_string()));
            if unregistered.len() < all {
                self.registered.get_or_insert_with(|| Instant::now() + REGISTRATION);
            }
        }
        errors.append(&mut unregistered);
        errors.extend(self.errors.iter().cloned());
        warnings.extend(self.warnings.iter().cloned());
        self.metrics.config_errors.set(i64::try_from(errors.len()).unwrap_or(i64::MAX));
        let (errors, warnings) = (files::texts(&errors), files::texts(&warnings));
        let fresh = |error: &&String| !self.reported.contains(*error);
        for error in warnings.iter().filter(fresh) {
            tracing::warn!("{error}");
        }
        let mut rejected = false;
        for error in errors.iter().filter(fresh) {
            tracing::error!("{error}");
            rejected = true;
        }
        if rejected {
            self.metrics.config_rejected.inc();
        }
        for mended in
            self.reported.iter().filter(|e| !errors.contains(*e) && !warnings.contains(*e))
        {
            tracing::info!("no longer: {mended}");
        }
        self.reported = errors;
        self.reported.extend(warnings);
    }
}

/// Asks the operating system to tell of changes. A file is watched through its folder: editors replace files.
fn watch_paths(paths: &[PathBuf], wake: Sender<Wake>) -> Option<notify::RecommendedWatcher> {
    let handler = move |event: notify::Result<notify::Event>| {
        // Reading is an event too, our own included.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // The receiver is gone only when the watching ends.
            drop(wake.send(Wake::Changed));
        }
    };
    let mut watcher = notify::recommended_watcher(handler)
        .inspect_err(|error| {
            tracing::warn!(%error, "the system tells of no file changes; files are looked at every 500 ms");
        })
        .ok()?;
    for path in paths {
        let (folder, mode) = if path.is_dir() {
            (path.as_path(), RecursiveMode::Recursive)
        } else {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")), RecursiveMode::NonRecursive)
        };
        if let Err(error) = watcher.watch(folder, mode) {
            let path = folder.display();
            tracing::warn!(%path, %error, "cannot watch; files are looked at every 500 ms");
        }
    }
    Some(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::testing::replica;
    use crate::index::Change;

    const ROUTE: &str = "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, \
        metadata: {name: r, namespace: shop}, spec: {parentRefs: [{kind: Service, name: NAME}]}}\n";

    /// Of a start with routes of two services that no resource declares.
    fn started() -> (tempfile::TempDir, YamlSource) {
        let dir = tempfile::TempDir::new().unwrap();
        for name in ["b", "c"] {
            let route = ROUTE.replace("NAME", name).replace("name: r", &format!("name: {name}"));
            std::fs::write(dir.path().join(format!("{name}.yaml")), route).unwrap();
        }
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        let source =
            YamlSource::load(vec![dir.path().to_owned()], Arc::new(Store::default()), metrics);
        (dir, source)
    }

    fn errors(source: &mut YamlSource) -> i64 {
        source.revalidate(false);
        source.metrics.config_errors.get()
    }

    #[test]
    fn replicas_have_time_to_register() {
        let (dir, mut source) = started();
        source.reload(true);
        assert_eq!(errors(&mut source), 0);
        let there = replica("b", "b-1", &["8080"]);
        source.store.apply([Change::PutReplica(there.clone())]);
        assert_eq!(errors(&mut source), 0);
        // Without any change: the time is over.
        source.registered = Some(Instant::now());
        assert_eq!(errors(&mut source), 1);
        assert_eq!(source.metrics.config_rejected.get(), 1);
        // So have those that left, and what was said stays said.
        source.store.apply([Change::RemoveReplica(there.key())]);
        assert_eq!(errors(&mut source), 1);
        source.registered = Some(Instant::now());
        assert_eq!(errors(&mut source), 2);
        source.store.apply([Change::PutReplica(there)]);
        assert_eq!(errors(&mut source), 1);
        // What somebody wrote just now is said at once.
        std::fs::write(dir.path().join("d.yaml"), ROUTE.replace("NAME", "d")).unwrap();
        source.reload(true);
        assert_eq!(source.metrics.config_errors.get(), 2);
    }
}
