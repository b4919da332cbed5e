//! What a route refers to.

use duet_api::resource::{BackendRef, GROUP, HttpFilter, Metadata, ParentRef};

use super::{Check, spec};
use crate::compile::{authority, routes};
use crate::index::{ServiceKey, object, parent_service};

impl Check<'_> {
    /// Each rule has its backends, and whether it can do without.
    pub(super) fn route(
        &mut self,
        parents: &[ParentRef],
        rules: Vec<(&[BackendRef], bool)>,
        metadata: &Metadata,
    ) {
        let attached = self.parents(parents, metadata);
        if !attached {
            let text = "the route attaches to no Service and does nothing in the mesh";
            self.warning(&spec(&[("parentRefs", None)]), text.to_owned());
        } else if rules.is_empty() {
            let text = "a route without rules answers every request with 500";
            self.warning(&spec(&[("rules", None)]), text.to_owned());
        }
        for (number, (references, redirects)) in rules.into_iter().enumerate() {
            self.backends(references, number, metadata);
            let deserted = references.iter().all(|reference| reference.weight == Some(0));
            if attached && deserted && !redirects {
                let text = "no backend has any weight: requests are answered with 500";
                let path = spec(&[("rules", Some(number)), ("backendRefs", None)]);
                self.warning(&path, text.to_owned());
            }
        }
    }

    /// Whether any parent is a service.
    fn parents(&mut self, parents: &[ParentRef], metadata: &Metadata) -> bool {
        let mut attached = false;
        for (number, parent) in parents.iter().enumerate() {
            if let Some(key) = parent_service(parent, metadata) {
                attached = true;
                self.parent(parent, number, &key);
            } else if parent.kind.as_deref() == Some("Service") {
                let group = parent.group.as_deref().unwrap_or_default();
                let text = format!(
                    "a Service of the group {group:?} means nothing here; leave the group empty"
                );
                self.warning(&spec(&[("parentRefs", Some(number)), ("group", None)]), text);
            }
        }
        attached
    }

    fn parent(&mut self, parent: &ParentRef, number: usize, key: &ServiceKey) {
        let at = |field| spec(&[("parentRefs", Some(number)), (field, None)]);
        if !self.service(&at("name"), key) {
            return;
        }
        let ports = authority::ports(self.index, key);
        if let Some(port) = parent.port.filter(|port| !ports.contains(port)) {
            return self.error(&at("port"), format!("service {key} has no port {port}"));
        }
        let Some(name) = &parent.section_name else {
            return;
        };
        let named = self.ports_named(key, name);
        if named.is_empty() {
            self.error(&at("sectionName"), format!("service {key} has no port named {name:?}"));
        } else if let Some(port) = parent.port.filter(|port| !named.contains(port)) {
            let text = format!("port {port} of service {key} is not the one named {name:?}");
            self.error(&at("sectionName"), text);
        }
    }

    fn backends(&mut self, references: &[BackendRef], rule: usize, metadata: &Metadata) {
        for (number, reference) in references.iter().enumerate() {
            let at = |field| {
                spec(&[("rules", Some(rule)), ("backendRefs", Some(number)), (field, None)])
            };
            let port = match routes::backend_port(reference, &metadata.namespace) {
                Ok(port) => port,
                Err(why) => {
                    let field = if reference.port.is_none() { "port" } else { "kind" };
                    self.error(&at(field), why);
                    continue;
                }
            };
            if self.service(&at("name"), &port.service)
                && let Err(why) = authority::resolve(self.index, &port)
            {
                self.error(&at("port"), why);
            }
        }
    }

    pub(super) fn filters(&mut self, filters: &[HttpFilter], rule: usize, metadata: &Metadata) {
        for (number, filter) in filters.iter().enumerate() {
            let at = |more: &[(&'static str, Option<usize>)]| {
                let mut path = vec![("rules", Some(rule)), ("filters", Some(number))];
                path.extend_from_slice(more);
                spec(&path)
            };
            if let Some(mirror) = &filter.request_mirror {
                let found = routes::backend_port(&mirror.backend_ref, &metadata.namespace)
                    .and_then(|port| authority::resolve(self.index, &port));
                if let Err(why) = found {
                    let path = at(&[("requestMirror", None), ("backendRef", None)]);
                    self.error(&path, why);
                }
            }
            if let Some(named) = &filter.extension_ref {
                let ours = named.group == GROUP && named.kind == "TrafficPolicy";
                let key = object("TrafficPolicy", &metadata.namespace, &named.name);
                if !ours {
                    let text =
                        format!("{}/{} is not {GROUP}/TrafficPolicy", named.group, named.kind);
                    self.error(&at(&[("extensionRef", None), ("kind", None)]), text);
                } else if self.index.get(&key).is_none() {
                    let path = at(&[("extensionRef", None), ("name", None)]);
                    self.error(&path, format!("there is no {key}"));
                }
            }
        }
    }
}
