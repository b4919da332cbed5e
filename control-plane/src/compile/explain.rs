//! What a destination is made of: for each rule the route that it stands in, for each setting the resource that gives
//! it, and the routes that look as if they counted and do not. For `duet explain`, which asks the sidecar's own code
//! which rule a request falls under: matching is no business of this crate.
//!
//! Lines are looked up when they are asked for, as each look-up reads a document again.

use std::collections::BTreeSet;
use std::fmt;

use duet_api::proto;
use duet_api::resource::{Field as Step, HttpFilter, Located, Resource};
use serde::Serialize;
use serde_json::Value;

use super::fields::{Field, Own, Scope, fields};
use super::policy::Chain;
use super::routes::{self, attached, attaches};
use super::{ServicePort, authority};
use crate::index::{Index, parent_service, route_parents};

/// A place in a resource. Displays as `file:line (Kind namespace/name)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The file, as it was given.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// The resource, and which of its rules: `HTTPRoute shop/inventory rule 0`.
    pub resource: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} ({})", self.file, self.line, self.resource)
    }
}

impl Place {
    fn new(located: &Located, resource: String, path: &[Step]) -> Self {
        let origin = &located.origin;
        Self { file: origin.file.to_string(), line: origin.line_of(path), resource }
    }
}

/// A setting that is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// As in a policy, below `spec`.
    pub name: &'static str,
    /// As in a policy; null where the sidecar has a default of its own.
    pub value: Value,
    /// Who says so; none where it is the default.
    pub from: Option<Place>,
}

/// A route that refers to the service, but does not count for this caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PassedOver {
    /// The route.
    pub place: Place,
    /// Why it does not count.
    pub why: String,
}

/// A destination as callers of one namespace see it, with what made it.
#[derive(Debug)]
pub struct Explanation<'i> {
    /// What was dialled.
    pub destination: ServicePort,
    /// As the sidecar gets them, in order of precedence.
    pub rules: Vec<proto::Rule>,
    /// In order.
    pub passed_over: Vec<PassedOver>,
    index: &'i Index,
    /// For each rule; empty where the only one is the default.
    sources: Vec<Source<'i>>,
    backends: BTreeSet<ServicePort>,
}

/// Where a rule stands: route, number of the rule, number of the match.
#[derive(Clone, Copy, Debug)]
struct Source<'i> {
    route: &'i Located,
    rule: usize,
    position: usize,
}

/// Explains what `authority` means to a caller in `namespace`.
///
/// # Errors
/// Why it is not known, as the caller is told.
pub fn explain<'i>(
    index: &'i Index,
    namespace: &str,
    authority: &str,
) -> Result<Explanation<'i>, String> {
    let destination = authority::parse(authority, namespace)?;
    authority::resolve(index, &destination)?;
    let (found, ranked) = routes::ranked_rules(index, namespace, &destination);
    let (mut rules, mut sources) = (found.rules, Vec::new());
    for ranked in ranked {
        let (route, rank) = (ranked.located, ranked.rank);
        sources.push(Source { route, rule: rank.rule, position: rank.position });
        rules.push(ranked.rule);
    }
    let passed_over = passed_over(index, namespace, &destination);
    Ok(Explanation { destination, rules, passed_over, index, sources, backends: found.backends })
}

impl Explanation<'_> {
    /// Where a rule's match stands; none for the default rule.
    #[must_use]
    pub fn place(&self, rule: usize) -> Option<Place> {
        let source = self.sources.get(rule)?;
        let resource = self.rules.get(rule)?.name.clone();
        let mut path = source.path();
        path.extend([Step::Name("matches"), Step::Index(source.position)]);
        Some(Place::new(source.route, resource, &path))
    }

    /// A rule's name in its route, if it has one.
    #[must_use]
    pub fn rule_name(&self, rule: usize) -> Option<&str> {
        self.sources.get(rule)?.rule()?.name
    }

    /// What is in force for requests that fall under a rule.
    #[must_use]
    pub fn settings(&self, rule: usize) -> Vec<Setting> {
        let service = Chain::of_service(self.index, &self.destination);
        let source = self.sources.get(rule);
        let chain =
            source.map_or_else(|| service.clone(), |source| source.chain(self.index, &service));
        let setting = |field: Field| match field.scope {
            Scope::Rule => {
                let own = source.and_then(|source| source.own(&field));
                Some(own.unwrap_or_else(|| of_chain(&field, &chain)))
            }
            Scope::Service => Some(of_chain(&field, &service)),
            Scope::Backend | Scope::Replica => None,
        };
        fields().into_iter().filter_map(setting).collect()
    }

    /// What is in force for a backend, which a rule names as `namespace/name:port`.
    #[must_use]
    pub fn backend_settings(&self, backend: &str) -> Vec<Setting> {
        let Some(port) = self.backends.iter().find(|port| port.to_string() == backend) else {
            return Vec::new();
        };
        let own = Chain::of_service(self.index, port);
        let dialled = Chain::of_service(self.index, &self.destination);
        let chain = own.clone().before(&dialled);
        let setting = |field: Field| match field.scope {
            Scope::Backend => Some(of_chain(&field, &chain)),
            Scope::Replica => Some(of_chain(&field, &own)),
            Scope::Rule | Scope::Service => None,
        };
        fields().into_iter().filter_map(setting).collect()
    }
}

