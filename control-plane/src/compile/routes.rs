//! Routes attached to a service → rules in order of precedence.
//!
//! Which routes count (Gateway API's mesh profile): those whose `parentRefs` name the service, and its port if they
//! name one. A route in another namespace than the service is a consumer route: it counts for callers of its own
//! namespace only, and there replaces the service's own routes.
//!
//! The order of what they match is in [`super::matches`].

use std::collections::BTreeSet;

use duet_api::proto;
use duet_api::resource::{
    BackendRef, FilterType, GrpcMatch, GrpcRoute, GrpcRule, HttpFilter, HttpMatch, HttpRoute,
    HttpRule, Located, ObjectKey, ParentRef, Resource,
};

use super::matches::{Rank, grpc_match, grpc_rank, http_match, http_rank};
use super::policy::Chain;
use super::{ServicePort, authority, filters};
use crate::index::{Index, ServiceKey, parent_service, route_parents};

/// Rules with every backend that they name.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// In order of precedence.
    pub rules: Vec<proto::Rule>,
    /// What they send to.
    pub backends: BTreeSet<ServicePort>,
    /// Services that they should send to but that do not exist.
    pub missing: BTreeSet<ServiceKey>,
}

/// A rule of a route, and where it stands: in the order, and in which resource.
#[derive(Debug)]
pub(super) struct RankedRule<'i> {
    pub(super) rank: Rank,
    pub(super) rule: proto::Rule,
    pub(super) located: &'i Located,
}

/// The rules for calls from a namespace to a service's port.
pub(super) fn rules(index: &Index, from: &str, dialled: &ServicePort) -> Rules {
    let (mut found, ranked) = ranked_rules(index, from, dialled);
    found.rules.extend(ranked.into_iter().map(|ranked| ranked.rule));
    found
}

/// The same with the rules of routes apart; the default rule has no place.
pub(super) fn ranked_rules<'i>(
    index: &'i Index,
    from: &str,
    dialled: &ServicePort,
) -> (Rules, Vec<RankedRule<'i>>) {
    let routes = attached(index, from, dialled);
    let policies = Chain::of_service(index, dialled);
    let mut build = Build { index, policies, matches: Vec::new(), found: Rules::default() };
    if routes.is_empty() {
        build.default_rule(dialled);
    }
    for located in routes {
        let place = Place::new(located);
        if let Resource::HttpRoute(route) = &located.resource {
            build.http_route(route, &place);
        } else if let Resource::GrpcRoute(route) = &located.resource {
            build.grpc_route(route, &place);
        }
    }
    build.matches.sort_by(|a, b| a.rank.cmp(&b.rank));
    (build.found, build.matches)
}

/// The routes that count for callers of a namespace.
pub(super) fn attached<'i>(
    index: &'i Index,
    from: &str,
    dialled: &ServicePort,
) -> Vec<&'i Located> {
    let routes = index.referrers(&dialled.service.object()).map(|located| &**located);
    let routes = routes.filter(|located| attaches(index, &located.resource, dialled));
    let of =
        |located: &Located, namespace: &str| located.resource.metadata().namespace == namespace;
    let (own, mut consumer): (Vec<_>, Vec<_>) =
        routes.partition(|located| of(located, &dialled.service.namespace));
    consumer.retain(|located| of(located, from));
    if consumer.is_empty() { own } else { consumer }
}

/// Whether a parent of a route is the service's port.
pub(super) fn attaches(index: &Index, route: &Resource, dialled: &ServicePort) -> bool {
    let port_named = |name: &str| {
        let service = index.service(&dialled.service);
        let mut ports = service.into_iter().flat_map(|service| &service.spec.ports);
        ports.any(|port| port.port == dialled.port && port.name == name)
    };
    let mut parents = route_parents(route).into_iter().flatten();
    parents.any(|parent: &ParentRef| {
        parent_service(parent, route.metadata()).as_ref() == Some(&dialled.service)
            && parent.port.is_none_or(|port| port == dialled.port)
            && parent.section_name.as_deref().is_none_or(port_named)
    })
}

