//! What a route changes in a request or response: headers, host, path, redirects, CORS; and where copies go. Pure.

mod cors;

use duet_api::proto;
use duet_api::proto::filter::Kind;
use http::header::{self, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, Response, StatusCode, Uri, request};

use crate::http::body::Body;

pub use cors::Cors;

/// A rule's filters, checked.
#[derive(Debug, Default)]
pub struct Filters {
    request: Vec<RequestFilter>,
    response: Vec<HeaderChange>,
    redirect: Option<Redirect>,
    cors: Option<Cors>,
    mirrors: Vec<Mirror>,
}

/// Where copies of requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Name of the backend.
    pub backend: String,
    /// This many of
    pub numerator: u32,
    /// so many requests.
    pub denominator: u32,
}

#[derive(Debug)]
enum RequestFilter {
    Headers(HeaderChange),
    Rewrite { host: Option<Authority>, path: Option<PathChange> },
}

#[derive(Debug, Default)]
struct HeaderChange {
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
    remove: Vec<HeaderName>,
}

#[derive(Debug)]
enum PathChange {
    Full(String),
    /// What the rule's prefix match matched, without a trailing slash, and what comes instead.
    Prefix {
        matched: String,
        with: String,
    },
}

#[derive(Debug)]
struct Redirect {
    scheme: String,
    host: String,
    port: Option<u16>,
    path: Option<PathChange>,
    status: StatusCode,
}

impl Filters {
    /// Checks and compiles. `prefix` is the rule's path prefix, for prefix replacement.
    ///
    /// # Errors
    /// When a name, value or host is not valid, or a prefix replacement has no prefix to replace.
    pub fn compile(raw: &[proto::Filter], prefix: Option<&str>) -> Result<Self, String> {
        let mut filters = Self::default();
        for filter in raw {
            match &filter.kind {
                Some(Kind::RequestHeaders(change)) => {
                    filters.request.push(RequestFilter::Headers(HeaderChange::compile(change)?));
                }
                Some(Kind::ResponseHeaders(change)) => {
                    filters.response.push(HeaderChange::compile(change)?);
                }
                Some(Kind::UrlRewrite(rewrite)) => {
                    let host = match rewrite.hostname.as_str() {
                        "" => None,
                        host => {
                            Some(host.parse().map_err(|_err| format!("{host:?} is not a host"))?)
                        }
                    };
                    let path = PathChange::compile(rewrite.path.as_ref(), prefix)?;
                    filters.request.push(RequestFilter::Rewrite { host, path });
                }
                Some(Kind::Redirect(redirect)) => {
                    filters.redirect = Some(Redirect::compile(redirect, prefix)?);
                }
                Some(Kind::Cors(cors)) => filters.cors = Some(Cors::compile(cors)?),
                Some(Kind::Mirror(mirror)) => filters.mirrors.push(Mirror {
                    backend: mirror.backend.clone(),
                    numerator: mirror.numerator,
                    denominator: mirror.denominator.max(1),
                }),
                None => return Err("a filter of a kind that this sidecar does not know".to_owned()),
            }
        }
        Ok(filters)
    }

    /// The cross-origin rules.
    #[must_use]
    pub fn cors(&self) -> Option<&Cors> {
        self.cors.as_ref()
    }

    /// Where copies go.
    #[must_use]
    pub fn mirrors(&self) -> &[Mirror] {
        &self.mirrors
    }

    /// Changes the request, in the order of the filters. `authority` is what the backend sees as host.
    pub fn apply_request(&self, head: &mut request::Parts, authority: &mut Authority) {
        for filter in &self.request {
            match filter {
                RequestFilter::Headers(change) => change.apply(&mut head.headers),
                RequestFilter::Rewrite { host, path } => {
                    if let Some(host) = host {
                        *authority = host.clone();
                    }
                    if let Some(path) = path {
                        let path = path.apply(head.uri.path());
                        replace_path(&mut head.uri, &path);
                    }
                }
            }
        }
    }

