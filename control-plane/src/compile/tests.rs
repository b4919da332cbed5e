use super::testing::{index, register, replica};
use super::*;
use crate::index::Change;
use duet_api::spiffe::SpiffeId;
use std::time::Duration;

const SERVICES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: orders, namespace: shop}, spec: {ports: [{name: web, port: 80, targetPort: 8080}, {name: grpc, port: 7070, appProtocol: grpc}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: v2, namespace: shop}, spec: {ports: [{port: 80, targetPort: web}]}}
";

fn http_route(name: &str, namespace: &str, rules: &str) -> String {
    format!(
        "\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: orders, namespace: shop}}]\n  rules: {rules}\n"
    )
}

fn config(index: &Index, from: &str, authority: &str) -> proto::Destination {
    destination(index, from, authority).outcome.unwrap()
}

/// Rule names, shortened, in order.
fn order(index: &Index, from: &str) -> Vec<String> {
    let rules = config(index, from, "orders.shop").rules;
    rules
        .iter()
        .map(|rule| {
            rule.name.replace("Route shop/", " ").replace(" rule ", " ").replace(" match ", ".")
        })
        .collect()
}

fn secs(duration: Option<&prost_types::Duration>) -> Option<Duration> {
    duration.map(|duration| Duration::try_from(*duration).unwrap())
}

#[test]
fn a_service_without_routes_has_one_rule_and_the_documented_defaults() {
    let mut index = index(SERVICES);
    register(&mut index, "orders", "o1", &["8080"]);
    let compiled = destination(&index, "shop", "orders");
    let config = compiled.outcome.unwrap();
    assert_eq!(config.service, "shop/orders:80");
    let [rule] = config.rules.as_slice() else { panic!("{:?}", config.rules) };
    assert_eq!((rule.name.as_str(), rule.route.as_str()), ("default", "default"));
    assert_eq!(rule.backends[0].backend, "shop/orders:80");
    assert_eq!(rule.timeouts, Some(proto::Timeouts::default()), "absent: the sidecar's defaults");
    let retry = rule.retry.as_ref().unwrap();
    assert_eq!((retry.attempts, retry.max_body_bytes, &retry.codes[..]), (2, 65_536, &[][..]));
    assert_eq!(secs(retry.backoff.as_ref()), Some(Duration::from_millis(25)));
    let budget = config.retry_budget.unwrap();
    assert_eq!((budget.percent, budget.min_per_second), (20, 10));
    let backend = &config.backends[0];
    assert_eq!(secs(backend.connect_timeout.as_ref()), Some(Duration::from_secs(1)));
    let endpoint = &compiled.endpoints["shop/orders:80"].values().next().unwrap();
    assert_eq!(endpoint.identity, "spiffe://duet.local/ns/shop/sa/orders");
    assert_eq!((endpoint.port, endpoint.instance.as_str()), (8080, "o1"));
}

#[test]
fn precedence_is_gateway_apis() {
    let rules = "[\
        {matches: [{path: {value: /}}, {path: {value: /a}, method: GET}]},\
        {matches: [{path: {value: /a/}}, {path: {type: Exact, value: /a}}]},\
        {matches: [{path: {type: RegularExpression, value: '/a.*'}}]},\
        {matches: [{path: {value: /a}, headers: [{name: X, value: '1'}]}, {path: {value: /a}, queryParams: [{name: q, value: '1'}]}]},\
        {matches: [{path: {value: /a/longer}}]}]";
    let index = index(&format!("{SERVICES}{}", http_route("r", "shop", rules)));
    let expected = ["1.1", "2.0", "4.0", "0.1", "3.0", "3.1", "1.0", "0.0"];
    assert_eq!(order(&index, "shop"), expected.map(|at| format!("HTTP r {at}")));
}