struct Build<'i> {
    index: &'i Index,
    policies: Chain<'i>,
    matches: Vec<RankedRule<'i>>,
    found: Rules,
}

impl<'i> Build<'i> {
    fn default_rule(&mut self, dialled: &ServicePort) {
        self.found.backends.insert(dialled.clone());
        self.found.rules.push(proto::Rule {
            name: "default".to_owned(),
            route: "default".to_owned(),
            r#match: Some(proto::Match::default()),
            filters: Vec::new(),
            backends: vec![proto::WeightedBackend {
                backend: dialled.to_string(),
                weight: 1,
                ..proto::WeightedBackend::default()
            }],
            timeouts: Some(self.policies.timeouts(None)),
            retry: Some(self.policies.retry(None)),
            session: self.policies.session(None),
            fault: self.policies.fault(),
            hedge: self.policies.hedge(),
        });
    }

    fn http_route(&mut self, route: &'i HttpRoute, place: &Place<'i>) {
        let rules = or_one(&route.spec.rules, &ANY_HTTP_RULE);
        for (number, rule) in rules.iter().enumerate() {
            let chain = self.policies.with_route(self.index, &place.key, rule.name.as_deref());
            let (chain, broken) = chain.with_extensions(self.index, &place.key, &rule.filters);
            let redirects = rule.filters.iter().any(|f| f.kind == FilterType::RequestRedirect);
            let template = proto::Rule {
                route: place.route.clone(),
                filters: self.filters(&rule.filters, place),
                backends: match broken {
                    Some(why) => vec![nowhere(why)],
                    None => self.backends(&rule.backend_refs, place, redirects),
                },
                timeouts: Some(chain.timeouts(rule.timeouts.as_ref())),
                retry: Some(chain.retry(rule.retry.as_ref())),
                session: chain.session(rule.session_persistence.as_ref()),
                fault: chain.fault(),
                hedge: chain.hedge(),
                ..proto::Rule::default()
            };
            let any = HttpMatch::default();
            for (position, found) in or_one(&rule.matches, &any).iter().enumerate() {
                let rank = http_rank(found, &place.route, number, position);
                self.push(rank, &template, http_match(found), place);
            }
        }
    }

    fn grpc_route(&mut self, route: &'i GrpcRoute, place: &Place<'i>) {
        let rules = or_one(&route.spec.rules, &ANY_GRPC_RULE);
        for (number, rule) in rules.iter().enumerate() {
            let chain = self.policies.with_route(self.index, &place.key, rule.name.as_deref());
            let (chain, broken) = chain.with_extensions(self.index, &place.key, &rule.filters);
            let template = proto::Rule {
                route: place.route.clone(),
                filters: self.filters(&rule.filters, place),
                backends: match broken {
                    Some(why) => vec![nowhere(why)],
                    None => self.backends(&rule.backend_refs, place, false),
                },
                timeouts: Some(chain.timeouts(None)),
                retry: Some(chain.retry(None)),
                session: chain.session(rule.session_persistence.as_ref()),
                fault: chain.fault(),
                hedge: chain.hedge(),
                ..proto::Rule::default()
            };
            let any = GrpcMatch::default();
            for (position, found) in or_one(&rule.matches, &any).iter().enumerate() {
                let rank = grpc_rank(found, &place.route, number, position);
                self.push(rank, &template, grpc_match(found), place);
            }
        }
    }

