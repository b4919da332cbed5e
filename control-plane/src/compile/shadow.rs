//! Matches that can never be chosen, because one before them takes every request that they would take. Pure.
//!
//! Only what is plain to see counts: one earlier match whose path is the same or wider, and that asks for no method,
//! header or parameter that the later one does not ask for too. Several matches that together leave nothing over, and
//! patterns that happen to mean the same, are not found.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use duet_api::proto;
use duet_api::proto::path_match::Kind as PathKind;
use duet_api::resource::{Field, GrpcMatch, HttpMatch, Located, ObjectKey, ParseError, Resource};

use super::matches::{Rank, grpc_match, grpc_rank, http_match, http_rank};
use super::routes::{ANY_GRPC_RULE, ANY_HTTP_RULE, attached, or_one};
use super::{ServicePort, authority};
use crate::index::{Index, ServiceKey, parent_service, route_parents};

/// A match of a route: the route, the number of its rule, and its number there.
#[derive(Clone, Copy, Debug)]
struct Place<'i> {
    route: &'i Located,
    rule: usize,
    position: usize,
}

/// One warning for each match that is never chosen, or for its rule when that has no other.
pub(super) fn warnings(index: &Index) -> Vec<ParseError> {
    let mut fates = Fates::default();
    for service in parents(index) {
        for port in authority::ports(index, &service) {
            let port = ServicePort { service: service.clone(), port };
            for from in audiences(index, &service) {
                fates.table(&attached(index, &from, &port));
            }
        }
    }
    fates.warnings()
}

/// Services that a route names as its parent.
fn parents(index: &Index) -> BTreeSet<ServiceKey> {
    let routes = index.of_kind("HTTPRoute").chain(index.of_kind("GRPCRoute"));
    let services = routes.flat_map(|located| {
        let parents = route_parents(&located.resource).into_iter().flatten();
        parents.filter_map(|parent| parent_service(parent, located.resource.metadata()))
    });
    services.collect()
}

/// Namespaces whose callers may see different rules: the service's own, for everybody without consumer routes, and those
/// of consumer routes.
fn audiences(index: &Index, service: &ServiceKey) -> BTreeSet<String> {
    let referrers = index.referrers(&service.object());
    let routes = referrers.filter(|located| route_parents(&located.resource).is_some());
    let namespaces = routes.map(|located| located.resource.metadata().namespace.clone());
    namespaces.chain([service.namespace.clone()]).collect()
}

/// What becomes of each match, over all tables that it is in.
#[derive(Default)]
struct Fates<'i>(BTreeMap<(ObjectKey, usize), Vec<Fate<'i>>>);

/// By position in the rule.
struct Fate<'i> {
    place: Place<'i>,
    /// What takes its requests, in one of the tables; none where it can be chosen in any.
    by: Option<Place<'i>>,
}