#[test]
fn several_routes_are_one_table_ordered_by_name_on_ties() {
    let rule = "[{matches: [{path: {value: /x}}]}]";
    let grpc = "\n---\n{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: g, namespace: shop}, spec: \
                {parentRefs: [{group: '', kind: Service, name: orders}], rules: [{}, {matches: [{method: {service: s}}, {method: {service: s, method: m}}]}]}}";
    let yaml = [
        SERVICES.to_owned(),
        http_route("b", "shop", rule),
        http_route("a", "shop", rule),
        grpc.to_owned(),
    ];
    let index = index(&yaml.concat());
    assert_eq!(
        order(&index, "shop"),
        ["GRPC g 1.1", "GRPC g 1.0", "GRPC g 0.0", "HTTP a 0.0", "HTTP b 0.0"]
    );
    let config = config(&index, "shop", "orders:7070");
    let paths: Vec<_> = config.rules.iter().map(|r| r.r#match.clone().unwrap()).collect();
    assert!(paths[0].grpc && paths[2].grpc && !paths[3].grpc);
    let kind = |at: usize| paths[at].path.as_ref().and_then(|path| path.kind.clone());
    assert_eq!(kind(0), Some(proto::path_match::Kind::Exact("/s/m".into())));
    assert_eq!(kind(1), Some(proto::path_match::Kind::Prefix("/s".into())));
    assert_eq!(kind(2), None);
}

#[test]
fn consumer_routes_replace_producer_routes_for_their_namespace_only() {
    let rule = "[{backendRefs: [{name: orders, namespace: shop, port: 80}]}]";
    let index = index(
        &[SERVICES.to_owned(), http_route("p", "shop", rule), http_route("c", "web", rule)]
            .concat(),
    );
    assert_eq!(order(&index, "shop"), ["HTTP p 0.0"]);
    assert_eq!(order(&index, "ops"), ["HTTP p 0.0"]);
    assert_eq!(order(&index, "web"), ["HTTPRoute web/c 0.0"]);
}

#[test]
fn broken_backends_get_their_share_and_a_reason() {
    let rules = "[{backendRefs: [{name: v2, port: 80, weight: 3}, {name: gone, port: 80}, {name: v2, port: 99, weight: 0}]}, {}, {backendRefs: [{name: v2, port: 80, weight: 0}]}]";
    let index = index(&format!("{SERVICES}{}", http_route("r", "shop", rules)));
    let compiled = destination(&index, "shop", "orders");
    let config = compiled.outcome.unwrap();
    let backends = &config.rules[0].backends;
    assert_eq!((backends[0].backend.as_str(), backends[0].weight), ("shop/v2:80", 3));
    assert!(backends[1].backend.is_empty() && backends[1].invalid.contains("no service \"gone\""));
    assert!(backends[2].invalid.contains("no port 99; it has 80"), "{}", backends[2].invalid);
    assert!(config.rules[1].backends[0].invalid.contains("without backendRefs"));
    assert!(config.rules[2].backends[1].invalid.contains("weight 0"));
    assert_eq!(config.backends.len(), 1);
    assert!(compiled.depends_on.contains(&ServiceKey::new("shop", "gone")));
}

#[test]
fn the_most_specific_policy_wins_field_by_field() {
    let policy = |name: &str, target: &str, fields: &str| {
        format!(
            "\n---\n{{apiVersion: duet.dev/v1alpha1, kind: TrafficPolicy, metadata: {{name: {name}, namespace: shop}}, spec: {{targetRefs: [{target}], {fields}}}}}"
        )
    };
    let yaml = [
        SERVICES.to_owned(),
        http_route("r", "shop", "[{name: pay, timeouts: {request: 1s}, retry: {attempts: 5}}, {}]"),
        policy(
            "on-service",
            "{kind: Service, name: orders}",
            "timeouts: {request: 9s, idle: 8s, connect: 7s}, retry: {codes: [503], grpcCodes: [unavailable]}, retryBudget: {percent: 1}",
        ),
        policy(
            "on-port",
            "{kind: Service, name: orders, sectionName: web}",
            "timeouts: {idle: 6s}",
        ),
        policy("on-route", "{kind: HTTPRoute, name: r}", "timeouts: {backendRequest: 500ms}"),
        policy(
            "on-rule",
            "{kind: HTTPRoute, name: r, sectionName: pay}",
            "timeouts: {request: 3s, backendRequest: 0s}",
        ),
        policy("zz-second", "{kind: Service, name: orders}", "timeouts: {request: 1m}"),
    ];
    let index = index(&yaml.concat());
    let config = config(&index, "shop", "orders");
    let times = |rule: usize| {
        let t = config.rules[rule].timeouts.as_ref().unwrap();
        [secs(t.request.as_ref()), secs(t.backend_request.as_ref()), secs(t.idle.as_ref())]
    };
    let (s, ms) = (|n| Some(Duration::from_secs(n)), |n| Some(Duration::from_millis(n)));
    assert_eq!(times(0), [s(1), s(0), s(6)], "own, rule, port");
    assert_eq!(times(1), [s(9), ms(500), s(6)], "service, route, port");
    let retry = config.rules[0].retry.as_ref().unwrap();
    assert_eq!(
        (retry.attempts, &retry.codes[..], &retry.grpc_codes[..]),
        (5, &[503][..], &[14][..])
    );
    assert_eq!(config.retry_budget.unwrap().percent, 1);
}

#[test]
fn filters_and_matches_arrive_as_the_sidecar_needs_them() {
    let rules = "[{matches: [{path: {value: /old/}, headers: [{name: X-A, value: '1'}, {name: x-a, value: '2'}]}], filters: [\
        {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-B, value: v}], remove: [X-C]}},\
        {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}], backendRefs: [{name: v2, port: 80}]},\
        {matches: [{path: {value: /away}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: x.test}}]}]";
    let index = index(&format!("{SERVICES}{}", http_route("r", "shop", rules)));
    let rules = config(&index, "shop", "orders").rules;
    let away = &rules[0];
    assert!(away.backends.is_empty(), "a redirect needs no backend");
    let Some(proto::filter::Kind::Redirect(redirect)) = &away.filters[0].kind else { panic!() };
    assert_eq!((redirect.status, redirect.hostname.as_str(), redirect.port), (302, "x.test", 0));
    let old = &rules[1];
    let found = old.r#match.as_ref().unwrap();
    assert_eq!(
        found.path.as_ref().unwrap().kind,
        Some(proto::path_match::Kind::Prefix("/old".into()))
    );
    assert_eq!((found.headers.len(), found.headers[0].name.as_str()), (1, "x-a"));
    let Some(proto::filter::Kind::RequestHeaders(headers)) = &old.filters[0].kind else { panic!() };
    assert_eq!((headers.set[0].name.as_str(), headers.remove[0].as_str()), ("x-b", "x-c"));
}

#[test]
fn a_replica_is_found_by_number_by_name_or_because_it_has_one_port() {
    let mut index = index(SERVICES);
    register(&mut index, "orders", "by-number", &["9000", "8080"]);
    register(&mut index, "orders", "only", &["5555"]);
    register(&mut index, "orders", "none", &["1", "2"]);
    register(&mut index, "v2", "by-name", &["1", "web=3000/h2c"]);
    let mut away = replica("orders", "away", &["8080"]);
    away.ready = false;
    index.apply(Change::PutReplica(away));
    let ports = |authority: &str, backend: &str| {
        let endpoints = destination(&index, "shop", authority).endpoints.remove(backend).unwrap();
        let mut found: Vec<_> = endpoints.into_values().map(|e| (e.instance, e.port)).collect();
        found.sort();
        found
    };
    let expected = [("by-number".to_owned(), 8080), ("only".to_owned(), 5555)];
    assert_eq!(ports("orders", "shop/orders:80"), expected);
    assert_eq!(ports("v2", "shop/v2:80"), [("by-name".to_owned(), 3000)]);
    assert_eq!(config(&index, "shop", "v2").backends[0].protocol(), proto::Protocol::H2c);
    assert_eq!(config(&index, "shop", "orders:7070").backends[0].protocol(), proto::Protocol::H2c);
    assert_eq!(config(&index, "shop", "orders").backends[0].protocol(), proto::Protocol::Auto);
}

#[test]
fn a_registered_service_needs_no_resource() {
    let mut index = Index::default();
    register(&mut index, "pay", "p1", &["8080/http", "9090"]);
    for (authority, port) in [("pay", 8080), ("pay:8080", 8080), ("pay:9090", 9090)] {
        let compiled = destination(&index, "shop", authority);
        let endpoints = compiled.endpoints.values().next().unwrap();
        assert_eq!(endpoints.values().next().unwrap().port, port, "{authority}");
    }
    let why = |authority: &str| destination(&index, "shop", authority).outcome.unwrap_err();
    assert_eq!(why("pay:1"), "service shop/pay has no port 1; it has 80, 8080, 9090");
    assert_eq!(why("pay.ops"), "no service \"pay\" in namespace \"ops\"; there is one in shop");
    assert_eq!(why("nobody"), "no service \"nobody\" in namespace \"shop\"");
}

#[test]
fn endpoint_slices_are_reached_in_the_clear() {
    let slice = "\n---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s, namespace: shop, labels: {kubernetes.io/service-name: orders}}, \
                 addressType: IPv4, ports: [{name: web, port: 3000}], endpoints: [{addresses: [10.1.0.1]}, {addresses: [10.1.0.2], conditions: {ready: false}}]}";
    let index = index(&format!("{SERVICES}{slice}"));
    let compiled = destination(&index, "shop", "orders");
    let endpoints: Vec<_> = compiled.endpoints["shop/orders:80"].values().collect();
    assert_eq!(endpoints.len(), 1);
    assert_eq!(
        (endpoints[0].address.as_str(), endpoints[0].identity.as_str()),
        ("10.1.0.1:3000", "")
    );
}

#[test]
fn a_node_gets_its_subscriptions_and_every_bus() {
    let subscription = |name: &str, service: &str| {
        format!(
            "\n---\n{{apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {{name: {name}, namespace: shop}}, spec: {{topic: t, subscriber: {{service: {service}, path: /e}}}}}}"
        )
    };
    let bus = "\n---\n{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {name: audit}, spec: {backend: {embedded: {}}, declaredTopicsOnly: true}}\n---\n\
               {apiVersion: duet.dev/v1alpha1, kind: Topic, metadata: {name: t}, spec: {bus: audit}}";
    let index = index(
        &[
            SERVICES,
            &subscription("b", "orders"),
            &subscription("a", "orders"),
            &subscription("c", "v2"),
            bus,
        ]
        .concat(),
    );
    let who = SpiffeId::new("duet.local", "shop", "orders").unwrap();
    let services = BTreeSet::from(["orders".to_owned(), "v2".to_owned()]);
    let workload = workload(&index, &who, "none", &services);
    let names: Vec<_> = workload.subscriptions.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["shop/a", "shop/b"], "v2 is not the account's to serve");
    assert_eq!(workload.subscriptions[0].dead_letter_topic, "t.dead-letter");
    let buses: Vec<_> = workload.buses.iter().map(|b| (b.name.as_str(), b.topics.len())).collect();
    assert_eq!(buses, [("audit", 1), ("default", 0)]);
}

