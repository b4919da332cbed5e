use super::*;
use crate::compile::testing::{index, register};

const SERVICE: &str =
    "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{name: web, port: 80}]}}";

fn findings(yaml: &str) -> (Vec<String>, Vec<String>) {
    let found = validate(&index(&format!("{SERVICE}\n---\n{yaml}")));
    let text = |list: Vec<ParseError>| list.iter().map(ToString::to_string).collect();
    (text([found.errors, found.unregistered].concat()), text(found.warnings))
}

fn error(yaml: &str) -> String {
    let (errors, _) = findings(yaml);
    assert!(errors.len() <= 1, "{errors:?}");
    errors.into_iter().next().unwrap_or_default()
}

fn route(spec: &str) -> String {
    format!(
        "{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: r}}, spec: {spec}}}"
    )
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: duet.dev/v1alpha1, kind: TrafficPolicy, metadata: {{name: {name}}}, spec: {spec}}}"
    )
}

#[test]
fn routes_that_lead_somewhere_pass() {
    let good = "{parentRefs: [{kind: Service, name: a, port: 80, sectionName: web}], rules: [{backendRefs: [{name: a, port: 80}]}]}";
    assert_eq!(findings(&route(good)), (vec![], vec![]));
}

#[test]
fn routes_that_lead_nowhere_are_named() {
    let cases = [
        ("{parentRefs: [{kind: Service, name: b}]}", "spec.parentRefs[0].name: no service \"b\""),
        (
            "{parentRefs: [{kind: Service, name: a, port: 81}]}",
            "spec.parentRefs[0].port: service default/a has no port 81",
        ),
        (
            "{parentRefs: [{kind: Service, name: a, sectionName: x}]}",
            "spec.parentRefs[0].sectionName: ",
        ),
        (
            "{parentRefs: [{kind: Service, name: a, port: 81, sectionName: web}]}",
            "spec.parentRefs[0].port: service default/a has no port 81",
        ),
        (
            "{parentRefs: [{kind: Service, name: a}], rules: [{backendRefs: [{name: b, port: 80}]}]}",
            "spec.rules[0].backendRefs[0].name: no service \"b\"",
        ),
        (
            "{parentRefs: [{kind: Service, name: a}], rules: [{backendRefs: [{name: a, port: 81}]}]}",
            "spec.rules[0].backendRefs[0].port: service default/a has no port 81; it has 80",
        ),
        (
            "{parentRefs: [{kind: Service, name: a}], rules: [{backendRefs: [{name: a}]}]}",
            "spec.rules[0].backendRefs[0].port: the reference",
        ),
        (
            "{parentRefs: [{kind: Service, name: a}], rules: [{backendRefs: [{name: a, port: 80, kind: Bucket}]}]}",
            "spec.rules[0].backendRefs[0].kind: backends of kind",
        ),
    ];
    for (spec, expected) in cases {
        let error = error(&route(spec));
        assert!(error.starts_with("test.yaml:3:") && error.contains(expected), "{spec}: {error}");
    }
}

#[test]
fn a_registered_service_needs_no_resource() {
    let mut index = index(
        &policy("p", "{targetRefs: [{kind: Service, name: b}]}")
            .replace("{name: p}", "{name: p, namespace: shop}"),
    );
    assert_eq!(validate(&index).unregistered.len(), 1);
    register(&mut index, "b", "b-1", &["8080"]);
    assert_eq!(validate(&index), Findings::default());
}

#[test]
fn policies_without_target_and_second_policies_are_named() {
    assert!(
        error(&policy("p", "{targetRefs: [{kind: HTTPRoute, name: r}]}"))
            .contains("spec.targetRefs[0].name: there is no HTTPRoute default/r")
    );
    assert!(
        error(&policy("p", "{targetRefs: [{kind: Service, name: a, sectionName: x}]}"))
            .contains("sectionName")
    );
    assert!(
        error(&policy("p", "{targetRefs: [{kind: Service, name: a, group: apps}]}"))
            .contains("group")
    );
    let two = [
        policy("p", "{targetRefs: [{kind: Service, name: a}]}"),
        policy("q", "{targetRefs: [{kind: Service, name: a}]}"),
    ];
    let error = error(&two.join("\n---\n"));
    assert!(
        error.starts_with("test.yaml:5:") && error.contains("has the TrafficPolicy \"p\" already"),
        "{error}"
    );
}

#[test]
fn a_parent_is_one_port() {
    let service = "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {ports: [{name: web, port: 80}, {name: grpc, port: 81}]}}";
    let parent = |parent: &str| {
        let spec = format!(
            "{{parentRefs: [{{kind: Service, name: b{parent}}}], rules: [{{backendRefs: [{{name: a, port: 80}}]}}]}}"
        );
        error(&format!("{service}\n---\n{}", route(&spec)))
    };
    assert_eq!(parent(", port: 80, sectionName: web"), "");
    assert!(parent(", port: 80, sectionName: grpc").contains("is not the one named \"grpc\""));
    assert!(parent(", sectionName: ''").contains("no port named \"\""));
}

#[test]
fn the_older_of_two_policies_counts_where_both_say_when() {
    let policy = |name: &str, created: &str| {
        let policy = policy(name, "{targetRefs: [{kind: Service, name: a}]}");
        policy.replace(&format!("name: {name}}}"), &format!("name: {name}{created}}}"))
    };
    let (old, new) =
        (", creationTimestamp: 2026-01-01T00:00:00Z", ", creationTimestamp: 2026-01-02T00:00:00Z");
    for (first, second, ignored) in [
        (new, old, "test.yaml:3:"),
        (old, new, "test.yaml:5:"),
        (old, old, "test.yaml:5:"),
        ("", old, "test.yaml:5:"),
        (new, "", "test.yaml:5:"),
    ] {
        let two = format!("{}\n---\n{}", policy("p", first), policy("q", second));
        let standard = two.replace(
            "duet.dev/v1alpha1, kind: Traffic",
            "gateway.networking.x-k8s.io/v1alpha1, kind: XBackendTraffic",
        );
        for two in [two, standard] {
            let error = error(&two);
            assert!(error.starts_with(ignored), "{first} {second}: {error}");
        }
    }
}

