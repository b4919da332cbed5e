//! Which rule a request falls under. Pure: `(request head, &RouteTable) -> index of the rule`.
//!
//! The control plane has put the rules in the order of Gateway API's precedence, so the first match wins.
//! [`RouteTable::mismatches`] says for one rule why a request does not fall under it, for people who ask.

mod index;

use std::borrow::Cow;

use duet_api::proto;
use http::{HeaderName, Method, request};
use regex::{Regex, RegexBuilder};

use crate::http::headers::is_grpc;
use index::{Index, Key};

/// Bound on a compiled pattern; the engine is linear in time, this bounds its memory.
const REGEX_BYTES: usize = 256 * 1024;

/// The conditions of a destination's rules, in order.
#[derive(Debug, Default)]
pub struct RouteTable {
    matchers: Vec<Matcher>,
    index: Index,
}

impl RouteTable {
    /// Compiles the conditions.
    ///
    /// # Errors
    /// When a pattern, header name or method is not valid; names the rule.
    pub fn compile(rules: &[proto::Rule]) -> Result<Self, String> {
        let compile = |rule: &proto::Rule| {
            let conditions = rule.r#match.clone().unwrap_or_default();
            Matcher::compile(&conditions).map_err(|error| format!("{}: {error}", rule.name))
        };
        let matchers = rules.iter().map(compile).collect::<Result<Vec<_>, _>>()?;
        let index = Index::new(matchers.iter().map(|matcher| matcher.path.key()));
        Ok(Self { matchers, index })
    }

    /// Index of the first rule that matches.
    #[must_use]
    pub fn find(&self, head: &request::Parts) -> Option<usize> {
        let matches =
            |at: usize| self.matchers.get(at).is_some_and(|matcher| matcher.matches(head));
        self.index.first(head.uri.path(), matches)
    }

    /// Why a rule does not match; nothing where it does, and where there is no such rule.
    #[must_use]
    pub fn mismatches(&self, rule: usize, head: &request::Parts) -> Vec<Mismatch> {
        self.matchers.get(rule).map(|matcher| matcher.mismatches(head)).unwrap_or_default()
    }
}

/// A condition that a request does not meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// On the path.
    Path,
    /// On the method.
    Method,
    /// On this header.
    Header(HeaderName),
    /// On this query parameter.
    Query(String),
    /// The rule is for gRPC calls.
    NotGrpc,
}

#[derive(Debug)]
struct Matcher {
    path: PathMatcher,
    method: Option<Method>,
    headers: Vec<(HeaderName, Value)>,
    query: Vec<(String, Value)>,
    grpc: bool,
}

#[derive(Debug)]
enum PathMatcher {
    Any,
    Exact(String),
    /// Without a trailing slash.
    Prefix(String),
    Regex(Regex),
}

#[derive(Debug)]
enum Value {
    Exact(String),
    Regex(Regex),
}

impl Matcher {
    fn compile(raw: &proto::Match) -> Result<Self, String> {
        use proto::path_match::Kind;
        let path = match raw.path.as_ref().and_then(|path| path.kind.as_ref()) {
            None => PathMatcher::Any,
            Some(Kind::Exact(path)) => PathMatcher::Exact(path.clone()),
            Some(Kind::Prefix(prefix)) => match prefix.trim_end_matches('/') {
                "" => PathMatcher::Any,
                prefix => PathMatcher::Prefix(prefix.to_owned()),
            },
            Some(Kind::Regex(pattern)) => PathMatcher::Regex(regex(pattern)?),
        };
        let method = match raw.method.as_str() {
            "" => None,
            name => Some(name.parse().map_err(|_err| format!("{name:?} is not a method"))?),
        };
        let headers = raw.headers.iter().map(|header| {
            let name = header
                .name
                .parse()
                .map_err(|_err| format!("{:?} is not a header name", header.name));
            Ok::<_, String>((name?, Value::compile(header)?))
        });
        let query = raw.query_params.iter();
        let query =
            query.map(|param| Ok::<_, String>((param.name.clone(), Value::compile(param)?)));
        Ok(Self {
            path,
            method,
            headers: headers.collect::<Result<_, _>>()?,
            query: query.collect::<Result<_, _>>()?,
            grpc: raw.grpc,
        })
    }

    fn matches(&self, head: &request::Parts) -> bool {
        self.path.matches(head.uri.path())
            && self.method.as_ref().is_none_or(|method| *method == head.method)
            && self.headers.iter().all(|(name, value)| header_matches(head, name, value))
            && self.query.iter().all(|(name, value)| query_matches(head, name, value))
            && (!self.grpc || is_grpc(&head.headers))
    }