    /// Changes the response.
    pub fn apply_response(&self, headers: &mut HeaderMap) {
        for change in &self.response {
            change.apply(headers);
        }
    }

    /// The redirect to answer with instead of calling anybody.
    #[must_use]
    pub fn redirect(&self, head: &request::Parts, authority: &Authority) -> Option<Response<Body>> {
        let redirect = self.redirect.as_ref()?;
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = redirect.status;
        let location = HeaderValue::from_str(&redirect.location(head, authority)).ok()?;
        response.headers_mut().insert(header::LOCATION, location);
        Some(response)
    }
}

impl HeaderChange {
    fn compile(raw: &proto::HeaderModifier) -> Result<Self, String> {
        let pairs = |headers: &[proto::Header]| {
            let pair = |header: &proto::Header| {
                let value = HeaderValue::from_str(&header.value);
                let value =
                    value.map_err(|_err| format!("{:?} is not a header value", header.value))?;
                Ok::<_, String>((name(&header.name)?, value))
            };
            headers.iter().map(pair).collect::<Result<Vec<_>, _>>()
        };
        let remove = raw.remove.iter().map(|text| name(text)).collect::<Result<_, _>>()?;
        Ok(Self { set: pairs(&raw.set)?, add: pairs(&raw.add)?, remove })
    }

    fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }
}

fn name(text: &str) -> Result<HeaderName, String> {
    text.parse().map_err(|_err| format!("{text:?} is not a header name"))
}

impl PathChange {
    fn compile(
        raw: Option<&proto::PathModifier>,
        prefix: Option<&str>,
    ) -> Result<Option<Self>, String> {
        use proto::path_modifier::Kind;
        let Some(kind) = raw.and_then(|raw| raw.kind.as_ref()) else {
            return Ok(None);
        };
        let change = match (kind, prefix) {
            (Kind::ReplaceFull(path), _) => Self::Full(path.clone()),
            (Kind::ReplacePrefix(with), Some(prefix)) => {
                let matched = prefix.trim_end_matches('/').to_owned();
                Self::Prefix { matched, with: with.trim_end_matches('/').to_owned() }
            }
            (Kind::ReplacePrefix(_), None) => {
                return Err("replacing a prefix needs a prefix match".to_owned());
            }
        };
        let (Self::Full(text) | Self::Prefix { with: text, .. }) = &change;
        if PathAndQuery::try_from(format!("/{text}")).is_err() {
            return Err(format!("{text:?} is not a path"));
        }
        Ok(Some(change))
    }

    fn apply(&self, path: &str) -> String {
        let text = match self {
            Self::Full(full) => full.clone(),
            Self::Prefix { matched, with } => {
                let rest = path.strip_prefix(matched.as_str()).unwrap_or_default();
                format!("{with}{rest}")
            }
        };
        if text.starts_with('/') { text } else { format!("/{text}") }
    }
}

fn replace_path(uri: &mut Uri, path: &str) {
    let text = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    if let Ok(path) = PathAndQuery::try_from(text) {
        parts.path_and_query = Some(path);
        if let Ok(changed) = Uri::from_parts(parts) {
            *uri = changed;
        }
    }
}

impl Redirect {
    fn compile(raw: &proto::Redirect, prefix: Option<&str>) -> Result<Self, String> {
        let status =
            u16::try_from(raw.status).ok().and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.filter(StatusCode::is_redirection);
        let port = u16::try_from(raw.port).map_err(|_err| format!("{} is not a port", raw.port))?;
        Ok(Self {
            scheme: raw.scheme.clone(),
            host: raw.hostname.clone(),
            port: (port != 0).then_some(port),
            path: PathChange::compile(raw.path.as_ref(), prefix)?,
            status: status.ok_or_else(|| format!("{} is not a redirect status", raw.status))?,
        })
    }

