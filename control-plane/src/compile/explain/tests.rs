use duet_api::duration;
use proptest::prelude::*;

use super::*;
use crate::compile::destination;
use crate::compile::testing::index;

const SERVICES: &str = "\
{apiVersion: v1, kind: Service, metadata: {name: orders, namespace: shop}, spec: {ports: [{name: web, port: 80}, {name: grpc, port: 7070}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: v2, namespace: shop}, spec: {ports: [{port: 80}]}}
";

fn route(name: &str, namespace: &str, parent: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: orders, namespace: shop{parent}}}]\n  rules:\n  {rules}\n"
    )
}

fn policy(name: &str, target: &str, fields: &str) -> String {
    format!(
        "---\napiVersion: duet.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
         targetRefs: [{target}]\n  {fields}\n"
    )
}

/// A setting as text: its value, and where it comes from.
fn shown(settings: &[Setting], name: &str) -> String {
    let setting = settings.iter().find(|setting| setting.name == name).unwrap();
    let from = setting.from.as_ref().map_or("default".to_owned(), ToString::to_string);
    format!("{} {from}", setting.value)
}

#[test]
fn every_setting_names_the_line_that_gives_it() {
    let yaml = [
        SERVICES.to_owned(),
        route(
            "r",
            "shop",
            "",
            "- name: pay\n    timeouts: {request: 1s}\n    retry: {attempts: 5}\n    backendRefs: [{name: v2, port: 80}]",
        ),
        policy(
            "on-service",
            "{kind: Service, name: orders}",
            "retry: {codes: [503]}\n  retryBudget: {percent: 5}\n  timeouts:\n    connect: 2s",
        ),
        policy(
            "on-rule",
            "{kind: HTTPRoute, name: r, sectionName: pay}",
            "timeouts: {request: 9s, idle: 1m}",
        ),
        policy("on-v2", "{kind: Service, name: v2}", "timeouts: {connect: 3s}"),
    ];
    let index = index(&yaml.concat());
    let explanation = explain(&index, "shop", "orders").unwrap();
    assert_eq!(explanation.rule_name(0), Some("pay"));
    let place = explanation.place(0).unwrap();
    assert_eq!(place.to_string(), "test.yaml:11 (HTTPRoute shop/r rule 0 match 0)");
    let settings = explanation.settings(0);
    for (name, expected) in [
        ("timeouts.request", "\"1s\" test.yaml:12 (HTTPRoute shop/r rule 0)"),
        ("timeouts.backendRequest", "null default"),
        ("timeouts.idle", "\"1m\" test.yaml:31 (TrafficPolicy shop/on-rule)"),
        ("retry.attempts", "5 test.yaml:13 (HTTPRoute shop/r rule 0)"),
        ("retry.codes", "[503] test.yaml:21 (TrafficPolicy shop/on-service)"),
        ("retry.grpcCodes", "[] test.yaml:21 (TrafficPolicy shop/on-service)"),
        ("retry.backoff", "\"25ms\" default"),
        (
            "retryBudget",
            "{\"minPerSecond\":10,\"percent\":5} test.yaml:22 (TrafficPolicy shop/on-service)",
        ),
    ] {
        assert_eq!(shown(&settings, name), expected, "{name}");
    }
    let backend = explanation.backend_settings("shop/v2:80");
    let expected = "\"3s\" test.yaml:38 (TrafficPolicy shop/on-v2)";
    assert_eq!(shown(&backend, "timeouts.connect"), expected, "as its own service says");
    assert_eq!(shown(&backend, "loadBalancer"), "\"PeakEwma\" default");
    assert_eq!(explanation.backend_settings("shop/gone:80"), []);
}

#[test]
fn policies_that_a_filter_names_come_first_and_gateway_apis_own_last() {
    let standard = "\
---
apiVersion: gateway.networking.x-k8s.io/v1alpha1
kind: XBackendTrafficPolicy
metadata: {name: std, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: orders}]
  retryConstraint: {budget: {percent: 30}}
  sessionPersistence: {type: Header}
";
    let filter =
        "[{type: ExtensionRef, extensionRef: {group: duet.dev, kind: TrafficPolicy, name: x}}]";
    let rule = format!("- filters: {filter}\n    backendRefs: [{{name: v2, port: 80}}]");
    let own = "- sessionPersistence: {sessionName: s}\n    backendRefs: [{name: v2, port: 80}]";
    let yaml = [
        SERVICES.to_owned(),
        route("r", "shop", "", &format!("{rule}\n  {own}")),
        standard.to_owned(),
        policy("on-route", "{kind: HTTPRoute, name: r}", "timeouts: {idle: 2s, request: 2s}"),
        policy("x", "", "timeouts: {idle: 3s}"),
    ];
    let index = index(&yaml.concat());
    let explanation = explain(&index, "shop", "orders").unwrap();
    let of = |rule: usize, name: &str| shown(&explanation.settings(rule), name);
    assert!(of(0, "timeouts.idle").ends_with("(TrafficPolicy shop/x)"));
    assert!(of(0, "timeouts.request").ends_with("(TrafficPolicy shop/on-route)"));
    assert!(of(1, "timeouts.idle").ends_with("(TrafficPolicy shop/on-route)"));
    assert_eq!(
        of(0, "retryBudget"),
        "{\"minPerSecond\":10,\"percent\":30} test.yaml:21 (XBackendTrafficPolicy shop/std)"
    );
    assert_eq!(
        of(0, "sessionPersistence"),
        "{\"sessionName\":\"duet-session\",\"type\":\"Header\"} test.yaml:22 (XBackendTrafficPolicy shop/std)"
    );
    assert!(of(1, "sessionPersistence").ends_with("test.yaml:13 (HTTPRoute shop/r rule 1)"));
}

