//! Matches of routes: what the sidecar checks, and which of two comes first.
//!
//! Every match of every rule stands for itself. `GRPCRoute` matches come before `HTTPRoute` matches, since they match
//! gRPC calls only. Within `HTTPRoute`: exact path, then regular expression (where the specification leaves it open, as
//! Envoy Gateway does), then prefix, longer ones first; then a method match; more header matches; more query matches;
//! then the routes' `namespace/name`, and the order in the route. Within `GRPCRoute`: characters of the service, of the
//! method, number of headers, and then the same.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use duet_api::proto;
use duet_api::proto::path_match::Kind as PathKind;
use duet_api::resource::{
    GrpcMatch, GrpcMethodMatch, HttpMatch, MatchType, PathMatch, PathMatchType, ValueMatch,
};

/// The smaller, the earlier.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    kind: Kind,
    path: PathClass,
    length: Reverse<usize>,
    method: Reverse<usize>,
    headers: Reverse<usize>,
    params: Reverse<usize>,
    route: String,
    /// Number of the rule in the route.
    pub(super) rule: usize,
    /// Number of the match in the rule.
    pub(super) position: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Grpc,
    Http,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PathClass {
    Exact,
    Regex,
    Rest,
}

/// Where a match of an `HTTPRoute` stands.
pub(super) fn http_rank(found: &HttpMatch, route: &str, rule: usize, position: usize) -> Rank {
    let slash = PathMatch { kind: PathMatchType::PathPrefix, value: "/".to_owned() };
    let path = found.path.as_ref().unwrap_or(&slash);
    let (class, length) = match path.kind {
        PathMatchType::Exact => (PathClass::Exact, path.value.chars().count()),
        PathMatchType::RegularExpression => (PathClass::Regex, path.value.chars().count()),
        PathMatchType::PathPrefix => (PathClass::Rest, prefix(&path.value).chars().count()),
    };
    Rank {
        kind: Kind::Http,
        path: class,
        length: Reverse(length),
        method: Reverse(found.method.iter().count()),
        headers: Reverse(found.headers.len()),
        params: Reverse(found.query_params.len()),
        route: route.to_owned(),
        rule,
        position,
    }
}

/// Where a match of a `GRPCRoute` stands.
pub(super) fn grpc_rank(found: &GrpcMatch, route: &str, rule: usize, position: usize) -> Rank {
    let length = |part: fn(&GrpcMethodMatch) -> Option<&String>| {
        found.method.as_ref().and_then(part).map_or(0, |text| text.chars().count())
    };
    let path = match found.method.as_ref().map(|method| method.kind) {
        Some(MatchType::Exact) => PathClass::Exact,
        Some(MatchType::RegularExpression) => PathClass::Regex,
        None => PathClass::Rest,
    };
    Rank {
        kind: Kind::Grpc,
        path,
        length: Reverse(length(|method| method.service.as_ref())),
        method: Reverse(length(|method| method.method.as_ref())),
        headers: Reverse(found.headers.len()),
        params: Reverse(0),
        route: route.to_owned(),
        rule,
        position,
    }
}

/// A match of an `HTTPRoute` as the sidecar checks it.
pub(super) fn http_match(found: &HttpMatch) -> proto::Match {
    let kind = match &found.path {
        None => PathKind::Prefix("/".to_owned()),
        Some(path) => match path.kind {
            PathMatchType::Exact => PathKind::Exact(path.value.clone()),
            PathMatchType::PathPrefix => PathKind::Prefix(prefix(&path.value).to_owned()),
            PathMatchType::RegularExpression => PathKind::Regex(path.value.clone()),
        },
    };
    proto::Match {
        path: Some(proto::PathMatch { kind: Some(kind) }),
        method: found.method.clone().unwrap_or_default(),
        headers: headers(&found.headers),
        query_params: values(&found.query_params, str::to_owned),
        grpc: false,
    }
}

/// A match of a `GRPCRoute` as the sidecar checks it.
pub(super) fn grpc_match(found: &GrpcMatch) -> proto::Match {
    let path = found.method.as_ref().and_then(grpc_path);
    proto::Match {
        path: path.map(|kind| proto::PathMatch { kind: Some(kind) }),
        method: String::new(),
        headers: headers(&found.headers),
        query_params: Vec::new(),
        grpc: true,
    }
}

/// A gRPC call's path is `/<service>/<method>`.
fn grpc_path(method: &GrpcMethodMatch) -> Option<PathKind> {
    const ANY: &str = "[^/]+";
    let (service, name) = (method.service.as_deref(), method.method.as_deref());
    Some(match (method.kind, service, name) {
        (_, None, None) => return None,
        (MatchType::Exact, Some(service), Some(name)) => {
            PathKind::Exact(format!("/{service}/{name}"))
        }
        (MatchType::Exact, Some(service), None) => PathKind::Prefix(format!("/{service}")),
        (MatchType::Exact, None, Some(name)) => {
            PathKind::Regex(format!("/{ANY}/{}", regex::escape(name)))
        }
        (MatchType::RegularExpression, service, name) => {
            PathKind::Regex(format!("/(?:{})/(?:{})", service.unwrap_or(ANY), name.unwrap_or(ANY)))
        }
    })
}

/// A prefix matches by path element, so a final slash says nothing.
fn prefix(path: &str) -> &str {
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() { "/" } else { trimmed }
}

pub(super) fn headers(matches: &[ValueMatch]) -> Vec<proto::ValueMatch> {
    values(matches, str::to_ascii_lowercase)
}

/// Of several conditions on one name only the first counts (Gateway API).
fn values(matches: &[ValueMatch], canonical: fn(&str) -> String) -> Vec<proto::ValueMatch> {
    let mut seen = BTreeSet::new();
    let values = matches.iter().filter_map(|found| {
        let name = canonical(&found.name);
        let kind = match found.kind {
            MatchType::Exact => proto::value_match::Kind::Exact(found.value.clone()),
            MatchType::RegularExpression => proto::value_match::Kind::Regex(found.value.clone()),
        };
        let first = seen.insert(name.clone());
        first.then_some(proto::ValueMatch { name, kind: Some(kind) })
    });
    values.collect()
}