#[test]
fn rules_that_lead_nowhere_and_rules_that_are_shadowed_are_warned_of() {
    let warnings = |spec: &str| {
        let (errors, warnings) = findings(&route(spec));
        assert_eq!(errors, Vec::<String>::new(), "{spec}");
        warnings
    };
    let parent = "parentRefs: [{kind: Service, name: a}]";
    let backends = "backendRefs: [{name: a, port: 80}]";
    for (rest, expected) in [
        ("", "spec.rules: a route without rules"),
        (", rules: [{}]", "spec.rules[0].backendRefs: no backend"),
        (
            ", rules: [{backendRefs: [{name: a, port: 80, weight: 0}]}]",
            "spec.rules[0].backendRefs: no backend",
        ),
        (
            &format!(", rules: [{{{backends}}}, {{{backends}}}]"),
            "spec.rules[1]: this rule is never chosen: HTTPRoute default/r rule 0 match 0 (test.yaml:3) takes",
        ),
    ] {
        let warnings = warnings(&format!("{{{parent}{rest}}}"));
        assert!(warnings.len() == 1 && warnings[0].contains(expected), "{rest}: {warnings:?}");
    }
    let redirect = "{filters: [{type: RequestRedirect, requestRedirect: {hostname: b}}]}";
    assert_eq!(warnings(&format!("{{{parent}, rules: [{redirect}]}}")), Vec::<String>::new());
    let group = format!(
        "{{parentRefs: [{{kind: Service, group: apps, name: a}}], rules: [{{{backends}}}]}}"
    );
    assert_eq!(warnings(&group).len(), 2);
}

#[test]
fn fields_that_do_nothing_are_warned_of() {
    let yaml = [
        route(
            "{parentRefs: [{kind: Service, name: a}], rules: [{backendRefs: [{name: a, port: 80}]}]}",
        ),
        policy(
            "p",
            "{targetRefs: [{kind: HTTPRoute, name: r}], retryBudget: {percent: 10}, timeouts: {connect: 2s}}",
        ),
        route("{parentRefs: [{name: a-gateway}]}").replace("name: r", "name: other"),
    ];
    let (errors, warnings) = findings(&yaml.join("\n---\n"));
    assert_eq!(errors, Vec::<String>::new());
    assert_eq!(warnings.len(), 3, "{warnings:?}");
}

#[test]
fn events_that_go_nowhere_are_named() {
    let subscription = |spec: &str| {
        format!(
            "{{apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {{name: s}}, spec: {spec}}}"
        )
    };
    assert!(
        error(&subscription("{topic: t, subscriber: {service: b, path: /}}"))
            .contains("spec.subscriber.service: no service \"b\"")
    );
    assert!(
        error(&subscription("{bus: x, topic: t, subscriber: {service: a, path: /}}"))
            .contains("spec.bus: there is no EventBus \"x\"")
    );
    let bus = "{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {name: x}, spec: {backend: {embedded: {}}, declaredTopicsOnly: true}}";
    let topic = "{apiVersion: duet.dev/v1alpha1, kind: Topic, metadata: {name: t}, spec: {bus: x}}";
    let on_x = subscription("{bus: x, topic: t, subscriber: {service: a, path: /}}");
    assert!(error(&format!("{bus}\n---\n{on_x}")).contains("spec.topic: "));
    assert_eq!(error(&format!("{bus}\n---\n{topic}\n---\n{on_x}")), "");
    assert!(error(topic).contains("spec.bus"));
}

#[test]
fn tables_that_go_nowhere_are_named() {
    let source = |spec: &str| {
        format!(
            "{{apiVersion: duet.dev/v1alpha1, kind: OutboxSource, metadata: {{name: o}}, spec: {{database: {{urlFrom: {{env: URL}}}}, {spec}}}}}"
        )
    };
    assert!(error(&source("service: b")).contains("spec.service: no service \"b\""));
    assert!(error(&source("service: a, bus: x")).contains("spec.bus: there is no EventBus \"x\""));
    let bus = "{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {name: x}, spec: {backend: {embedded: {}}, declaredTopicsOnly: true}}";
    let fixed = source("service: a, bus: x, topic: t");
    assert!(
        error(&format!("{bus}\n---\n{fixed}")).contains("spec.topic: bus \"x\" takes declared")
    );
    assert_eq!(error(&format!("{bus}\n---\n{}", source("service: a, bus: x"))), "");
}

#[test]
fn two_buses_in_one_place_are_named() {
    let bus = |name: &str, nats: &str| {
        format!(
            "{{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {{name: {name}}}, spec: {{backend: {{nats: {{{nats}}}}}}}}}"
        )
    };
    let default = bus("default", "servers: ['nats://a:1', 'nats://b:1']");
    let with = |other: &str| error(&format!("{other}\n---\n{default}"));
    // The default bus counts, though its name comes later.
    let why = with(&bus("audit", "servers: ['tls://B:1']"));
    assert!(why.contains("spec.backend.nats.servers: EventBus \"default\" is kept"), "{why}");
    assert_eq!(with(&bus("audit", "servers: ['nats://b:1'], streamPrefix: audit")), "");
    assert_eq!(with(&bus("audit", "servers: ['nats://b:2']")), "");
}