    /// The same conditions as in [`Self::matches`], which stops at the first and is asked for every request.
    fn mismatches(&self, head: &request::Parts) -> Vec<Mismatch> {
        let path = !self.path.matches(head.uri.path());
        let method = self.method.as_ref().is_some_and(|method| *method != head.method);
        let not_grpc = self.grpc && !is_grpc(&head.headers);
        let headers =
            self.headers.iter().filter(|(name, value)| !header_matches(head, name, value));
        let query = self.query.iter().filter(|(name, value)| !query_matches(head, name, value));
        let mut found = Vec::new();
        found.extend(not_grpc.then_some(Mismatch::NotGrpc));
        found.extend(path.then_some(Mismatch::Path));
        found.extend(method.then_some(Mismatch::Method));
        found.extend(headers.map(|(name, _)| Mismatch::Header(name.clone())));
        found.extend(query.map(|(name, _)| Mismatch::Query(name.clone())));
        found
    }
}

impl PathMatcher {
    fn key(&self) -> Key<'_> {
        match self {
            Self::Exact(path) => Key::Exact(path),
            Self::Prefix(prefix) => Key::Prefix(prefix),
            Self::Any | Self::Regex(_) => Key::Other,
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => path == exact,
            Self::Prefix(prefix) => {
                let rest = path.strip_prefix(prefix.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(pattern) => pattern.is_match(path),
        }
    }
}

impl Value {
    fn compile(raw: &proto::ValueMatch) -> Result<Self, String> {
        use proto::value_match::Kind;
        match &raw.kind {
            Some(Kind::Exact(value)) => Ok(Self::Exact(value.clone())),
            Some(Kind::Regex(pattern)) => Ok(Self::Regex(regex(pattern)?)),
            None => Err(format!("the condition on {:?} has no value", raw.name)),
        }
    }

    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(exact) => value == exact,
            Self::Regex(pattern) => pattern.is_match(value),
        }
    }
}

/// The whole value must match, as Gateway API and RE2's full match have it.
fn regex(pattern: &str) -> Result<Regex, String> {
    RegexBuilder::new(&format!("^(?:{pattern})$"))
        .size_limit(REGEX_BYTES)
        .build()
        .map_err(|error| format!("{pattern:?} is not a usable pattern: {error}"))
}

/// Repeated headers count as one, joined by `,` (RFC 9110 section 5.3).
fn header_matches(head: &request::Parts, name: &HeaderName, value: &Value) -> bool {
    let mut values = head.headers.get_all(name).iter().map(|value| value.to_str());
    let Some(Ok(first)) = values.next() else {
        return false;
    };
    let Some(second) = values.next() else {
        return value.matches(first);
    };
    let rest: Result<Vec<&str>, _> = std::iter::once(second).chain(values).collect();
    rest.is_ok_and(|rest| value.matches(&format!("{first},{}", rest.join(","))))
}

/// The first parameter of that name counts.
fn query_matches(head: &request::Parts, name: &str, value: &Value) -> bool {
    let query = head.uri.query().unwrap_or_default();
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let found = pairs.find(|(key, _)| decode(key) == name);
    found.is_some_and(|(_, text)| value.matches(&decode(text)))
}

