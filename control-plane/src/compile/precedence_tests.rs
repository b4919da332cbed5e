//! The order of rules, against a slow and obvious reading of the specification: of all matches that a request satisfies,
//! the best by each criterion in turn.

use duet_api::proto;
use duet_api::proto::path_match::Kind as PathKind;
use proptest::prelude::*;

use super::destination;
use super::testing::index;

/// One match of one rule of one route.
#[derive(Clone, Debug)]
struct Match {
    exact: bool,
    path: String,
    method: Option<&'static str>,
    headers: usize,
    params: usize,
}

/// Number of the route, of the rule in it, of the match in that.
type Place = (usize, usize, usize);
/// More is better.
type Criterion<'c> = &'c dyn Fn(&Match) -> usize;

/// A request: path, method, how many of the headers `h0`, `h1`, … and parameters `p0`, `p1`, … it has.
#[derive(Clone, Debug)]
struct Asked {
    path: String,
    method: &'static str,
    headers: usize,
    params: usize,
}

impl Match {
    fn yaml(&self) -> String {
        let kind = if self.exact { "Exact" } else { "PathPrefix" };
        let named = |prefix: &str, count: usize| {
            let names = (0..count).map(|n| format!("{{name: {prefix}{n}, value: x}}"));
            names.collect::<Vec<_>>().join(", ")
        };
        let method = self.method.map(|method| format!("method: {method}, ")).unwrap_or_default();
        format!(
            "{{path: {{type: {kind}, value: '{}'}}, {method}headers: [{}], queryParams: [{}]}}",
            self.path,
            named("h", self.headers),
            named("p", self.params)
        )
    }

    fn holds(&self, asked: &Asked) -> bool {
        let elements = |path: &str| -> Vec<String> {
            path.split('/').filter(|element| !element.is_empty()).map(str::to_owned).collect()
        };
        let path = if self.exact {
            self.path == asked.path
        } else {
            elements(&asked.path).starts_with(&elements(&self.path))
        };
        path && self.method.is_none_or(|method| method == asked.method)
            && self.headers <= asked.headers
            && self.params <= asked.params
    }
}

/// As Gateway API's `HTTPRouteRule.matches` has it, criterion by criterion; then the route's name, the rule, the match.
fn best(routes: &[Vec<Vec<Match>>], asked: &Asked) -> Option<Place> {
    let mut left: Vec<(Place, &Match)> = Vec::new();
    for (route, rules) in routes.iter().enumerate() {
        for (rule, matches) in rules.iter().enumerate() {
            for (position, one) in matches.iter().enumerate() {
                if one.holds(asked) {
                    left.push(((route, rule, position), one));
                }
            }
        }
    }
    let characters = |one: &Match| match one.path.trim_end_matches('/').len() {
        0 => 1,
        length if one.exact => length.max(one.path.len()),
        length => length,
    };
    let criteria: [Criterion<'_>; 5] = [
        &|one| usize::from(one.exact),
        &characters,
        &|one| usize::from(one.method.is_some()),
        &|one| one.headers,
        &|one| one.params,
    ];
    for criterion in criteria {
        let most = left.iter().map(|(_, one)| criterion(one)).max()?;
        left.retain(|(_, one)| criterion(one) == most);
    }
    left.first().map(|(place, _)| *place)
}

/// The first rule of the compiled order that holds, as a sidecar takes it.
fn first(rules: &[proto::Rule], asked: &Asked) -> Option<String> {
    let holds = |rule: &&proto::Rule| {
        let conditions = rule.r#match.clone().unwrap_or_default();
        let path = match conditions.path.and_then(|path| path.kind) {
            Some(PathKind::Exact(path)) => asked.path == path,
            Some(PathKind::Prefix(prefix)) => {
                let rest = asked.path.strip_prefix(prefix.trim_end_matches('/'));
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Some(PathKind::Regex(_)) | None => false,
        };
        path && (conditions.method.is_empty() || conditions.method == asked.method)
            && conditions.headers.len() <= asked.headers
            && conditions.query_params.len() <= asked.params
    };
    rules.iter().find(holds).map(|rule| rule.name.clone())
}

fn a_match() -> impl Strategy<Value = Match> {
    let method = prop::sample::select(vec![None, None, Some("GET"), Some("POST")]);
    ("(/[ab]){0,3}/?", any::<bool>(), method, 0_usize..3, 0_usize..3).prop_map(
        |(path, exact, method, headers, params)| {
            let path = if path.is_empty() { "/".to_owned() } else { path };
            Match { exact, path, method, headers, params }
        },
    )
}

fn a_request() -> impl Strategy<Value = Asked> {
    let method = prop::sample::select(vec!["GET", "POST"]);
    ("(/[ab]){1,4}/?", method, 0_usize..3, 0_usize..3)
        .prop_map(|(path, method, headers, params)| Asked { path, method, headers, params })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn rules_come_in_the_order_of_the_specification(
        routes in prop::collection::vec(
            prop::collection::vec(prop::collection::vec(a_match(), 1..4), 1..4), 1..4),
        requests in prop::collection::vec(a_request(), 20),
    ) {
        let mut yaml = "{apiVersion: v1, kind: Service, metadata: {name: s}, spec: {ports: [{port: 80}]}}\n".to_owned();
        for (number, rules) in routes.iter().enumerate() {
            let rules = rules.iter().map(|matches| {
                let matches: Vec<String> = matches.iter().map(Match::yaml).collect();
                format!("{{matches: [{}], backendRefs: [{{name: s, port: 80}}]}}", matches.join(", "))
            });
            let rules: Vec<String> = rules.collect();
            yaml.push_str(&format!(
                "---\n{{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {{name: r{number}}}, spec: {{\
                 parentRefs: [{{group: '', kind: Service, name: s}}], rules: [{}]}}}}\n",
                rules.join(", ")
            ));
        }
        let compiled = destination(&index(&yaml), "default", "s").outcome.unwrap();
        for asked in requests {
            let expected = best(&routes, &asked).map(|(route, rule, position)| {
                format!("HTTPRoute default/r{route} rule {rule} match {position}")
            });
            prop_assert_eq!(first(&compiled.rules, &asked), expected, "{:?}", asked);
        }
    }
}