#[test]
fn what_replicas_keep_to_themselves_is_what_their_own_service_says() {
    let limit = |requests: u32| {
        format!(
            "rateLimit: {{requests: {requests}}}\n  outlierDetection: {{minRequests: {requests}}}"
        )
    };
    let yaml = [
        SERVICES.to_owned(),
        route("r", "shop", "", "- backendRefs: [{name: v2, port: 80}]"),
        policy("dialled", "{kind: Service, name: orders}", &limit(1)),
    ];
    let of = |yaml: &str, name: &str| {
        let index = index(yaml);
        let explanation = explain(&index, "shop", "orders").unwrap();
        shown(&explanation.backend_settings("shop/v2:80"), name)
    };
    let dialled = yaml.concat();
    assert_eq!(
        of(&dialled, "rateLimit"),
        "null default",
        "nobody asks the dialled service's replicas"
    );
    assert!(of(&dialled, "outlierDetection").ends_with("(TrafficPolicy shop/dialled)"));
    let both = dialled + &policy("own", "{kind: Service, name: v2}", &limit(2));
    for name in ["rateLimit", "outlierDetection"] {
        assert!(of(&both, name).ends_with("(TrafficPolicy shop/own)"), "{name}");
    }
}

#[test]
fn a_service_without_routes_has_a_rule_without_a_place() {
    let index = index(
        &[SERVICES, &policy("p", "{kind: Service, name: v2}", "timeouts: {idle: 9s}")].concat(),
    );
    let explanation = explain(&index, "shop", "v2").unwrap();
    assert_eq!((explanation.rules.len(), explanation.place(0)), (1, None));
    let idle = shown(&explanation.settings(0), "timeouts.idle");
    assert_eq!(idle, "\"9s\" test.yaml:10 (TrafficPolicy shop/p)");
    let connect = shown(&explanation.backend_settings("shop/v2:80"), "timeouts.connect");
    assert_eq!(connect, "\"1s\" default");
}

#[test]
fn routes_that_do_not_count_say_why() {
    let rule = "- backendRefs: [{name: orders, namespace: shop, port: 80}]";
    let yaml = [
        SERVICES.to_owned(),
        route("own", "shop", "", rule),
        route("grpc", "shop", ", sectionName: grpc", rule),
        route("other", "shop", ", port: 7070", rule),
        route("consumer", "web", "", rule),
    ];
    let index = index(&yaml.concat());
    let passed = |from: &str| {
        let explanation = explain(&index, from, "orders.shop").unwrap();
        let passed = explanation.passed_over.iter();
        passed.map(|route| format!("{}: {}", route.place.resource, route.why)).collect::<Vec<_>>()
    };
    let elsewhere = [
        "HTTPRoute shop/grpc: it is attached to the port named \"grpc\" of the service",
        "HTTPRoute shop/other: it is attached to port 7070 of the service",
    ];
    let consumer =
        "HTTPRoute web/consumer: it counts for callers of its own namespace \"web\" only";
    assert_eq!(passed("ops"), [elsewhere[0], elsewhere[1], consumer]);
    let replaced =
        "HTTPRoute shop/own: the routes of the caller's own namespace \"web\" take its place";
    assert_eq!(passed("web"), [elsewhere[0], elsewhere[1], replaced]);
}

#[test]
fn unknown_destinations_say_what_the_caller_is_told() {
    let index = index(SERVICES);
    let why = |authority: &str| explain(&index, "shop", authority).unwrap_err();
    assert_eq!(why("orders:81"), "service shop/orders has no port 81; it has 80, 7070");
    assert_eq!(why("nobody"), destination(&index, "shop", "nobody").outcome.unwrap_err());
}

/// Which fields one policy, or the rule itself, gives.
type Given = [bool; 12];

