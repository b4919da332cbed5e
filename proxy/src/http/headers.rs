//! Header hygiene at each hop (RFC 9110 section 7.6.1), and the headers that sidecars add for each other.

use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Uri, Version, request};

use crate::error::{ErrorType, Failure};

/// The service that an application dials, `<service>.<namespace>:<port>`, where that is not what `Host` or `:authority`
/// names: what the address of a connection says where traffic is redirected to the sidecar.
pub const DESTINATION: HeaderName = HeaderName::from_static("duet-destination");
/// Number of the try, from 2 on; set by the caller's sidecar.
pub const ATTEMPT: HeaderName = HeaderName::from_static("duet-attempt");
/// Present with the value `1.1` where the application spoke HTTP/1 although the mesh carries HTTP/2.
pub const ORIGINAL_VERSION: HeaderName = HeaderName::from_static("duet-original-version");
/// On a failure reply of the called side's sidecar: how far the request had come, `unprocessed`, `unknown` or
/// `final`, or `shed` (unprocessed, because it is busy), so that the caller's sidecar can decide about another try.
pub const PROGRESS: HeaderName = HeaderName::from_static("duet-progress");
/// Name of a delivery of events. On requests to the application, by its own sidecar only.
pub const DELIVERY: HeaderName = HeaderName::from_static("duet-delivery");
/// Number of the delivery of an event, from 1 on. On requests to the application, by its own sidecar only.
pub const DELIVERY_ATTEMPT: HeaderName = HeaderName::from_static("duet-delivery-attempt");
/// Milliseconds that are left for a request, shrinking at each hop. Applications may pass it on with their own calls; gRPC
/// has `grpc-timeout` for the same.
pub const TIMEOUT_MS: HeaderName = HeaderName::from_static("duet-timeout-ms");
/// gRPC over HTTP/2, `Timeout`.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Who called: `By=<us>;URI=<them>`, as Envoy writes it. Always ours, never the caller's.
pub const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// Where a request came from, and through whom.
pub const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// RFC 9209.
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
/// Makes a request safe to repeat (draft-ietf-httpapi-idempotency-key-header).
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// W3C trace context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// W3C trace context: what else tracing systems pass on. Means nothing without [`TRACEPARENT`].
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Removes what is meant for this hop only: the headers that `Connection` names, and those that always are.
/// `TE: trailers` stays, as gRPC needs it.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    strip(headers, |_name| false);
}

/// Removes what only sidecars may say to each other, from an application's request or response, together with what
/// [`strip_hop_by_hop`] does.
pub fn strip_all(headers: &mut HeaderMap) {
    strip(headers, is_internal);
}

/// Removes what an application hears from its own sidecar only, from a peer's request, together with what
/// [`strip_hop_by_hop`] does.
pub fn strip_forged(headers: &mut HeaderMap) {
    strip(headers, is_own_sidecars);
}

/// Looking over the few names that are there is cheaper than a hashed look-up of every name that might be.
fn strip(headers: &mut HeaderMap, also: fn(&str) -> bool) {
    let leaves = |name: &&HeaderName| {
        let name = name.as_str();
        is_hop_by_hop(name) || also(name)
    };
    let mut found = headers.keys().filter(leaves);
    let Some(first) = found.next() else {
        return;
    };
    // Nearly always it is this header alone, which names nothing.
    if *first == header::CONNECTION && found.next().is_none() && names_nothing(headers) {
        headers.remove(header::CONNECTION);
        return;
    }
    let first = first.clone();
    let named = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| !["keep-alive", "close", "upgrade", "te"].contains(name))
        .filter_map(|name| name.parse().ok());
    let mut leaving: Vec<HeaderName> = named.collect();
    if first == header::CONNECTION && headers.keys().filter(leaves).count() == 1 {
        leaving.push(first);
    } else {
        leaving.extend(headers.keys().filter(leaves).cloned());
    }
    for name in leaving {
        if name != header::TE || headers.get(header::TE).is_some_and(|value| value != "trailers") {
            headers.remove(name);
        }
    }
}

/// The one `Connection` header says only whether the connection stays.
fn names_nothing(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::CONNECTION).iter();
    let says = values.next().is_some_and(|value| value == "keep-alive" || value == "close");
    says && values.next().is_none()
}

/// Tells by length first, which settles nearly every name.
fn is_hop_by_hop(name: &str) -> bool {
    match name.len() {
        2 => name == "te",
        7 => name == "upgrade",
        10 => name == "connection" || name == "keep-alive",
        16 => name == "proxy-connection",
        17 => name == "transfer-encoding",
        18 => name == "proxy-authenticate",
        19 => name == "proxy-authorization",
        _ => false,
    }
}