    fn push(&mut self, rank: Rank, template: &proto::Rule, found: proto::Match, place: &Place<'i>) {
        let name = format!("{} rule {} match {}", place.key, rank.rule, rank.position);
        let rule = proto::Rule { name, r#match: Some(found), ..template.clone() };
        self.matches.push(RankedRule { rank, rule, located: place.located });
    }

    /// The backends of a rule. A rule that has nowhere to send to gets one broken reference, so that its requests are
    /// answered with 500 as Gateway API says.
    fn backends(
        &mut self,
        references: &[BackendRef],
        place: &Place<'_>,
        redirects: bool,
    ) -> Vec<proto::WeightedBackend> {
        let mut backends: Vec<proto::WeightedBackend> = references
            .iter()
            .map(|reference| {
                let (backend, invalid) = match self.backend(reference, place) {
                    Ok(port) => (port.to_string(), String::new()),
                    Err(why) => (String::new(), why),
                };
                let weight = reference.weight.unwrap_or(1);
                let filters = self.filters(&reference.filters, place);
                proto::WeightedBackend { backend, weight, filters, invalid }
            })
            .collect();
        if !redirects && backends.iter().all(|backend| backend.weight == 0) {
            let why = match backends.is_empty() {
                true => format!("{} has a rule without backendRefs", place.key),
                false => format!("{} has a rule whose backendRefs all have weight 0", place.key),
            };
            backends.push(nowhere(why));
        }
        backends
    }

    fn filters(&mut self, given: &[HttpFilter], place: &Place<'_>) -> Vec<proto::Filter> {
        // A mirror that leads nowhere mirrors nothing; the check has reported it.
        filters::filters(given, |backend| {
            self.backend(backend, place).ok().map(|port| port.to_string())
        })
    }

    fn backend(
        &mut self,
        reference: &BackendRef,
        place: &Place<'_>,
    ) -> Result<ServicePort, String> {
        let port = backend_port(reference, &place.key.namespace)?;
        if !self.index.grants(&place.key, &port.service) {
            let why = "no ReferenceGrant lets it refer to";
            return Err(format!("{}: {why} {}", place.key, port.service));
        }
        if let Err(why) = authority::resolve(self.index, &port) {
            self.found.missing.insert(port.service);
            return Err(format!("{}: {why}", place.key));
        }
        self.found.backends.insert(port.clone());
        Ok(port)
    }
}

/// Answers with 500.
fn nowhere(why: String) -> proto::WeightedBackend {
    proto::WeightedBackend { weight: 1, invalid: why, ..proto::WeightedBackend::default() }
}

/// A list, or in place of an empty one what Gateway API takes it for.
pub(super) fn or_one<'a, T>(given: &'a [T], default: &'a T) -> &'a [T] {
    if given.is_empty() { std::slice::from_ref(default) } else { given }
}

pub(super) static ANY_HTTP_RULE: HttpRule = HttpRule {
    name: None,
    matches: Vec::new(),
    filters: Vec::new(),
    backend_refs: Vec::new(),
    timeouts: None,
    retry: None,
    session_persistence: None,
};
pub(super) static ANY_GRPC_RULE: GrpcRule = GrpcRule {
    name: None,
    matches: Vec::new(),
    filters: Vec::new(),
    backend_refs: Vec::new(),
    session_persistence: None,
};

/// The service's port that a backend reference names, whether it exists or not.
pub(super) fn backend_port(
    reference: &BackendRef,
    route_namespace: &str,
) -> Result<ServicePort, String> {
    let group = reference.group.as_deref().unwrap_or_default();
    let kind = reference.kind.as_deref().unwrap_or("Service");
    if kind != "Service" || !matches!(group, "" | "core") {
        return Err(format!("backends of kind {kind:?} in group {group:?} are not supported"));
    }
    let namespace = reference.namespace.as_deref().unwrap_or(route_namespace);
    let service = ServiceKey::new(namespace, &reference.name);
    let port = reference.port.ok_or_else(|| format!("the reference to {service} has no port"))?;
    Ok(ServicePort { service, port })
}

/// A route.
struct Place<'i> {
    located: &'i Located,
    key: ObjectKey,
    /// `namespace/name`.
    route: String,
}

impl<'i> Place<'i> {
    fn new(located: &'i Located) -> Self {
        let key = located.resource.key();
        Self { located, route: format!("{}/{}", key.namespace, key.name), key }
    }
}
