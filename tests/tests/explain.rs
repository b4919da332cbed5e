//! `duet explain`: what it says is what sidecars do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::path::Path;
use std::process::{Command, Output};

use duet_tests::app::App;
use duet_tests::http::{get, request};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::process::program;
use duet_tests::{SOON, eventually};
use reqwest::{Client, Method};
use serde_json::Value;

fn duet(arguments: &[&str]) -> Output {
    Command::new(program("duet")).args(arguments).output().unwrap()
}

fn explain(config: &Path, arguments: &[&str]) -> Output {
    let mut all = vec!["explain", "--config", config.to_str().unwrap()];
    all.extend(arguments);
    duet(&all)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const RESOURCES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: v1}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: v2}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
  - matches: [{path: {value: /api}, headers: [{name: x-canary, value: "1"}]}]
    backendRefs: [{name: v2, port: 80}]
  - matches:
    - {path: {value: /api}, method: GET}
    - {path: {type: Exact, value: /health}}
    backendRefs: [{name: v1, port: 80}]
  - matches: [{path: {type: RegularExpression, value: "/items/[0-9]+"}, queryParams: [{name: v, value: "2"}]}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: x-by, value: route}]}
    backendRefs: [{name: v2, port: 80}]
  - matches: [{path: {value: /old}}]
    filters:
    - type: URLRewrite
      urlRewrite: {hostname: new.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}
    backendRefs: [{name: v1, port: 80}]
  - matches: [{path: {value: /away}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: elsewhere.example, statusCode: 301}}]
  - matches: [{path: {value: /broken}}]
    backendRefs: [{name: gone, port: 80}]
  - matches: [{path: {value: /shared}}]
    filters: [{type: CORS, cors: {allowOrigins: ["https://a.example"]}}]
    backendRefs: [{name: v1, port: 80}]
  - matches: [{path: {value: /missing}}]
    filters: [{type: ExtensionRef, extensionRef: {group: duet.dev, kind: TrafficPolicy, name: none}}]
    backendRefs: [{name: v1, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: stock}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
  - matches: [{method: {service: stock.Stock}}]
    backendRefs: [{name: v2, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: consumer, namespace: ops}
spec:
  parentRefs: [{group: "", kind: Service, name: web, namespace: default}]
  rules: [{backendRefs: [{name: v2, namespace: default, port: 80}]}]
"#;

/// Method, path, headers.
type Asked = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const REQUESTS: [Asked; 21] = [
    ("GET", "/api/x?y=z", &[]),
    ("POST", "/api/x", &[]),
    ("POST", "/api/x", &[("x-canary", "1")]),
    ("GET", "/api", &[("X-Canary", "2")]),
    ("GET", "/apix", &[]),
    ("DELETE", "/health", &[]),
    ("GET", "/health/", &[]),
    ("GET", "/items/17?v=2", &[]),
    ("GET", "/items/17?v=1&v=2", &[]),
    ("GET", "/items/x?v=2", &[]),
    ("PUT", "/old/a/b?c", &[]),
    ("GET", "/old", &[]),
    ("GET", "/away/x?y", &[]),
    ("GET", "/broken", &[]),
    (
        "OPTIONS",
        "/shared",
        &[("origin", "https://a.example"), ("access-control-request-method", "GET")],
    ),
    ("OPTIONS", "/shared", &[("origin", "https://a.example")]),
    ("GET", "/missing", &[]),
    ("GET", "/", &[]),
    ("POST", "/stock.Stock/Get", &[("content-type", "application/grpc")]),
    ("POST", "/stock.Stock/Get", &[("content-type", "application/grpc-web")]),
    ("POST", "/stock.Stock/Get", &[]),
];

/// What a sidecar does: the status, and where the request went or what the answer says.
async fn sent(client: &Client, sidecar: &Sidecar, asked: &Asked) -> (u16, String) {
    let method: Method = asked.0.parse().unwrap();
    let mut request = request(client, method, sidecar.ports.outbound, "web.default", asked.1);
    for (name, value) in asked.2 {
        request = request.header(*name, *value);
    }
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    if let Some(location) = headers.get("location") {
        return (status, location.to_str().unwrap().to_owned());
    }
    if let Some(why) = headers.get("proxy-status") {
        let error = why.to_str().unwrap().split("error=").nth(1).unwrap();
        return (status, error.split(';').next().unwrap().to_owned());
    }
    if status == 204 {
        return (status, String::new());
    }
    let answer: Value = response.json().await.unwrap();
    let pairs = answer["headers"].as_array().unwrap();
    let host = pairs.iter().find(|pair| pair[0] == "host").unwrap()[1].as_str().unwrap();
    let (app, path) = (answer["app"].as_str().unwrap(), answer["path"].as_str().unwrap());
    (status, format!("default/{app}:80 as http://{host}{path}"))
}

/// The same from `duet explain`.
fn explained(config: &Path, from: &str, (method, path, headers): &Asked) -> (u16, String) {
    let headers: Vec<String> =
        headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let url = format!("http://web.default{path}");
    let mut arguments = vec!["--from", from, "--json", "-X", method];
    for header in &headers {
        arguments.extend(["-H", header]);
    }
    arguments.push(&url);
    let output = explain(config, &arguments);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_err| panic!("{}", text(&output.stderr)));
    let outcome = &report["outcome"];
    let of = |name: &str| outcome[name].as_str().unwrap().to_owned();
    let status = outcome["status"].as_u64().map_or(200, |status| u16::try_from(status).unwrap());
    assert_eq!(output.status.success(), outcome["kind"] != "failed");
    let what = match outcome["kind"].as_str().unwrap() {
        "failed" => of("error"),
        "redirected" => of("location"),
        "preflight" => String::new(),
        _ => format!("{} as {}", report["backends"][0]["backend"].as_str().unwrap(), of("url")),
    };
    (status, what)
}

#[tokio::test]
async fn what_is_explained_is_what_happens() {
    let control_plane = ControlPlane::start(&[("web.yaml", RESOURCES)]).await;
    let (v1, v2) = (App::echo("v1").await, App::echo("v2").await);
    let _v1 = Sidecar::ready(&control_plane, Options::service("v1", v1.port())).await;
    let _v2 = Sidecar::ready(&control_plane, Options::service("v2", v2.port())).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let ops = Sidecar::ready(&control_plane, Options::client("ops").namespace("ops")).await;
    for service in ["v1", "v2"] {
        eventually("both versions answer", SOON, || async {
            let host = format!("{service}.default");
            (get(caller.ports.outbound, &host, "/").await.status() == 200).then_some(())
        })
        .await;
    }
    let client = Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
    let client = client.build().unwrap();
    let config = control_plane.folder.path().join("config");
    let mut outcomes = std::collections::BTreeSet::new();
    for asked in &REQUESTS {
        for (sidecar, from) in [(&caller, "caller"), (&ops, "ops/ops")] {
            let happened = sent(&client, sidecar, asked).await;
            assert_eq!(explained(&config, from, asked), happened, "{asked:?} from {from}");
            outcomes.insert(happened.0);
        }
    }
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [200, 204, 301, 404, 500]);
}