/// The fields of a policy; the values tell which of them it is. Values of a rule's own are of the same form.
fn given(given: Given, number: u32) -> String {
    let times = [("request", 0), ("backendRequest", 1), ("idle", 2), ("connect", 3)];
    let times = times.iter().filter(|(_, at)| given[*at]);
    let times: Vec<String> = times.map(|(name, at)| format!("{name}: {number}{at}s")).collect();
    let retry = [
        format!("attempts: {number}"),
        format!("codes: [50{number}]"),
        format!("backoff: {number}ms"),
    ];
    let retry = retry.iter().zip(&given[4..]).filter(|(_, given)| **given);
    let retry: Vec<&str> = retry.map(|(text, _)| text.as_str()).collect();
    let budget =
        if given[7] { format!(", retryBudget: {{percent: {number}}}") } else { String::new() };
    let retry = match retry.as_slice() {
        [] => String::new(),
        some => format!(", retry: {{{}}}", some.join(", ")),
    };
    let more = [
        format!(", hedge: {{after: {number}ms, maxPercent: {number}}}"),
        format!(", fault: {{abort: {{percent: {number}, status: 50{number}}}}}"),
        format!(", loadBalancer: {{type: Random, slowStart: {number}s}}"),
        format!(", outlierDetection: {{minRequests: {number}}}"),
    ];
    let more = more.iter().zip(&given[8..]).filter(|(_, given)| **given);
    let more: String = more.map(|(text, _)| text.as_str()).collect();
    format!("timeouts: {{{}}}{retry}{budget}{more}", times.join(", "))
}

fn time(setting: &Setting) -> Option<prost_types::Duration> {
    let text = setting.value.as_str()?;
    prost_types::Duration::try_from(duration::parse(text).unwrap()).ok()
}

proptest! {
    /// What is explained is what the sidecar gets.
    #[test]
    fn explained_values_are_the_compiled_ones(policies: [Given; 5], own: Given) {
        let targets = [
            "{kind: HTTPRoute, name: r, sectionName: pay}",
            "{kind: HTTPRoute, name: r}",
            "{kind: Service, name: orders, sectionName: web}",
            "{kind: Service, name: orders}",
            "{kind: Service, name: v2}",
        ];
        // Of its own a rule has two timeouts and three fields of `retry` only.
        let allowed = [0, 1, 4, 5, 6];
        let own: Given = std::array::from_fn(|at| allowed.contains(&at) && own[at]);
        let rule = format!("- {{name: pay, backendRefs: [{{name: v2, port: 80}}], {}}}", given(own, 9));
        let mut yaml = vec![SERVICES.to_owned(), route("r", "shop", "", &rule)];
        for (number, (target, fields)) in (1..).zip(targets.iter().zip(policies)) {
            let spec = format!("{{targetRefs: [{target}], {}}}", given(fields, number));
            yaml.push(format!(
                "---\n{{apiVersion: duet.dev/v1alpha1, kind: TrafficPolicy, metadata: {{name: p{number}, namespace: shop}}, spec: {spec}}}\n"
            ));
        }
        // A bound on one try that is longer than the whole request is refused in a rule: 90 s and 91 s.
        let yaml = yaml.concat().replace("backendRequest: 91s", "backendRequest: 89s");
        let index = index(&yaml);
        let compiled = destination(&index, "shop", "orders").outcome.unwrap();
        let explanation = explain(&index, "shop", "orders").unwrap();
        prop_assert_eq!(&explanation.rules, &compiled.rules);
        let mut settings = explanation.settings(0);
        settings.extend(explanation.backend_settings("shop/v2:80"));
        let of = |name: &str| settings.iter().find(|setting| setting.name == name).unwrap();
        let timeouts = compiled.rules[0].timeouts.unwrap();
        prop_assert_eq!(time(of("timeouts.request")), timeouts.request);
        prop_assert_eq!(time(of("timeouts.backendRequest")), timeouts.backend_request);
        prop_assert_eq!(time(of("timeouts.idle")), timeouts.idle);
        prop_assert_eq!(time(of("timeouts.connect")), compiled.backends[0].connect_timeout);
        let retry = compiled.rules[0].retry.as_ref().unwrap();
        prop_assert_eq!(&of("retry.attempts").value, &Value::from(retry.attempts));
        prop_assert_eq!(&of("retry.codes").value, &Value::from(retry.codes.clone()));
        prop_assert_eq!(time(of("retry.backoff")), retry.backoff);
        let percent = compiled.retry_budget.unwrap().percent;
        prop_assert_eq!(&of("retryBudget").value["percent"], &Value::from(percent));
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        let hedge = compiled.rules[0].hedge.map(|hedge| hedge.max_percent);
        prop_assert_eq!(number(&of("hedge").value["maxPercent"]), hedge);
        let abort = compiled.rules[0].fault.as_ref().map(|fault| fault.abort_status);
        prop_assert_eq!(number(&of("fault").value["abort"]["status"]), abort);
        let backend = &compiled.backends[0];
        let slow_start = of("loadBalancer").value["slowStart"].as_str().map(|t| duration::parse(t).unwrap());
        let slow_start = slow_start.and_then(|time| prost_types::Duration::try_from(time).ok());
        prop_assert_eq!(slow_start, backend.slow_start);
        let requests = backend.outlier_detection.map(|limits| limits.min_requests);
        prop_assert_eq!(number(&of("outlierDetection").value["minRequests"]), requests);
    }
}