fn traffic_policy(name: &str, spec: &str) -> String {
    format!(
        "\n---\n{{apiVersion: duet.dev/v1alpha1, kind: TrafficPolicy, metadata: {{name: {name}, namespace: shop}}, spec: {{{spec}}}}}"
    )
}

#[test]
fn a_rule_gets_the_policy_that_its_filter_names_and_500_where_there_is_none() {
    let filter = |name: &str| {
        format!(
            "[{{filters: [{{type: ExtensionRef, extensionRef: {{group: duet.dev, kind: TrafficPolicy, name: {name}}}}}], \
             backendRefs: [{{name: orders, port: 80}}]}}]"
        )
    };
    let policies = traffic_policy("fast", "timeouts: {request: 1s}")
        + &traffic_policy(
            "all",
            "targetRefs: [{kind: Service, name: orders}], timeouts: {request: 9s}",
        );
    let rule = |name: &str| {
        let yaml = SERVICES.to_owned() + &policies + &http_route("r", "shop", &filter(name));
        config(&index(&yaml), "shop", "orders").rules.remove(0)
    };
    let timeout = |rule: &proto::Rule| secs(rule.timeouts.as_ref().unwrap().request.as_ref());
    assert_eq!(timeout(&rule("fast")), Some(Duration::from_secs(1)));
    let broken = rule("nobody");
    assert!(broken.backends[0].invalid.contains("nobody"), "{:?}", broken.backends);
    // The services behind a route hear of a change of the policy that it names.
    let mut index =
        index(&(SERVICES.to_owned() + &policies + &http_route("r", "shop", &filter("fast"))));
    let affected =
        index.apply(Change::Remove(crate::index::object("TrafficPolicy", "shop", "fast")));
    assert!(affected.services.contains(&ServiceKey::new("shop", "orders")), "{affected:?}");
}

