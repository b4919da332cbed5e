use proptest::prelude::*;
use proto::value_match::Kind as ValueKind;

use super::*;
use crate::compile::testing::index;

const SERVICES: &str = "\
{apiVersion: v1, kind: Service, metadata: {name: a, namespace: shop}, spec: {ports: [{name: web, port: 80}, {name: grpc, port: 81}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: b, namespace: shop}, spec: {ports: [{port: 80}]}}
";

fn route(name: &str, namespace: &str, parents: &str, rules: &str) -> String {
    format!(
        "---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: {name}, namespace: {namespace}}}, spec: {{parentRefs: [{parents}], rules: [{rules}]}}}}\n"
    )
}

/// On one service.
fn check(rules: &str) -> Vec<String> {
    found(&[route("r", "shop", "{kind: Service, name: a}", rules)])
}

fn found(routes: &[String]) -> Vec<String> {
    let warnings = warnings(&index(&format!("{SERVICES}{}", routes.concat())));
    warnings.iter().map(ToString::to_string).collect()
}

#[test]
fn a_match_that_is_the_same_again_is_shadowed() {
    let twice = "{matches: [{path: {value: /x}, method: GET}]}, {matches: [{path: {value: /x/}, method: GET}, {path: {value: /y}}]}";
    let warnings = check(twice);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].starts_with("test.yaml:5:"), "{warnings:?}");
    let expected = "spec.rules[1].matches[0]: this match is never chosen: HTTPRoute shop/r rule 0 match 0 \
                    (test.yaml:5) takes all its requests";
    assert!(warnings[0].ends_with(expected), "{warnings:?}");
}

#[test]
fn a_rule_whose_every_match_is_shadowed_is_named_once() {
    let rules = "{matches: [{path: {value: /x}}]}, {matches: [{path: {type: RegularExpression, value: '/.*'}}]}, {matches: [{path: {value: /x}}, {path: {value: /y}}]}";
    let warnings = check(rules);
    assert_eq!(warnings.len(), 2, "the pattern comes before every prefix: {warnings:?}");
    assert!(
        warnings[0]
            .contains("spec.rules[0]: this rule is never chosen: HTTPRoute shop/r rule 1 match 0")
    );
    assert!(
        warnings[1]
            .contains("spec.rules[2]: this rule is never chosen: HTTPRoute shop/r rule 1 match 0")
    );
}

#[test]
fn what_asks_for_more_comes_first_and_shadows_nothing() {
    for rules in [
        "{matches: [{path: {value: /x}}]}, {matches: [{path: {value: /x}, method: GET}]}",
        "{matches: [{path: {value: /}}]}, {matches: [{path: {value: /x}}]}",
        "{matches: [{path: {value: /x}, headers: [{name: a, value: '1'}]}]}, {matches: [{path: {value: /x}, headers: [{name: a, value: '2'}]}]}",
        "{matches: [{path: {value: /x}, headers: [{name: a, value: '1'}]}]}, {matches: [{path: {value: /x}, queryParams: [{name: a, value: '1'}]}]}",
        "{matches: [{path: {type: RegularExpression, value: '/api/.*'}}]}, {matches: [{path: {value: /api}}]}",
        "{matches: [{path: {type: RegularExpression, value: '/a[pi]*/.*'}}]}, {matches: [{path: {value: /a}}]}",
    ] {
        assert_eq!(check(rules), Vec::<String>::new(), "{rules}");
    }
    let begin = "{matches: [{path: {type: RegularExpression, value: '/my-api/.*'}}]}, {matches: [{path: {value: /my-api/v1}}]}";
    assert_eq!(check(begin).len(), 1);
}

#[test]
fn routes_shadow_each_other_where_they_meet() {
    let rule = "{backendRefs: [{name: a, namespace: shop, port: 80}]}";
    let on = |name: &str, namespace: &str, parents: &str| route(name, namespace, parents, rule);
    let (all, web, grpc, b) = (
        "{kind: Service, name: a, namespace: shop}",
        "{kind: Service, name: a, namespace: shop, sectionName: web}",
        "{kind: Service, name: a, namespace: shop, port: 81}",
        "{kind: Service, name: b, namespace: shop}",
    );
    assert_eq!(found(&[on("p", "shop", all), on("q", "shop", all)]).len(), 1);
    assert_eq!(found(&[on("p", "shop", all), on("q", "shop", web)]).len(), 1);
    let apart = Vec::<String>::new();
    assert_eq!(
        found(&[on("p", "shop", web), on("q", "shop", all)]),
        apart,
        "free on the other port"
    );
    assert_eq!(found(&[on("p", "shop", web), on("q", "shop", grpc)]), apart);
    let both = format!("{all}, {b}");
    assert_eq!(
        found(&[on("p", "shop", all), on("q", "shop", &both)]),
        apart,
        "free on the other service"
    );
    assert_eq!(found(&[on("p", "shop", all), on("q", "web", all)]), apart, "a consumer route");
    assert_eq!(found(&[on("p", "web", all), on("q", "web", all)]).len(), 1);
}

#[test]
fn grpc_routes_come_first_and_leave_other_requests_alone() {
    let grpc = "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: g, namespace: shop}, spec: {parentRefs: [{kind: Service, name: a}], rules: [{matches: [{method: {service: s}}]}, {}, {matches: [{method: {service: s}}]}]}}\n";
    let http = route("r", "shop", "{kind: Service, name: a}", "{}");
    let warnings = found(&[grpc.to_owned(), http]);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0]
            .contains("spec.rules[2]: this rule is never chosen: GRPCRoute shop/g rule 0 match 0")
    );
}

