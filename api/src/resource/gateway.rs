//! Gateway API v1 `HTTPRoute` and `GRPCRoute`, as far as a mesh reads them (parents are services).

use std::time::Duration;

use serde::Deserialize;

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

/// One filter: `type` says which field is given.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpFilter {
    /// Which.
    #[serde(rename = "type")]
    pub kind: FilterType,
    /// For `RequestHeaderModifier`.
    pub request_header_modifier: Option<HeaderModifier>,
    /// For `ResponseHeaderModifier`.
    pub response_header_modifier: Option<HeaderModifier>,
    /// For `RequestRedirect`.
    pub request_redirect: Option<RedirectFilter>,
    /// For `URLRewrite`.
    #[serde(rename = "urlRewrite")]
    pub url_rewrite: Option<UrlRewriteFilter>,
}

/// Kinds of [`HttpFilter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum FilterType {
    /// Changes request headers.
    RequestHeaderModifier,
    /// Changes response headers.
    ResponseHeaderModifier,
    /// Answers with a redirect.
    RequestRedirect,
    /// Changes host or path.
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
}

/// Changes headers: set, then add, then remove.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeaderModifier {
    /// Replace.
    #[serde(default)]
    pub set: Vec<HttpHeader>,
    /// Append.
    #[serde(default)]
    pub add: Vec<HttpHeader>,
    /// Names.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpHeader {
    /// Name, case-insensitive.
    pub name: String,
    /// Value.
    pub value: String,
}

/// Answers with a redirect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RedirectFilter {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// New host.
    pub hostname: Option<String>,
    /// New path.
    pub path: Option<PathModifier>,
    /// New port.
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308. Default: 302.
    pub status_code: Option<u16>,
}

/// Changes what the backend sees.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UrlRewriteFilter {
    /// New host.
    pub hostname: Option<String>,
    /// New path.
    pub path: Option<PathModifier>,
}

/// Changes a path; `type` says which field is given.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PathModifier {
    /// Which.
    #[serde(rename = "type")]
    pub kind: PathModifierType,
    /// The whole new path.
    pub replace_full_path: Option<String>,
    /// In place of the matched prefix.
    pub replace_prefix_match: Option<String>,
}

/// Kinds of [`PathModifier`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum PathModifierType {
    /// The whole path.
    ReplaceFullPath,
    /// The matched prefix.
    ReplacePrefixMatch,
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
