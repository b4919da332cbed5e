use duet_api::resource::parse;

use super::*;

pub(super) fn errors(yaml: &str) -> Vec<String> {
    let parsed = parse("a.yaml", yaml);
    assert_eq!(parsed.errors, []);
    parsed.resources.iter().flat_map(lint).map(|error| error.to_string()).collect()
}

/// The one error of a rule of an `HTTPRoute`, without the file.
fn rule(rule: &str) -> String {
    let yaml = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r}}\n\
         spec: {{rules: [{rule}]}}"
    );
    let errors = errors(&yaml);
    assert!(errors.len() <= 1, "{errors:?}");
    errors.into_iter().next().unwrap_or_default()
}

#[test]
fn good_rules_pass() {
    for good in [
        "{}",
        "{matches: [{path: {type: RegularExpression, value: '/a[0-9]+'}}]}",
        "{matches: [{path: {value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: \
         {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}",
        "{filters: [{type: RequestRedirect, requestRedirect: {statusCode: 308}}]}",
        "{timeouts: {request: 0s, backendRequest: 1s}}",
    ] {
        assert_eq!(rule(good), "", "{good}");
    }
}

/// Rules with what is said of them.
const BAD_RULES: [(&str, &str); 14] = [
    (
        "{matches: [{path: {type: RegularExpression, value: '/a('}}]}",
        "rules[0].matches[0].path.value: \"/a(\" is not a regular expression: unclosed group",
    ),
    ("{matches: [{path: {value: a}}]}", "does not start with '/'"),
    ("{matches: [{path: {value: /a//b}}]}", "must not contain \"//\""),
    ("{matches: [{method: get}]}", "matches[0].method: \"get\" is not one of GET"),
    (
        "{matches: [{headers: [{name: a, type: RegularExpression, value: '['}]}]}",
        "headers[0].value",
    ),
    (
        "{filters: [{type: RequestRedirect}]}",
        "filters[0]: a filter of type RequestRedirect needs the field requestRedirect",
    ),
    (
        "{filters: [{type: RequestRedirect, requestRedirect: {statusCode: 200}}]}",
        "statusCode: 200 is not",
    ),
    ("{filters: [{type: RequestRedirect, requestRedirect: {scheme: ftp}}]}", "scheme: \"ftp\""),
    (
        "{filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: a, port: 1}]}",
        "rules[0].backendRefs: a rule that redirects",
    ),
    (
        "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: 'a b', value: x}]}}]}",
        "set[0].name: \"a b\" is not a header's name",
    ),
    (
        "{filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath}}}]}",
        "urlRewrite.path: type ReplaceFullPath has the field replaceFullPath",
    ),
    ("{backendRefs: [{name: a, port: 1, weight: 1000001}]}", "backendRefs[0].weight"),
    ("{timeouts: {request: 1s, backendRequest: 2s}}", "timeouts.backendRequest: one try"),
    (
        "{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}",
        "ReplacePrefixMatch needs a PathPrefix",
    ),
];

#[test]
fn what_does_not_fit_is_named() {
    for (bad, expected) in BAD_RULES {
        let error = rule(bad);
        assert!(error.starts_with("a.yaml:4:") && error.contains(expected), "{bad}: {error}");
    }
}

#[test]
fn a_pattern_cannot_be_a_bomb() {
    assert!(
        rule("{matches: [{path: {type: RegularExpression, value: '(a{1000}){1000}'}}]}")
            .contains("size limit")
    );
    let long = format!(
        "{{matches: [{{path: {{type: RegularExpression, value: {}}}}}]}}",
        "a".repeat(1025)
    );
    assert!(rule(&long).contains("1025 bytes"));
}

#[test]
fn grpc_routes_change_headers_only() {
    let yaml = "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: r}\nspec:\n  rules:\n  \
                - matches: [{method: {type: Exact}}]\n    filters: [{type: RequestRedirect, requestRedirect: {}}]\n";
    let errors = errors(yaml);
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(errors[0].starts_with("a.yaml:6:") && errors[0].contains("needs a service"));
    assert!(errors[1].starts_with("a.yaml:7:") && errors[1].contains("a GRPCRoute has"));
}

#[test]
fn rules_of_a_route_have_different_names() {
    let yaml = "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r}, spec: {rules: [{name: a}, {}, {}, {name: a}]}}";
    let errors = errors(yaml);
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("spec.rules[3].name: another rule"), "{errors:?}");
}

#[test]
fn services_and_subscriptions_are_checked() {
    let service = "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}, {port: 80, name: b}]}}";
    assert!(errors(service)[0].contains("spec.ports[1].port: port 80 is there twice"));
    let service = "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}, {port: 81}]}}";
    assert!(errors(service)[0].contains("spec.ports[1]: with several ports"));
    let subscription = "{apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {name: s}, spec: {topic: t, \
                        subscriber: {service: a, path: /e}, deadLetterTopic: t}}";
    assert!(
        errors(subscription)[0].contains("spec.deadLetterTopic: "),
        "{:?}",
        errors(subscription)
    );
}