/// A request, as far as a match looks at it. `None`: the header, or parameter, is not there.
#[derive(Clone, Copy, Debug)]
struct Request {
    path: &'static str,
    method: &'static str,
    header: Option<&'static str>,
    param: Option<&'static str>,
    grpc: bool,
}

/// Every request that could tell two of the matches below apart.
fn requests() -> Vec<Request> {
    let mut requests = Vec::new();
    let values = [None, Some("1"), Some("2"), Some("3")];
    for path in ["/", "/a", "/a/b", "/a/b/c", "/a/b/c/d", "/a/z", "/ab", "/z"] {
        for method in ["GET", "POST", "PUT"] {
            for header in values {
                for param in values {
                    requests.extend([true, false].map(|grpc| Request {
                        path,
                        method,
                        header,
                        param,
                        grpc,
                    }));
                }
            }
        }
    }
    requests
}

/// What Gateway API says that a match takes, in plain words.
fn takes(wanted: &proto::Match, request: &Request) -> bool {
    let path = match path_of(wanted) {
        PathKind::Exact(path) => request.path == path,
        PathKind::Prefix(prefix) => {
            let elements: Vec<&str> = request.path.split('/').filter(|e| !e.is_empty()).collect();
            let wanted: Vec<&str> = prefix.split('/').filter(|e| !e.is_empty()).collect();
            elements.starts_with(&wanted)
        }
        PathKind::Regex(pattern) => {
            regex::Regex::new(&format!("^(?:{pattern})$")).unwrap().is_match(request.path)
        }
    };
    let equal = |conditions: &[proto::ValueMatch], value: Option<&str>| {
        conditions.iter().all(|condition| match &condition.kind {
            Some(ValueKind::Exact(wanted)) => value == Some(wanted),
            _ => false,
        })
    };
    path && (wanted.method.is_empty() || wanted.method == request.method)
        && equal(&wanted.headers, request.header)
        && equal(&wanted.query_params, request.param)
        && (!wanted.grpc || request.grpc)
}

fn a_match(patterns: bool) -> impl Strategy<Value = proto::Match> {
    let text =
        prop_oneof![Just("/"), Just("/a"), Just("/a/b"), Just("/a/b/c")].prop_map(str::to_owned);
    let pattern = prop_oneof![
        Just(".*"),
        Just("/.*"),
        Just("/a.*"),
        Just("/a/.*"),
        Just("/[az]"),
        Just("/a")
    ];
    let pattern = pattern.prop_map(move |text| match patterns {
        true => PathKind::Regex(text.to_owned()),
        false => PathKind::Prefix("/".to_owned()),
    });
    let path = prop_oneof![
        3 => text.clone().prop_map(|text| Some(PathKind::Exact(text))),
        3 => text.prop_map(|text| Some(PathKind::Prefix(text))),
        2 => pattern.prop_map(Some),
        1 => Just(None),
    ];
    let condition = || {
        let value = prop_oneof![Just(None), Just(Some("1")), Just(Some("2"))];
        value.prop_map(|value| {
            let kind = |value: &str| Some(ValueKind::Exact(value.to_owned()));
            let one = |value| proto::ValueMatch { name: "x".to_owned(), kind: kind(value) };
            value.map(one).into_iter().collect::<Vec<_>>()
        })
    };
    let method = prop_oneof![Just(""), Just("GET"), Just("POST")];
    (path, method, condition(), condition(), any::<bool>()).prop_map(
        |(path, method, headers, query_params, grpc)| proto::Match {
            path: path.map(|kind| proto::PathMatch { kind: Some(kind) }),
            method: method.to_owned(),
            headers,
            query_params,
            grpc,
        },
    )
}

/// For each match the first before it that takes every request that it takes.
fn by_looking_at_every_request(matches: &[proto::Match]) -> Vec<Option<usize>> {
    let requests = requests();
    let taken = |wanted: &proto::Match| -> Vec<bool> {
        requests.iter().map(|request| takes(wanted, request)).collect()
    };
    let taken: Vec<Vec<bool>> = matches.iter().map(taken).collect();
    let within = |inner: &[bool], outer: &[bool]| inner.iter().zip(outer).all(|(i, o)| !i || *o);
    let by = |(at, inner): (usize, &Vec<bool>)| {
        taken[..at].iter().position(|outer| within(inner, outer))
    };
    taken.iter().enumerate().map(by).collect()
}

proptest! {
    /// Without patterns, exactly what is shadowed is found, in whatever order the matches are.
    #[test]
    fn shadows_are_those_that_requests_show(matches in proptest::collection::vec(a_match(false), 0..12)) {
        prop_assert_eq!(shadowers(&matches), by_looking_at_every_request(&matches));
    }

    /// With patterns some are not found, but none is wrong.
    #[test]
    fn what_is_called_shadowed_takes_no_request(matches in proptest::collection::vec(a_match(true), 0..12)) {
        for (at, by) in shadowers(&matches).into_iter().enumerate() {
            let Some(by) = by else { continue };
            prop_assert!(by < at);
            for request in requests() {
                prop_assert!(!takes(&matches[at], &request) || takes(&matches[by], &request));
            }
        }
    }
}
