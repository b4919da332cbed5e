//! Gateway API v1 `HTTPRoute` and `GRPCRoute`, as far as a mesh reads them (parents are services).

mod backend_policy;
mod filter;

use std::time::Duration;

use serde::Deserialize;

pub use backend_policy::{
    BackendPolicySpec, BackendTarget, Budget, RetryConstraint, RetryRate, XBackendTrafficPolicy,
};
pub use filter::{
    CorsFilter, ExtensionRef, FilterType, Fraction, HeaderModifier, HttpFilter, HttpHeader,
    MirrorFilter, PathModifier, PathModifierType, RedirectFilter, UrlRewriteFilter,
};

use super::core::IgnoredEq;
use super::meta::Metadata;
use crate::duration;

/// Spec shared by both kinds of route.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[serde(bound = "R: Deserialize<'de>")]
pub struct RouteSpec<R> {
    /// What the route attaches to.
    #[serde(default)]
    pub parent_refs: Vec<ParentRef>,
    /// Not used in a mesh (GEP-1294): the dialled service selects.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// The rules, in order.
    #[serde(default = "Vec::new")]
    pub rules: Vec<R>,
}

macro_rules! route {
    ($(#[$doc:meta])* $name:ident, $rule:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        pub struct $name {
            #[serde(rename = "apiVersion")]
            pub(super) _api_version: IgnoredEq,
            #[serde(rename = "kind")]
            pub(super) _kind: IgnoredEq,
            /// Name and namespace.
            pub metadata: Metadata,
            /// Parents and rules.
            pub spec: RouteSpec<$rule>,
            #[serde(default, rename = "status")]
            pub(super) _status: IgnoredEq,
        }
    };
}

route!(
    /// Routes HTTP requests.
    HttpRoute,
    HttpRule
);
route!(
    /// Routes gRPC calls.
    GrpcRoute,
    GrpcRule
);

/// What a route attaches to; in a mesh, a `Service`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ParentRef {
    /// Empty for `Service`. Default: `gateway.networking.k8s.io`.
    pub group: Option<String>,
    /// `Service`. Default: `Gateway`, which means nothing here.
    pub kind: Option<String>,
    /// Default: the route's.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Name of the service's port.
    pub section_name: Option<String>,
    /// Number of the service's port. Default: every port.
    pub port: Option<u16>,
}

/// One rule of an [`HttpRoute`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpRule {
    /// Optional name, unique in the route.
    pub name: Option<String>,
    /// Any of these must match; none: everything.
    #[serde(default)]
    pub matches: Vec<HttpMatch>,
    /// Applied in order.
    #[serde(default)]
    pub filters: Vec<HttpFilter>,
    /// Where requests go, by weight.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
    /// Bounds on waiting.
    pub timeouts: Option<RouteTimeouts>,
    /// When to try again (GEP-1731).
    pub retry: Option<RouteRetry>,
    /// Keeps a client at the endpoint that it got first (GEP-1619).
    pub session_persistence: Option<SessionPersistence>,
}

/// One rule of a [`GrpcRoute`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcRule {
    /// Optional name, unique in the route.
    pub name: Option<String>,
    /// Any of these must match; none: every gRPC call.
    #[serde(default)]
    pub matches: Vec<GrpcMatch>,
    /// Applied in order.
    #[serde(default)]
    pub filters: Vec<HttpFilter>,
    /// Where calls go, by weight.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
    /// Keeps a client at the endpoint that it got first (GEP-1619).
    pub session_persistence: Option<SessionPersistence>,
}

/// Conditions on a request; all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpMatch {
    /// Default: prefix `/`.
    pub path: Option<PathMatch>,
    /// All must match.
    #[serde(default)]
    pub headers: Vec<ValueMatch>,
    /// All must match.
    #[serde(default)]
    pub query_params: Vec<ValueMatch>,
    /// Upper-case method.
    pub method: Option<String>,
}

/// Conditions on a gRPC call; all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcMatch {
    /// Service and method.
    pub method: Option<GrpcMethodMatch>,
    /// All must match.
    #[serde(default)]
    pub headers: Vec<ValueMatch>,
}

/// Condition on a gRPC service and method; at least one is given.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcMethodMatch {
    /// How both compare.
    #[serde(default, rename = "type")]
    pub kind: MatchType,
    /// Fully qualified service.
    pub service: Option<String>,
    /// Method.
    pub method: Option<String>,
}

/// Condition on the path.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathMatch {
    /// Default: prefix.
    #[serde(default, rename = "type")]
    pub kind: PathMatchType,
    /// Default: `/`.
    #[serde(default = "slash")]
    pub value: String,
}

fn slash() -> String {
    "/".to_owned()
}

/// How a path compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum PathMatchType {
    /// The whole path.
    Exact,
    /// By path element.
    #[default]
    PathPrefix,
    /// The whole path by pattern.
    RegularExpression,
}

/// How a header, parameter or method name compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum MatchType {
    /// The whole value.
    #[default]
    Exact,
    /// The whole value by pattern.
    RegularExpression,
}

/// Condition on a header or query parameter.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueMatch {
    /// How it compares.
    #[serde(default, rename = "type")]
    pub kind: MatchType,
    /// Headers: case-insensitive.
    pub name: String,
    /// Value or pattern.
    pub value: String,
}

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendRef {
    /// Empty for `Service`.
    pub group: Option<String>,
    /// `Service`.
    pub kind: Option<String>,
    /// Name.
    pub name: String,
    /// Default: the route's.
    pub namespace: Option<String>,
    /// Port of the service.
    pub port: Option<u16>,
    /// Share of requests among the rule's backends; 0: none. Default: 1.
    pub weight: Option<u32>,
    /// For requests to this backend only.
    #[serde(default)]
    pub filters: Vec<HttpFilter>,
}

/// Bounds on waiting (GEP-1742). `0s` disables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteTimeouts {
    /// The whole exchange.
    #[serde(default, deserialize_with = "duration::option")]
    pub request: Option<Duration>,
    /// One try.
    #[serde(default, deserialize_with = "duration::option")]
    pub backend_request: Option<Duration>,
}

/// When to try again (GEP-1731).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteRetry {
    /// HTTP statuses.
    #[serde(default, deserialize_with = "super::policy::codes")]
    pub codes: Vec<u16>,
    /// Tries after the first.
    pub attempts: Option<u32>,
    /// Least wait between tries.
    #[serde(default, deserialize_with = "duration::option")]
    pub backoff: Option<Duration>,
}

/// Keeps a client at the endpoint that it got first (GEP-1619).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SessionPersistence {
    /// Name of the cookie or header. Default: `duet-session`.
    pub session_name: Option<String>,
    /// A session ends this long after it began.
    #[serde(default, deserialize_with = "duration::option")]
    pub absolute_timeout: Option<Duration>,
    /// What carries it.
    #[serde(default, rename = "type")]
    pub kind: SessionType,
    /// For cookies.
    #[serde(default)]
    pub cookie_config: CookieConfig,
}

/// What carries a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SessionType {
    /// A cookie.
    #[default]
    Cookie,
    /// A header, which the client repeats.
    Header,
}

/// How a session's cookie is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CookieConfig {
    /// How long.
    #[serde(default)]
    pub lifetime_type: CookieLifetime,
}

/// How long a client keeps a session's cookie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum CookieLifetime {
    /// Until it is closed.
    #[default]
    Session,
    /// For the absolute timeout.
    Permanent,
}
