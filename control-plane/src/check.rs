//! `duet check`: what a control plane would say about these files, without one. Imports [`crate::bus::monitor`],
//! [`crate::sources`], [`crate::compile`] and [`crate::index`].

use std::path::PathBuf;
use std::sync::Arc;

use duet_api::resource::{BusBackend, Field, ParseError, Resource};

use crate::bus::monitor::{durability, payload};
use crate::compile::validate::validate;
use crate::index::{Change, Index, Replica};
use crate::sources::files::{self, FileSet, Loaded};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Resources that can be used.
    pub resources: usize,
    /// What a control plane would refuse, and references that lead nowhere, in the order of files and lines.
    pub errors: Vec<ParseError>,
    /// What works, but hardly as meant, in the same order.
    pub warnings: Vec<ParseError>,
}

/// What files and folders hold, as far as it can be used, and what of them cannot be. Services that only registrations
/// would make known are missing, except for those of `expected`, replicas that are going to register.
#[must_use]
pub fn load(paths: &[PathBuf], expected: &[Replica]) -> (Index, Vec<ParseError>) {
    let (index, loaded) = read(paths, expected);
    (index, loaded.errors)
}

fn read(paths: &[PathBuf], expected: &[Replica]) -> (Index, Loaded) {
    let scan = files::scan(paths);
    let loaded = FileSet::default().update(files::read(&scan), &scan.failed);
    let mut index = Index::default();
    for located in loaded.resources.values() {
        index.apply(Change::Put(Arc::clone(located)));
    }
    for replica in expected {
        index.apply(Change::PutReplica(replica.clone()));
    }
    (index, loaded)
}

/// Checks what [`load`] gives.
#[must_use]
pub fn check(paths: &[PathBuf], expected: &[Replica]) -> Report {
    let (index, Loaded { mut errors, mut warnings, .. }) = read(paths, expected);
    let mut findings = validate(&index);
    errors.append(&mut findings.errors);
    errors.append(&mut findings.unregistered);
    warnings.append(&mut findings.warnings);
    warnings.append(&mut clusters(&index));
    for list in [&mut errors, &mut warnings] {
        list.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    }
    Report { resources: index.resources().count(), errors, warnings }
}

/// What the servers of NATS buses say of themselves.
fn clusters(index: &Index) -> Vec<ParseError> {
    let mut warnings = Vec::new();
    for (_, located) in index.resources() {
        if let Resource::EventBus(bus) = &located.resource
            && let BusBackend::Nats(nats) = &bus.spec.backend
        {
            let path = ["spec", "backend", "nats"].map(Field::Name);
            let found = durability(nats).into_iter().chain(payload(nats));
            warnings.extend(found.map(|warning| located.origin.error(&path, warning)));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_finds_everything() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        let yaml = "\
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {ports: [{port: 80}]}
---
apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: p}
spec:
  targetRefs: [{kind: Service, name: nobody}]
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {ports: [{prot: 80}]}
";
        std::fs::write(&file, yaml).unwrap();
        let gone = dir.path().join("gone");
        let report = check(&[dir.path().to_owned(), gone], &[]);
        assert_eq!(report.resources, 2);
        let errors: Vec<String> = report.errors.iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 3, "{errors:?}");
        assert!(errors[0].contains("a.yaml:10:") && errors[0].contains("targetRefs[0].name"));
        assert!(errors[1].contains("a.yaml:15:") && errors[1].contains("unknown field `prot`"));
        assert!(errors[2].contains("gone:1:1: cannot be read"));
    }
}