fn decode(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let spaced = text.replace('+', " ");
    let decoded = percent_encoding::percent_decode_str(&spaced).decode_utf8_lossy().into_owned();
    Cow::Owned(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proto::{path_match, value_match};

    fn rule(conditions: proto::Match) -> proto::Rule {
        proto::Rule { r#match: Some(conditions), ..Default::default() }
    }

    fn path(kind: path_match::Kind) -> proto::Match {
        let path = Some(proto::PathMatch { kind: Some(kind) });
        proto::Match { path, ..Default::default() }
    }

    fn check(conditions: &proto::Match, request: request::Builder, expected: bool) {
        let table = RouteTable::compile(&[rule(conditions.clone())]).unwrap();
        let head = request.body(()).unwrap().into_parts().0;
        assert_eq!(table.find(&head).is_some(), expected, "{conditions:?} {}", head.uri);
    }

    #[test]
    fn prefixes_match_whole_elements() {
        let prefix = |text: &str| path(path_match::Kind::Prefix(text.to_owned()));
        check(&prefix("/a"), Request::get("/a"), true);
        check(&prefix("/a/"), Request::get("/a/b?c"), true);
        check(&prefix("/a"), Request::get("/ab"), false);
        check(&prefix("/"), Request::get("/x"), true);
    }

    #[test]
    fn patterns_match_the_whole_path() {
        let regex = |text: &str| path(path_match::Kind::Regex(text.to_owned()));
        check(&regex("/a|/b"), Request::get("/b"), true);
        check(&regex("/a|/b"), Request::get("/bc"), false);
        assert!(RouteTable::compile(&[rule(regex("("))]).is_err());
        assert!(RouteTable::compile(&[rule(regex("(a{1000}){1000}"))]).is_err());
    }

    #[test]
    fn headers_and_parameters_match() {
        let value = |name: &str, value: &str| proto::ValueMatch {
            name: name.to_owned(),
            kind: Some(value_match::Kind::Exact(value.to_owned())),
        };
        let header = proto::Match { headers: vec![value("x-a", "1,2")], ..Default::default() };
        check(&header, Request::get("/").header("x-a", "1").header("x-a", "2"), true);
        check(&header, Request::get("/").header("x-a", "1"), false);
        let query = proto::Match { query_params: vec![value("q", "a b")], ..Default::default() };
        check(&query, Request::get("/?x=1&q=a+b&q=c"), true);
        check(&query, Request::get("/?q=a%20b"), true);
        check(&query, Request::get("/?q=c&q=a+b"), false);
    }

    #[test]
    fn every_condition_that_is_not_met_is_named() {
        let value = |name: &str| proto::ValueMatch {
            name: name.to_owned(),
            kind: Some(value_match::Kind::Exact("1".to_owned())),
        };
        let wanted = proto::Match {
            method: "POST".to_owned(),
            headers: vec![value("x-a"), value("x-b")],
            query_params: vec![value("q")],
            grpc: true,
            ..path(path_match::Kind::Exact("/a".to_owned()))
        };
        let table = RouteTable::compile(&[rule(wanted)]).unwrap();
        let mismatches = |request: request::Builder| {
            table.mismatches(0, &request.body(()).unwrap().into_parts().0)
        };
        let (b, q) = (HeaderName::from_static("x-b"), "q".to_owned());
        assert_eq!(
            mismatches(Request::get("/b?q=2").header("x-a", "1")),
            [
                Mismatch::NotGrpc,
                Mismatch::Path,
                Mismatch::Method,
                Mismatch::Header(b),
                Mismatch::Query(q)
            ]
        );
        let good = Request::post("/a?q=1").header("x-a", "1").header("x-b", "1");
        assert_eq!(mismatches(good.header("content-type", "application/grpc")), []);
    }

    proptest::proptest! {
        /// What is named agrees with what matches, and the index finds what looking at every rule in order finds.
        #[test]
        fn the_index_agrees_with_a_scan(
            rules in proptest::collection::vec(("[epra]", "(/[ab]?){0,3}", "(GET|POST)?"), 0..30),
            asked in "(/[ab]?){1,4}",
        ) {
            let rules: Vec<proto::Rule> = rules.into_iter().map(|(kind, text, method)| {
                let kind = match kind.as_str() {
                    "e" => path_match::Kind::Exact(text),
                    "p" => path_match::Kind::Prefix(text),
                    "r" => path_match::Kind::Regex(format!("{text}.*")),
                    _ => path_match::Kind::Prefix("/".to_owned()),
                };
                rule(proto::Match { method, ..path(kind) })
            }).collect();
            let table = RouteTable::compile(&rules).unwrap();
            let head = Request::get(asked).body(()).unwrap().into_parts().0;
            let scanned = table.matchers.iter().position(|matcher| matcher.matches(&head));
            proptest::prop_assert_eq!(table.find(&head), scanned);
            let met = |rule: &usize| table.mismatches(*rule, &head).is_empty();
            proptest::prop_assert_eq!((0..rules.len()).find(met), scanned);
        }
    }

    #[test]
    fn the_first_match_wins() {
        let rules = [
            rule(path(path_match::Kind::Exact("/x".to_owned()))),
            rule(proto::Match { method: "POST".to_owned(), ..Default::default() }),
            rule(proto::Match::default()),
        ];
        let table = RouteTable::compile(&rules).unwrap();
        let find =
            |request: request::Builder| table.find(&request.body(()).unwrap().into_parts().0);
        assert_eq!(find(Request::post("/x")), Some(0));
        assert_eq!(find(Request::post("/y")), Some(1));
        assert_eq!(find(Request::get("/y")), Some(2));
    }
}
