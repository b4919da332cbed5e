//! The one place that turns a failure into a response: status, `Proxy-Status` (RFC 9209), and a body that fits
//! what the caller reads: trailers-only for gRPC, problem+json (RFC 9457) where accepted, else plain text.

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Response, StatusCode};

use super::body::Body;
use super::headers::{PROXY_STATUS, is_grpc};
use crate::error::Failure;

/// What a reply depends on; taken from the request before it is sent on.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    grpc: bool,
    problem: bool,
}

impl Asked {
    /// Reads the request's headers.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let accepts = |text: &str| text.contains("json");
        let problem =
            headers.get_all(header::ACCEPT).iter().any(|value| value.to_str().is_ok_and(accepts));
        Self { grpc: is_grpc(headers), problem }
    }

    /// Whether the call is gRPC.
    #[must_use]
    pub fn is_grpc(self) -> bool {
        self.grpc
    }
}

/// The response for a failure.
#[must_use]
pub fn failure(failure: &Failure, asked: Asked) -> Response<Body> {
    let mut response = if asked.grpc { grpc(failure) } else { http(failure, asked) };
    response.headers_mut().insert(PROXY_STATUS, proxy_status(failure));
    if let Some(wait) = failure.retry_after {
        // Whole seconds (RFC 9110 section 10.2.3), at least one.
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    response
}

/// `duet; error=<type>; details="<text>"`: a structured-fields item (RFC 8941), so only printable ASCII.
fn proxy_status(failure: &Failure) -> HeaderValue {
    let mut details = String::with_capacity(failure.details.len());
    for c in failure.details.chars() {
        match c {
            '"' | '\\' => details.extend(['\\', c]),
            ' '..='~' => details.push(c),
            _ => details.push('?'),
        }
    }
    let text = format!("duet; error={}; details=\"{details}\"", failure.kind.name());
    HeaderValue::from_str(&text).unwrap_or_else(|_err| HeaderValue::from_static("duet"))
}

fn http(failure: &Failure, asked: Asked) -> Response<Body> {
    let (content_type, text) = if asked.problem {
        let problem = serde_json::json!({
            "type": "about:blank",
            "title": failure.status.canonical_reason().unwrap_or("error"),
            "status": failure.status.as_u16(),
            "detail": failure.details,
            "error": failure.kind.name(),
        });
        ("application/problem+json", problem.to_string())
    } else {
        ("text/plain; charset=utf-8", format!("duet: {failure}\n"))
    };
    let mut response = Response::new(Body::Full(Bytes::from(text)));
    *response.status_mut() = failure.status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// gRPC's mapping of HTTP statuses to its own codes (grpc/doc/http-grpc-status-mapping.md), but for 429, which is what
/// `RESOURCE_EXHAUSTED` means.
#[must_use]
pub fn grpc_code(failure: &Failure) -> u16 {
    let mapped = || match failure.status {
        StatusCode::BAD_REQUEST => 13,
        StatusCode::UNAUTHORIZED => 16,
        StatusCode::FORBIDDEN => 7,
        StatusCode::NOT_FOUND => 12,
        StatusCode::TOO_MANY_REQUESTS => 8,
        StatusCode::GATEWAY_TIMEOUT => 4,
        StatusCode::INTERNAL_SERVER_ERROR => 13,
        _ => 14,
    };
    failure.grpc_status.unwrap_or_else(mapped)
}

fn grpc(failure: &Failure) -> Response<Body> {
    let code = grpc_code(failure);
    let message: String = format!("duet: {failure}").chars().map(grpc_message_char).collect();
    let mut response = Response::new(Body::Empty);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(code));
    if let Ok(message) = HeaderValue::from_str(&message) {
        headers.insert("grpc-message", message);
    }
    response
}

/// `grpc-message` is percent-encoded; our own texts need only this much of it.
fn grpc_message_char(c: char) -> char {
    if matches!(c, ' '..='~') && c != '%' { c } else { '?' }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorType;

    fn unavailable() -> Failure {
        Failure::new(ErrorType::DestinationUnavailable, "no endpoint of \"a\" is ready\n")
    }

    #[test]
    fn every_failure_carries_proxy_status() {
        let asked = Asked::of(&HeaderMap::new());
        let response = failure(&unavailable(), asked);
        assert_eq!(response.status(), 503);
        assert_eq!(
            response.headers()[PROXY_STATUS],
            "duet; error=destination_unavailable; details=\"no endpoint of \\\"a\\\" is ready?\""
        );
    }

    #[test]
    fn grpc_callers_get_a_grpc_status() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        let response = failure(&unavailable(), Asked::of(&headers));
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "14");
    }
}
