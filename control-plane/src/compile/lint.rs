//! What is wrong inside one resource beyond its schema: patterns that do not compile, filters that do not fit together,
//! numbers that contradict each other. Gateway API puts these rules into its CRDs; here they are errors of the file.

mod events;
mod filters;
mod outbox_source;
mod policy;

use std::collections::BTreeSet;

use duet_api::resource::{
    Field, FilterType, GrpcMatch, GrpcRoute, HttpMatch, HttpRoute, HttpRule, Located, MatchType,
    ParseError, PathMatch, PathMatchType, Resource, ValueMatch,
};
/// Longest pattern of a match.
const MAX_PATTERN_BYTES: usize = 1024;
/// Memory that a compiled pattern may take in the sidecar.
const MAX_COMPILED_BYTES: usize = 1 << 20;
/// Gateway API's bound.
const MAX_WEIGHT: u32 = 1_000_000;
const METHODS: [&str; 9] =
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// Errors of one resource, in order.
#[must_use]
pub fn lint(located: &Located) -> Vec<ParseError> {
    let mut lint = Lint { located, path: vec![Field::Name("spec")], errors: Vec::new() };
    match &located.resource {
        Resource::HttpRoute(route) => lint.http_route(route),
        Resource::GrpcRoute(route) => lint.grpc_route(route),
        Resource::Service(service) => lint.service(service),
        Resource::Subscription(resource) => lint.subscription(resource),
        Resource::OutboxSource(source) => lint.outbox_source(source),
        Resource::AuthorizationPolicy(policy) => lint.authorization_policy(&policy.spec),
        Resource::TrafficPolicy(policy) => lint.traffic_policy(&policy.spec),
        Resource::EndpointSlice(_)
        | Resource::BackendPolicy(_)
        | Resource::ReferenceGrant(_)
        | Resource::EventBus(_)
        | Resource::Topic(_) => {}
    }
    lint.errors
}

struct Lint<'l> {
    located: &'l Located,
    path: Vec<Field>,
    errors: Vec<ParseError>,
}

