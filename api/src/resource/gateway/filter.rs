//! Filters of routes.

use serde::Deserialize;

use super::BackendRef;

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
    /// For `RequestMirror`.
    pub request_mirror: Option<MirrorFilter>,
    /// For `CORS`.
    pub cors: Option<CorsFilter>,
    /// For `ExtensionRef`.
    pub extension_ref: Option<ExtensionRef>,
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
    /// Sends a copy elsewhere, whose answer nobody waits for.
    RequestMirror,
    /// Answers cross-origin questions of browsers.
    #[serde(rename = "CORS")]
    Cors,
    /// Applies a policy of ours.
    ExtensionRef,
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

/// Sends a copy of requests elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MirrorFilter {
    /// Where; weight and filters mean nothing here.
    pub backend_ref: BackendRef,
    /// Share of requests. Default: all of them.
    pub percent: Option<u32>,
    /// The same, finer; not together with `percent`.
    pub fraction: Option<Fraction>,
}

/// A share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fraction {
    /// This many of
    pub numerator: u32,
    /// so many. Default: 100.
    #[serde(default = "hundred")]
    pub denominator: u32,
}

fn hundred() -> u32 {
    100
}

/// Which cross-origin requests browsers may make (Fetch standard, CORS protocol; GEP-1767).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CorsFilter {
    /// `*`, or `scheme://host[:port]` where the host may start with `*.` or be `*`.
    #[serde(default)]
    pub allow_origins: Vec<String>,
    /// Whether requests may carry credentials. Default: no.
    pub allow_credentials: Option<bool>,
    /// Methods, or `*`.
    #[serde(default)]
    pub allow_methods: Vec<String>,
    /// Headers that requests may have, or `*`.
    #[serde(default)]
    pub allow_headers: Vec<String>,
    /// Headers that scripts may read from responses, or `*`.
    #[serde(default)]
    pub expose_headers: Vec<String>,
    /// Seconds that a browser may remember an answer. Default: 5.
    pub max_age: Option<u32>,
}

/// A reference to a policy of the route's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtensionRef {
    /// `duet.dev`.
    pub group: String,
    /// `TrafficPolicy`.
    pub kind: String,
    /// Its name.
    pub name: String,
}