#[test]
fn gateway_apis_own_policy_sets_the_budget_and_the_session_unless_ours_does() {
    let standard = "\n---\n{apiVersion: gateway.networking.x-k8s.io/v1alpha1, kind: XBackendTrafficPolicy, metadata: {name: x, \
                    namespace: shop}, spec: {targetRefs: [{group: '', kind: Service, name: orders}], retryConstraint: {budget: \
                    {percent: 5, interval: 10s}, minRetryRate: {count: 30, interval: 10s}}, sessionPersistence: {type: Header}}}";
    let config =
        |more: &str| config(&index(&(SERVICES.to_owned() + standard + more)), "shop", "orders");
    let plain = config("");
    let budget = plain.retry_budget.unwrap();
    assert_eq!((budget.percent, budget.min_per_second), (5, 3));
    let session = plain.rules[0].session.as_ref().unwrap();
    assert_eq!((session.name.as_str(), session.header), ("duet-session", true));
    let ours = traffic_policy(
        "p",
        "targetRefs: [{kind: Service, name: orders}], retryBudget: {percent: 50}",
    );
    assert_eq!(config(&ours).retry_budget.unwrap().percent, 50);
}

#[test]
fn grants_count_only_where_they_are_required() {
    let yaml = "{apiVersion: v1, kind: Service, metadata: {name: orders, namespace: shop}, spec: {ports: [{port: 80}]}}\n---\n\
                {apiVersion: v1, kind: Service, metadata: {name: far, namespace: ops}, spec: {ports: [{port: 80}]}}"
        .to_owned()
        + &http_route("r", "shop", "[{backendRefs: [{name: far, namespace: ops, port: 80}]}]");
    let grant = "\n---\n{apiVersion: gateway.networking.k8s.io/v1, kind: ReferenceGrant, metadata: {name: g, namespace: ops}, \
                 spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}], to: [{group: '', kind: \
                 Service, name: far}]}}";
    let refused = |yaml: &str, required: bool| {
        let mut index = index(yaml);
        index.require_grants(required);
        !config(&index, "shop", "orders").rules[0].backends[0].invalid.is_empty()
    };
    assert!(!refused(&yaml, false));
    assert!(refused(&yaml, true));
    assert!(!refused(&(yaml + grant), true));
}

#[test]
fn a_replica_is_told_what_protects_its_ports() {
    let policy = traffic_policy(
        "p",
        "targetRefs: [{kind: Service, name: orders, sectionName: web}], rateLimit: {requests: 5, perCaller: {requests: 2, per: 1m}}, \
         concurrency: {adaptive: true}, connections: {max: 9}",
    );
    let mut index = index(&(SERVICES.to_owned() + &policy));
    register(&mut index, "orders", "o1", &["web=8080", "grpc=7070/grpc"]);
    let who = SpiffeId::new("duet.local", "shop", "orders").unwrap();
    let told =
        |instance: &str| workload(&index, &who, instance, &["orders".to_owned()].into()).inbound;
    let [policy] = told("o1").try_into().unwrap();
    assert_eq!((policy.service.as_str(), &policy.ports[..]), ("shop/orders", &[8080][..]));
    assert_eq!(
        (policy.rate_limit.unwrap().burst, policy.caller_rate_limit.unwrap().requests),
        (5, 2)
    );
    assert_eq!((policy.concurrency.unwrap().adaptive, policy.max_connections), (true, 9));
    assert_eq!(told("somebody else"), []);
}