impl<'i> Fates<'i> {
    /// Takes in one table of rules.
    fn table(&mut self, routes: &[&'i Located]) {
        let mut ranked: Vec<_> = routes.iter().flat_map(|route| matches_of(route)).collect();
        ranked.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        let (places, matches): (Vec<Place<'i>>, Vec<proto::Match>) =
            ranked.into_iter().map(|(_, place, found)| (place, found)).unzip();
        for (place, by) in places.iter().zip(shadowers(&matches)) {
            self.note(*place, by.and_then(|by| places.get(by)).copied());
        }
    }

    fn note(&mut self, place: Place<'i>, by: Option<Place<'i>>) {
        let rule = self.0.entry((place.route.resource.key(), place.rule)).or_default();
        match rule.iter_mut().find(|fate| fate.place.position == place.position) {
            Some(fate) => fate.by = fate.by.and(by),
            None => rule.push(Fate { place, by }),
        }
    }

    fn warnings(mut self) -> Vec<ParseError> {
        let mut warnings = Vec::new();
        for fates in self.0.values_mut() {
            fates.sort_by_key(|fate| fate.place.position);
            let taken = fates.iter().filter_map(|fate| Some((fate.place, fate.by?)));
            let taken: Vec<(Place<'_>, Place<'_>)> = taken.collect();
            if taken.len() == fates.len() {
                warnings.extend(of_rule(&taken));
            } else {
                warnings.extend(taken.into_iter().map(|(place, by)| of_match(place, by)));
            }
        }
        warnings
    }
}

fn of_match(place: Place<'_>, by: Place<'_>) -> ParseError {
    let text = format!("this match is never chosen: {} takes all its requests", by.name());
    place.route.origin.error(&place.path(), text)
}

fn of_rule(taken: &[(Place<'_>, Place<'_>)]) -> Option<ParseError> {
    let (place, _) = taken.first()?;
    let mut names: Vec<String> = taken.iter().map(|(_, by)| by.name()).collect();
    names.dedup();
    let verb = if names.len() == 1 { "takes" } else { "take" };
    let text =
        format!("this rule is never chosen: {} {verb} all its requests", names.join(" and "));
    let path = place.path();
    // Without `matches`.
    Some(place.route.origin.error(path.get(..3)?, text))
}

impl Place<'_> {
    fn path(&self) -> Vec<Field> {
        vec![
            Field::Name("spec"),
            Field::Name("rules"),
            Field::Index(self.rule),
            Field::Name("matches"),
            Field::Index(self.position),
        ]
    }

    fn name(&self) -> String {
        let (key, origin) = (self.route.resource.key(), &self.route.origin);
        let line = origin.line_of(&self.path());
        format!("{key} rule {} match {} ({}:{line})", self.rule, self.position, origin.file)
    }
}

/// The matches of a route as the sidecar checks them, with their ranks.
fn matches_of(route: &Located) -> Vec<(Rank, Place<'_>, proto::Match)> {
    let key = route.resource.key();
    let name = format!("{}/{}", key.namespace, key.name);
    let mut found = Vec::new();
    let mut push = |rank: Rank, wanted: proto::Match| {
        let place = Place { route, rule: rank.rule, position: rank.position };
        found.push((rank, place, wanted));
    };
    if let Resource::HttpRoute(http) = &route.resource {
        for (number, rule) in or_one(&http.spec.rules, &ANY_HTTP_RULE).iter().enumerate() {
            let any = HttpMatch::default();
            for (position, wanted) in or_one(&rule.matches, &any).iter().enumerate() {
                push(http_rank(wanted, &name, number, position), http_match(wanted));
            }
        }
    } else if let Resource::GrpcRoute(grpc) = &route.resource {
        for (number, rule) in or_one(&grpc.spec.rules, &ANY_GRPC_RULE).iter().enumerate() {
            let any = GrpcMatch::default();
            for (position, wanted) in or_one(&rule.matches, &any).iter().enumerate() {
                push(grpc_rank(wanted, &name, number, position), grpc_match(wanted));
            }
        }
    }
    found
}

/// For each match, in order of precedence, the first before it that takes all its requests. Matches are found by path,
/// since a table may have thousands.
fn shadowers(matches: &[proto::Match]) -> Vec<Option<usize>> {
    let mut by_path: HashMap<PathKey<'_>, Vec<usize>> = HashMap::new();
    let mut found = Vec::with_capacity(matches.len());
    for (number, wanted) in matches.iter().enumerate() {
        let keys = wider(path_of(wanted));
        let before = keys.iter().filter_map(|key| by_path.get(key)).flatten().copied();
        let covers = |at: &usize| matches.get(*at).is_some_and(|earlier| covers(earlier, wanted));
        found.push(before.filter(covers).min());
        by_path.entry(key_of(path_of(wanted))).or_default().push(number);
    }
    found
}

/// Where a match's path is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum PathKey<'m> {
    Exact(&'m str),
    Prefix(&'m str),
    /// Of several patterns each has to be looked at.
    Regex,
}

/// A match without a path takes any, as the prefix `/` does.
fn path_of(wanted: &proto::Match) -> &PathKind {
    static ANY: PathKind = PathKind::Prefix(String::new());
    wanted.path.as_ref().and_then(|path| path.kind.as_ref()).unwrap_or(&ANY)
}

fn key_of(path: &PathKind) -> PathKey<'_> {
    match path {
        PathKind::Exact(path) => PathKey::Exact(path),
        PathKind::Prefix(prefix) => PathKey::Prefix(prefix.trim_end_matches('/')),
        PathKind::Regex(_) => PathKey::Regex,
    }
}

/// The keys of all paths that may be the same or wider.
fn wider(path: &PathKind) -> Vec<PathKey<'_>> {
    let mut keys = vec![PathKey::Regex, PathKey::Prefix("")];
    let text = match path {
        PathKind::Regex(_) => return keys,
        PathKind::Exact(path) => {
            keys.push(PathKey::Exact(path));
            path.as_str()
        }
        PathKind::Prefix(prefix) => prefix.trim_end_matches('/'),
    };
    let ends = text.match_indices('/').map(|(at, _)| at).chain([text.len()]);
    keys.extend(ends.filter_map(|end| text.get(..end)).skip(1).map(PathKey::Prefix));
    keys
}

/// Whether every request that `inner` takes is plainly one that `outer` takes.
fn covers(outer: &proto::Match, inner: &proto::Match) -> bool {
    let subset = |outer: &[proto::ValueMatch], inner: &[proto::ValueMatch]| {
        outer.iter().all(|condition| inner.contains(condition))
    };
    covers_path(path_of(outer), path_of(inner))
        && (outer.method.is_empty() || outer.method == inner.method)
        && subset(&outer.headers, &inner.headers)
        && subset(&outer.query_params, &inner.query_params)
        && (inner.grpc || !outer.grpc)
}

fn covers_path(outer: &PathKind, inner: &PathKind) -> bool {
    match (outer, inner) {
        (PathKind::Exact(outer), PathKind::Exact(inner)) => outer == inner,
        (PathKind::Exact(_), _) => false,
        (PathKind::Prefix(outer), _) if outer.trim_end_matches('/').is_empty() => true,
        (PathKind::Prefix(outer), PathKind::Exact(inner) | PathKind::Prefix(inner)) => {
            let rest = inner.strip_prefix(outer.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
        (PathKind::Prefix(_), PathKind::Regex(_)) => false,
        (PathKind::Regex(outer), PathKind::Regex(inner)) if outer == inner => true,
        // Of patterns only those that are a plain beginning with anything behind it are understood.
        (PathKind::Regex(outer), inner) => {
            let begin = outer.strip_suffix(".*").filter(|begin| !begin.contains(is_special));
            begin.is_some_and(|begin| match inner {
                _ if matches!(begin, "" | "/") => true,
                PathKind::Exact(inner) | PathKind::Prefix(inner) => inner.starts_with(begin),
                PathKind::Regex(_) => false,
            })
        }
    }
}

/// Means something else than itself in a pattern.
fn is_special(c: char) -> bool {
    r"\.+*?()|[]{}^$".contains(c)
}

#[cfg(test)]
mod tests;