#[test]
fn people_read_why_a_rule_does_not_match_and_which_routes_do_not_count() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("web.yaml"), RESOURCES).unwrap();
    let said = |arguments: &[&str]| text(&explain(folder.path(), arguments).stdout);
    let canary = said(&["--from", "caller", "-X", "POST", "http://web/api/x"]);
    for expected in [
        "POST http://web/api/x from default/caller\n",
        "Destination: default/web:80\nOutcome: answered with 404, destination_not_found: no rule",
        "(GRPCRoute default/stock rule 0 match 0): not a gRPC call; the path is not /stock.Stock or below it\n",
        "(HTTPRoute default/web rule 1 match 0): the method is not GET\n",
        "(HTTPRoute default/web rule 0 match 0): the header x-canary is not \"1\"\n",
        "rule 2 match 0): the path does not match /items/[0-9]+; the query parameter v is not \"2\"\n",
        "(HTTPRoute ops/consumer): it counts for callers of its own namespace \"ops\" only\n",
    ] {
        assert!(canary.contains(expected), "{expected}\n\n{canary}");
    }
    let broken = said(&["--from", "caller", "http://web/broken"]);
    assert!(
        broken.contains("100%  answered with 500: HTTPRoute default/web: no service"),
        "{broken}"
    );
    let grpc = said(&[
        "--from",
        "caller",
        "-H",
        "content-type: application/grpc",
        "-X",
        "POST",
        "http://web/stock.Stock/Get",
    ]);
    let request = grpc.lines().find(|line| line.contains("timeouts.request ")).unwrap();
    let columns: Vec<&str> = request.split_whitespace().collect();
    assert_eq!(columns, ["timeouts.request", "none", "default"], "gRPC has deadlines of its own");
    let policy = "apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: v1}