    /// As Gateway API says: a given port wins; else a given scheme's own port; else the request's.
    fn location(&self, head: &request::Parts, authority: &Authority) -> String {
        let scheme = if self.scheme.is_empty() { "http" } else { &self.scheme };
        let host = if self.host.is_empty() { authority.host() } else { &self.host };
        let well_known = if scheme == "https" { 443 } else { 80 };
        let port = self.port.or_else(|| {
            if self.scheme.is_empty() { authority.port_u16() } else { Some(well_known) }
        });
        let path = match &self.path {
            Some(path) => path.apply(head.uri.path()),
            None => head.uri.path().to_owned(),
        };
        let query = head.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        match port.filter(|port| *port != well_known) {
            Some(port) => format!("{scheme}://{host}:{port}{path}{query}"),
            None => format!("{scheme}://{host}{path}{query}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proto::path_modifier::Kind as PathKind;

    fn filter(kind: Kind) -> Vec<proto::Filter> {
        vec![proto::Filter { kind: Some(kind) }]
    }

    fn path(kind: PathKind) -> Option<proto::PathModifier> {
        Some(proto::PathModifier { kind: Some(kind) })
    }

    fn rewritten(prefix: &str, with: &str, uri: &str) -> String {
        let rewrite = proto::UrlRewrite {
            path: path(PathKind::ReplacePrefix(with.to_owned())),
            hostname: "other".to_owned(),
        };
        let filters = Filters::compile(&filter(Kind::UrlRewrite(rewrite)), Some(prefix)).unwrap();
        let mut head = Request::get(uri).body(()).unwrap().into_parts().0;
        let mut authority = Authority::from_static("a");
        filters.apply_request(&mut head, &mut authority);
        format!("{authority}{}", head.uri)
    }

    #[test]
    fn prefixes_are_replaced_as_gateway_api_says() {
        assert_eq!(rewritten("/foo", "/xyz", "/foo/bar?q"), "other/xyz/bar?q");
        assert_eq!(rewritten("/foo/", "/xyz/", "/foo"), "other/xyz");
        assert_eq!(rewritten("/foo", "/", "/foo/bar"), "other/bar");
        assert_eq!(rewritten("/foo", "", "/foo"), "other/");
    }

    #[test]
    fn redirects_derive_the_port() {
        let location = |scheme: &str, port: u32, authority: &'static str| {
            let redirect = proto::Redirect {
                scheme: scheme.to_owned(),
                port,
                status: 302,
                ..Default::default()
            };
            let filters = Filters::compile(&filter(Kind::Redirect(redirect)), None).unwrap();
            let head = Request::get("/p?q").body(()).unwrap().into_parts().0;
            let response = filters.redirect(&head, &Authority::from_static(authority)).unwrap();
            response.headers()[header::LOCATION].to_str().unwrap().to_owned()
        };
        assert_eq!(location("", 0, "a:8080"), "http://a:8080/p?q");
        assert_eq!(location("https", 0, "a:8080"), "https://a/p?q");
        assert_eq!(location("", 8443, "a"), "http://a:8443/p?q");
    }

    #[test]
    fn headers_are_set_added_and_removed() {
        let header =
            |name: &str, value: &str| proto::Header { name: name.into(), value: value.into() };
        let change = proto::HeaderModifier {
            set: vec![header("x-a", "2")],
            add: vec![header("x-b", "3")],
            remove: vec!["x-c".to_owned()],
        };
        let filters = Filters::compile(&filter(Kind::ResponseHeaders(change)), None).unwrap();
        let mut headers = HeaderMap::new();
        for name in ["x-a", "x-b", "x-c"] {
            headers.insert(name, HeaderValue::from_static("1"));
        }
        filters.apply_response(&mut headers);
        assert_eq!(headers["x-a"], "2");
        assert_eq!(headers.get_all("x-b").iter().count(), 2);
        assert!(!headers.contains_key("x-c"));
    }
}