impl Lint<'_> {
    fn error(&mut self, message: String) {
        self.errors.push(self.located.origin.error(&self.path, message));
    }

    /// Runs with a field appended to the path.
    fn at(&mut self, field: &'static str, check: impl FnOnce(&mut Self)) {
        self.path.push(Field::Name(field));
        check(self);
        self.path.pop();
    }

    /// Runs for each item of a field's list.
    fn each<T>(&mut self, field: &'static str, items: &[T], check: impl Fn(&mut Self, &T)) {
        self.path.push(Field::Name(field));
        for (number, item) in items.iter().enumerate() {
            self.path.push(Field::Index(number));
            check(self, item);
            self.path.pop();
        }
        self.path.pop();
    }

    fn service(&mut self, service: &duet_api::resource::Service) {
        let ports = &service.spec.ports;
        for (number, port) in ports.iter().enumerate() {
            let before = ports.iter().take(number);
            let same = |p: &&duet_api::resource::ServicePort| {
                p.port == port.port && p.protocol == port.protocol
            };
            let twice = before.clone().any(|p| same(&p));
            let named_twice = before.clone().any(|p| p.name == port.name);
            self.path.extend([Field::Name("ports"), Field::Index(number)]);
            if twice {
                self.at("port", |lint| {
                    lint.error(format!("port {} is there twice", port.port));
                });
            } else if named_twice {
                let name = &port.name;
                self.error(format!(
                    "with several ports each needs a name of its own, not {name:?}"
                ));
            }
            self.path.truncate(1);
        }
    }

    /// A policy's `sectionName` means one rule.
    fn rule_names<'n>(&mut self, names: impl Iterator<Item = Option<&'n str>>) {
        let mut seen = BTreeSet::new();
        for (number, name) in names.enumerate() {
            let Some(name) = name.filter(|name| !seen.insert(*name)) else {
                continue;
            };
            self.path.extend([Field::Name("rules"), Field::Index(number), Field::Name("name")]);
            self.error(format!("another rule of the route is named {name:?} too"));
            self.path.truncate(1);
        }
    }

    fn http_route(&mut self, route: &HttpRoute) {
        self.rule_names(route.spec.rules.iter().map(|rule| rule.name.as_deref()));
        self.each("rules", &route.spec.rules, |lint, rule| {
            lint.each("matches", &rule.matches, Lint::http_match);
            lint.filters(&rule.filters);
            lint.rewrites_what_matched(rule);
            let redirect = rule.filters.iter().any(|f| f.kind == FilterType::RequestRedirect);
            if redirect && !rule.backend_refs.is_empty() {
                lint.at("backendRefs", |lint| {
                    lint.error("a rule that redirects sends nothing to backends".to_owned());
                });
            }
            lint.each("backendRefs", &rule.backend_refs, |lint, backend| {
                lint.weight(backend.weight);
                lint.filters(&backend.filters);
                lint.no_route_filters(&backend.filters);
            });
            lint.timeouts(rule);
        });
    }

    fn grpc_route(&mut self, route: &GrpcRoute) {
        const HEADERS_ONLY: &str =
            "a GRPCRoute has no RequestRedirect, URLRewrite and CORS filters";
        self.rule_names(route.spec.rules.iter().map(|rule| rule.name.as_deref()));
        self.each("rules", &route.spec.rules, |lint, rule| {
            lint.each("matches", &rule.matches, Lint::grpc_match);
            lint.filters(&rule.filters);
            lint.headers_only(&rule.filters, HEADERS_ONLY);
            lint.each("backendRefs", &rule.backend_refs, |lint, backend| {
                lint.weight(backend.weight);
                lint.filters(&backend.filters);
                lint.headers_only(&backend.filters, HEADERS_ONLY);
                lint.no_route_filters(&backend.filters);
            });
        });
    }

    fn http_match(&mut self, found: &HttpMatch) {
        if let Some(path) = &found.path {
            self.path.extend([Field::Name("path"), Field::Name("value")]);
            self.path_match(path);
            self.path.truncate(self.path.len() - 2);
        }
        if let Some(method) = &found.method
            && !METHODS.contains(&method.as_str())
        {
            self.at("method", |lint| {
                lint.error(format!("{method:?} is not one of {}", METHODS.join(", ")));
            });
        }
        self.each("headers", &found.headers, Lint::value_match);
        self.each("queryParams", &found.query_params, Lint::value_match);
    }

    fn path_match(&mut self, path: &PathMatch) {
        if path.kind == PathMatchType::RegularExpression {
            return self.pattern(&path.value);
        }
        let value = &path.value;
        let bad_parts = ["//", "/./", "/../", "%2f", "%2F", "#", "?"];
        if !value.starts_with('/') {
            self.error(format!("{value:?} does not start with '/'"));
        } else if let Some(part) = bad_parts.iter().find(|part| value.contains(**part)) {
            self.error(format!("{value:?} must not contain {part:?}"));
        } else if value.ends_with("/.") || value.ends_with("/..") {
            self.error(format!("{value:?} must not end in a relative path"));
        }
    }

    fn grpc_match(&mut self, found: &GrpcMatch) {
        if let Some(method) = &found.method {
            self.path.push(Field::Name("method"));
            if method.service.is_none() && method.method.is_none() {
                self.error("a method match needs a service, a method or both".to_owned());
            }
            let parts = [("service", &method.service), ("method", &method.method)];
            for (field, value) in parts {
                let Some(value) = value else { continue };
                self.at(field, |lint| match method.kind {
                    MatchType::RegularExpression => lint.pattern(value),
                    MatchType::Exact if value.is_empty() || value.contains('/') => {
                        lint.error(format!("{value:?} is not a gRPC {field} name"));
                    }
                    MatchType::Exact => {}
                });
            }
            self.path.pop();
        }
        self.each("headers", &found.headers, Lint::value_match);
    }

    fn value_match(&mut self, found: &ValueMatch) {
        if found.name.is_empty() {
            self.at("name", |lint| lint.error("a name is needed".to_owned()));
        }
        if found.kind == MatchType::RegularExpression {
            self.at("value", |lint| lint.pattern(&found.value));
        }
    }

    fn pattern(&mut self, pattern: &str) {
        if pattern.len() > MAX_PATTERN_BYTES {
            let length = pattern.len();
            return self.error(format!("the pattern has {length} bytes, over {MAX_PATTERN_BYTES}"));
        }
        let built = regex::RegexBuilder::new(pattern).size_limit(MAX_COMPILED_BYTES).build();
        if let Err(error) = built {
            // The regex crate draws the place over several lines; the last says what is wrong.
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            self.error(format!("{pattern:?} is not a regular expression: {last}"));
        }
    }

    fn weight(&mut self, weight: Option<u32>) {
        if let Some(weight) = weight.filter(|weight| *weight > MAX_WEIGHT) {
            self.at("weight", |lint| {
                lint.error(format!("{weight} is more than {MAX_WEIGHT}"));
            });
        }
    }

    fn timeouts(&mut self, rule: &HttpRule) {
        let Some(timeouts) = &rule.timeouts else {
            return;
        };
        if let (Some(request), Some(backend)) = (timeouts.request, timeouts.backend_request)
            && !request.is_zero()
            && backend > request
        {
            self.path.extend([Field::Name("timeouts"), Field::Name("backendRequest")]);
            self.error("one try cannot take longer than timeouts.request".to_owned());
            self.path.truncate(self.path.len() - 2);
        }
    }
}

#[cfg(test)]
mod event_tests;
#[cfg(test)]
mod tests;
