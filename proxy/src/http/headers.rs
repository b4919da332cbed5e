//! Header hygiene at each hop (RFC 9110 section 7.6.1), and the headers that sidecars add for each other.

use http::header::{self, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Uri, Version, request};

use crate::error::{ErrorType, Failure};

/// Number of the try, from 2 on; set by the caller's sidecar.
pub const ATTEMPT: HeaderName = HeaderName::from_static("duet-attempt");
/// Present with the value `1.1` where the application spoke HTTP/1 although the mesh carries HTTP/2.
pub const ORIGINAL_VERSION: HeaderName = HeaderName::from_static("duet-original-version");
/// On a failure reply of the called side's sidecar: how far the request had come, `unprocessed`, `unknown` or
/// `final`, so that the caller's sidecar can decide about another try.
pub const PROGRESS: HeaderName = HeaderName::from_static("duet-progress");
/// Who called: `By=<us>;URI=<them>`, as Envoy writes it. Always ours, never the caller's.
pub const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// RFC 9209.
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
/// Makes a request safe to repeat (draft-ietf-httpapi-idempotency-key-header).
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// W3C trace context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
static PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Removes what is meant for this hop only: the headers that `Connection` names, and those that always are.
/// `TE: trailers` stays, as gRPC needs it.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    for name in [
        &KEEP_ALIVE,
        &PROXY_CONNECTION,
        &header::PROXY_AUTHENTICATE,
        &header::PROXY_AUTHORIZATION,
        &header::TRANSFER_ENCODING,
        &header::UPGRADE,
    ] {
        headers.remove(name);
    }
    if headers.get(header::TE).is_some_and(|value| value != "trailers") {
        headers.remove(header::TE);
    }
}

/// Removes what only sidecars may say to each other, from an application's request or response.
pub fn strip_internal(headers: &mut HeaderMap) {
    headers.remove(ATTEMPT);
    headers.remove(PROGRESS);
    headers.remove(ORIGINAL_VERSION);
}

/// The authority that a request is for: of an absolute-form or HTTP/2 target, else of the one `Host` header.
///
/// # Errors
/// When there is none, more than one, or it is malformed (RFC 9112 section 3.2: 400).
pub fn authority(head: &request::Parts) -> Result<Authority, Failure> {
    let bad = |text: &'static str| Failure::new(ErrorType::HttpRequestError, text);
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(bad("more than one Host header"));
    }
    if let Some(authority) = head.uri.authority() {
        if authority.as_str().contains('@') {
            return Err(bad("the target has user information"));
        }
        let host =
            host.filter(|host| head.version == Version::HTTP_2 && *host != authority.as_str());
        return match host {
            Some(_) => Err(bad("Host and :authority differ")),
            None => Ok(authority.clone()),
        };
    }
    let host = host.ok_or_else(|| bad("no Host header"))?;
    let authority =
        Authority::try_from(host.as_bytes()).map_err(|_err| bad("malformed Host header"));
    authority.and_then(|authority| {
        if authority.as_str().contains('@') {
            return Err(bad("malformed Host header"));
        }
        Ok(authority)
    })
}

/// The path and query, `/` where there is none.
#[must_use]
pub fn path_and_query(uri: &Uri) -> PathAndQuery {
    uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"))
}

/// Rewrites the target for an HTTP/1 hop: origin-form with a `Host` header.
pub fn for_http1(head: &mut request::Parts, authority: &Authority) {
    head.version = Version::HTTP_11;
    head.uri = Uri::from(path_and_query(&head.uri));
    if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
        head.headers.insert(header::HOST, host);
    }
}

/// Rewrites the target for an HTTP/2 hop: `:authority` and no `Host`.
pub fn for_http2(head: &mut request::Parts, authority: &Authority) {
    head.version = Version::HTTP_2;
    head.headers.remove(header::HOST);
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority.clone());
    parts.path_and_query = Some(path_and_query(&head.uri));
    // Scheme, authority and path are all there, which is the only thing that can be wrong.
    if let Ok(uri) = Uri::from_parts(parts) {
        head.uri = uri;
    }
}

/// Whether a request is a gRPC call.
#[must_use]
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        let Some(rest) = value.as_bytes().strip_prefix(b"application/grpc") else {
            return false;
        };
        matches!(rest.first(), None | Some(b'+' | b';'))
    })
}

/// The gRPC status in headers or trailers. Anything that is not a known code is `UNKNOWN` (2).
#[must_use]
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    let value = headers.get("grpc-status")?;
    let code = value.to_str().ok().and_then(|text| text.parse().ok());
    Some(code.filter(|code| *code <= 16).unwrap_or(2))
}

/// Whether repeating the request does no more than sending it once (RFC 9110 section 9.2.2).
#[must_use]
pub fn is_idempotent(method: &Method, headers: &HeaderMap) -> bool {
    method.is_idempotent() || headers.contains_key(IDEMPOTENCY_KEY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn head(request: request::Builder) -> request::Parts {
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn headers_named_by_connection_go_with_it() {
        let mut head = head(
            Request::get("/")
                .header("connection", "close, X-Secret")
                .header("x-secret", "1")
                .header("te", "trailers")
                .header("upgrade", "h2c")
                .header("x-kept", "1"),
        );
        strip_hop_by_hop(&mut head.headers);
        let names: Vec<&str> = head.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["te", "x-kept"]);
    }

    #[test]
    fn the_authority_is_unambiguous() {
        let of = |request| authority(&head(request)).map(|a| a.to_string());
        assert_eq!(of(Request::get("/").header("host", "a:80")).unwrap(), "a:80");
        assert_eq!(of(Request::get("http://b/x").header("host", "a")).unwrap(), "b");
        assert!(of(Request::get("/")).is_err());
        assert!(of(Request::get("/").header("host", "a").header("host", "b")).is_err());
        assert!(of(Request::get("/").header("host", "u@a")).is_err());
        assert!(of(Request::get("/").header("host", "a b")).is_err());
        let h2 = Request::get("http://a/").version(Version::HTTP_2).header("host", "b");
        assert!(of(h2).is_err());
    }

    #[test]
    fn grpc_is_told_by_content_type() {
        for (value, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;x", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            let head = head(Request::post("/").header("content-type", value));
            assert_eq!(is_grpc(&head.headers), expected, "{value}");
        }
    }

    #[test]
    fn unknown_grpc_codes_do_not_become_labels() {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", HeaderValue::from_static("4711"));
        assert_eq!(grpc_status(&headers), Some(2));
    }
}