spec:
  targetRefs: [{kind: Service, name: v1}]
  rateLimit: {requests: 5, perCaller: {requests: 2}}
  timeouts: {idle: 0s}
  hedge: {after: p90}
  fault: {abort: {percent: 0.5}, headers: [{name: x-test, value: fault}]}
";
    std::fs::write(folder.path().join("policy.yaml"), policy).unwrap();
    let limited =
        said(&["--from", "caller", "-X", "POST", "-H", "duet-timeout-ms: 250", "http://v1/"]);
    for expected in [
        "per 1s, perCaller (per 1s, requests 2), requests 5",
        "0s (no bound)",
        "after p90, maxPercent 5",
        "abort (percent 0.5, status 503), headers name x-test, value fault",
        "the caller leaves 250ms: no bound on the request is longer\n",
        "POST without Idempotency-Key is not hedged\n",
        "the fault is not for this request: it lacks the headers\n",
        "policy.yaml:6 (TrafficPolicy default/v1)\n",
    ] {
        assert!(limited.contains(expected), "{expected}\n\n{limited}");
    }
    let old = said(&["--from", "caller", "http://web/old/x"]);
    assert!(old.contains("Outcome: sent to the backends, as http://new.example/new/x\n"), "{old}");
    let nobody = said(&["--from", "ops/caller", "http://web/"]);
    assert!(
        nobody.contains("no service \"web\" in namespace \"ops\"; there is one in default"),
        "{nobody}"
    );
}

#[test]
fn a_duet_yaml_makes_its_apps_known_to_explain_and_check() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, yaml: &str| std::fs::write(folder.path().join(name), yaml).unwrap();
    write(
        "duet.yaml",
        "namespace: shop\nresources: [mesh.yaml]\napps:\n  web: {command: x}\n  fixed: {command: x, port: 8123}\n",
    );
    write(
        "mesh.yaml",
        "apiVersion: duet.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  \
         targetRefs: [{kind: Service, name: web}]\n  timeouts: {request: 3s}\n",
    );
    for path in [folder.path().to_owned(), folder.path().join("duet.yaml")] {
        let output = explain(&path, &["--from", "fixed", "http://web/"]);
        let said = text(&output.stdout);
        assert!(output.status.success(), "{said}{}", text(&output.stderr));
        assert!(
            said.contains("from shop/fixed")
                && said.contains("mesh.yaml:6 (TrafficPolicy shop/web)"),
            "{said}"
        );
        let fixed = explain(&path, &["--from", "web", "http://fixed:8123/"]);
        assert!(fixed.status.success());
        let check = duet(&["check", path.to_str().unwrap()]);
        assert!(check.status.success(), "{}", text(&check.stdout));
    }
    let alone = duet(&["check", folder.path().join("mesh.yaml").to_str().unwrap()]);
    assert!(text(&alone.stdout).contains("no service \"web\""), "{}", text(&alone.stdout));
    let unknown = explain(folder.path(), &["--from", "web", "http://fixed:8124/"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stdout).contains("has no port 8124"), "{}", text(&unknown.stdout));
}

#[test]
fn check_warns_of_rules_that_are_never_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("web.yaml");
    let shadowed = RESOURCES.replace(
        "  - matches: [{path: {value: /away}}]",
        "  - matches: [{path: {value: /api}, method: GET}]\n    backendRefs: [{name: v2, port: 80}]\n  - matches: [{path: {value: /away}}]",
    );
    let shadowed = shadowed.replace("{name: gone, port: 80}", "{name: v1, port: 80}");
    let policy = "---\n{apiVersion: duet.dev/v1alpha1, kind: TrafficPolicy, metadata: {name: none}, spec: {}}\n";
    let shadowed = shadowed + policy;
    std::fs::write(&file, shadowed).unwrap();
    let check = duet(&["check", file.to_str().unwrap()]);
    let said = text(&check.stdout);
    assert!(check.status.success() && said.contains("0 errors, 1 warnings"), "{said}");
    assert!(
        said.contains(
            "spec.rules[4]: this rule is never chosen: HTTPRoute default/web rule 1 match 0"
        ),
        "{said}"
    );
}