fn is_internal(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("duet-") else {
        return false;
    };
    matches!(rest, "attempt" | "progress" | "original-version" | "destination")
}

fn is_own_sidecars(name: &str) -> bool {
    // Where headers become variables, as in CGI, an underscore is as good as a dash.
    let is = |own: &HeaderName| {
        let dashed = name.bytes().map(|byte| if byte == b'_' { b'-' } else { byte });
        name.len() == own.as_str().len() && dashed.eq(own.as_str().bytes())
    };
    is(&DELIVERY) || is(&DELIVERY_ATTEMPT) || is(&CLIENT_CERT)
}

/// Puts headers in place of those of the same names.
pub fn replace(headers: &mut HeaderMap, with: HeaderMap) {
    for (name, value) in with {
        // Names of repeated headers come once; ours never repeat.
        if let Some(name) = name {
            headers.insert(name, value);
        }
    }
}

/// Whether any header is one of the mesh's own. Looking over the names is cheaper than a hashed look-up, and nearly
/// always the answer is no.
#[must_use]
pub fn has_ours(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| name.as_str().starts_with("duet-"))
}

/// Copies a head out of its connection's read buffer, which is then free for the next read. Thousands of connections
/// that wait for an answer would each hold a second buffer otherwise.
pub fn detach<B>(request: &mut Request<B>) {
    let values = request.headers().values().map(HeaderValue::len).sum();
    let mut copy = BytesMut::with_capacity(values);
    for value in request.headers().values() {
        copy.extend_from_slice(value.as_bytes());
    }
    let mut copy = copy.freeze();
    for value in request.headers_mut().values_mut() {
        // The same bytes were a value before.
        if let Ok(same) = HeaderValue::from_maybe_shared(copy.split_to(value.len())) {
            *value = same;
        }
    }
    let uri = request.uri();
    let same = match uri.path_and_query() {
        Some(target) if uri.authority().is_none() => {
            let target = Bytes::copy_from_slice(target.as_str().as_bytes());
            PathAndQuery::from_maybe_shared(target).map(Uri::from).ok()
        }
        _ => Uri::from_maybe_shared(uri.to_string()).ok(),
    };
    if let Some(same) = same {
        *request.uri_mut() = same;
    }
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

/// What the application dials, where it says so apart from the request's authority.
///
/// # Errors
/// When it says so more than once, or what it says is malformed.
pub fn destination(headers: &HeaderMap) -> Result<Option<Authority>, Failure> {
    if !has_ours(headers) {
        return Ok(None);
    }
    let mut values = headers.get_all(&DESTINATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let bad = |text: &'static str| Failure::new(ErrorType::HttpRequestError, text);
    if values.next().is_some() {
        return Err(bad("more than one duet-destination header"));
    }
    match Authority::try_from(value.as_bytes()) {
        Ok(authority) if !authority.as_str().contains('@') => Ok(Some(authority)),
        Ok(_) | Err(_) => Err(bad("malformed duet-destination header")),
    }
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
    if head.headers.get(header::HOST).is_some_and(|host| host == authority.as_str()) {
        return;
    }
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
    fn a_peer_cannot_say_what_only_the_own_sidecar_says() {
        let forged = ["duet-delivery", "duet_delivery-attempt", "x_forwarded_client_cert"];
        let kept = ["duet-attempt", "duet-deliver", "duet-delivery-other", "x-forwarded-for"];
        let mut request = Request::get("/").header("connection", "close");
        for name in forged.iter().chain(&kept) {
            request = request.header(*name, "1");
        }
        let mut head = head(request);
        strip_forged(&mut head.headers);
        let mut names: Vec<&str> = head.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, kept);
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
    fn the_destination_may_differ_from_the_authority() {
        let of = |request| destination(&head(request).headers).map(|a| a.map(|a| a.to_string()));
        assert_eq!(of(Request::get("/").header("host", "a")).unwrap(), None);
        let told = Request::get("/").header("host", "a").header("duet-destination", "b.c:80");
        assert_eq!(of(told).unwrap().as_deref(), Some("b.c:80"));
        for bad in ["u@a", "a b", ""] {
            assert!(of(Request::get("/").header("duet-destination", bad)).is_err(), "{bad}");
        }
        let twice = Request::get("/").header("duet-destination", "a");
        assert!(of(twice.header("duet-destination", "b")).is_err());
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