/// A rule of a route, of whichever kind.
struct Rule<'i> {
    name: Option<&'i str>,
    filters: &'i [HttpFilter],
    own: Own<'i>,
}

impl<'i> Source<'i> {
    fn path(&self) -> Vec<Step> {
        vec![Step::Name("spec"), Step::Name("rules"), Step::Index(self.rule)]
    }

    /// None where the route has no rules, which means one that matches everything.
    fn rule(&self) -> Option<Rule<'i>> {
        if let Resource::GrpcRoute(route) = &self.route.resource {
            let rule = route.spec.rules.get(self.rule)?;
            let session = rule.session_persistence.as_ref();
            let own = Own { timeouts: None, retry: None, session };
            Some(Rule { name: rule.name.as_deref(), filters: &rule.filters, own })
        } else if let Resource::HttpRoute(route) = &self.route.resource {
            let rule = route.spec.rules.get(self.rule)?;
            let own = Own {
                timeouts: rule.timeouts.as_ref(),
                retry: rule.retry.as_ref(),
                session: rule.session_persistence.as_ref(),
            };
            Some(Rule { name: rule.name.as_deref(), filters: &rule.filters, own })
        } else {
            None
        }
    }

    /// The policies on the service, with those of the route and of the rule's filters in front.
    fn chain(&self, index: &'i Index, service: &Chain<'i>) -> Chain<'i> {
        let key = self.route.resource.key();
        let rule = self.rule();
        let name = rule.as_ref().and_then(|rule| rule.name);
        let filters = rule.map_or(&[][..], |rule| rule.filters);
        let (chain, _) =
            service.with_route(index, &key, name).with_extensions(index, &key, filters);
        chain
    }

    /// What the rule says itself.
    fn own(&self, field: &Field) -> Option<Setting> {
        let value = self.rule()?.own.of(field.name)?;
        let mut path = self.path();
        path.extend(field.steps());
        let resource = format!("{} rule {}", self.route.resource.key(), self.rule);
        let from = Some(Place::new(self.route, resource, &path));
        Some(Setting { name: field.name, value, from })
    }
}

/// The first policy of a chain that says something, else Gateway API's own, else the default.
fn of_chain(field: &Field, chain: &Chain<'_>) -> Setting {
    let below_spec = |steps: &mut dyn Iterator<Item = Step>| -> Vec<Step> {
        [Step::Name("spec")].into_iter().chain(steps).collect()
    };
    let found = chain.first_located(field.of).filter(|(value, _)| !value.is_null());
    let found = found.map(|(value, located)| (value, located, below_spec(&mut field.steps())));
    let standard = || {
        let ((spec, located), standard) = chain.standard().zip(field.standard)?;
        let path = below_spec(&mut std::iter::once(Step::Name(standard.name)));
        Some(((standard.of)(spec)?, located, path))
    };
    let Some((value, located, path)) = found.or_else(standard) else {
        return Setting { name: field.name, value: field.default.clone(), from: None };
    };
    let from = Some(Place::new(located, located.resource.key().to_string(), &path));
    Setting { name: field.name, value, from }
}

/// Routes that name the service as a parent, but have no say in this call.
fn passed_over(index: &Index, from: &str, dialled: &ServicePort) -> Vec<PassedOver> {
    let counting = attached(index, from, dialled);
    let routes = index.referrers(&dialled.service.object()).map(|located| &**located);
    let routes = routes.filter(|located| {
        let counts = counting.iter().any(|counts| std::ptr::eq(*counts, *located));
        route_parents(&located.resource).is_some() && !counts
    });
    let passed_over = routes.map(|located| {
        let key = located.resource.key();
        let why = if !attaches(index, &located.resource, dialled) {
            format!("it is attached to {} of the service", ports(&located.resource, dialled))
        } else if key.namespace == dialled.service.namespace {
            format!("the routes of the caller's own namespace {from:?} take its place")
        } else {
            format!("it counts for callers of its own namespace {:?} only", key.namespace)
        };
        let place = Place::new(located, key.to_string(), &[Step::Name("metadata")]);
        PassedOver { place, why }
    });
    passed_over.collect()
}

/// The ports of the service that a route is attached to, for people.
fn ports(route: &Resource, dialled: &ServicePort) -> String {
    let parents = route_parents(route).unwrap_or_default().iter();
    let ours = parents.filter(|parent| {
        parent_service(parent, route.metadata()).as_ref() == Some(&dialled.service)
    });
    let port = ours.map(|parent| match (&parent.section_name, parent.port) {
        (Some(name), Some(port)) => format!("port {port} named {name:?}"),
        (Some(name), None) => format!("the port named {name:?}"),
        (None, port) => format!("port {}", port.unwrap_or_default()),
    });
    port.collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests;
