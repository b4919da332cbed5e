//! Errors of the API: RFC 9457 problem+json with Dapr's fields beside it, and `Proxy-Status`.

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};

use crate::error::ErrorType;
use crate::http::body::Body;
use crate::http::headers::PROXY_STATUS;

/// What went wrong.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    /// Dapr's `errorCode`.
    pub(super) code: &'static str,
    pub(super) message: String,
    /// The CloudEvents attribute or query parameter that is wrong.
    pub(super) attribute: Option<String>,
    /// Seconds after which trying again may help.
    pub(super) retry_after: Option<u32>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), attribute: None, retry_after: None }
    }

    pub(super) fn response(self) -> Response<Body> {
        let kind = match self.status {
            StatusCode::NOT_FOUND => ErrorType::DestinationNotFound,
            status if status.is_client_error() => ErrorType::HttpRequestError,
            _ => ErrorType::DestinationUnavailable,
        };
        let problem = serde_json::json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("error"),
            "status": self.status.as_u16(),
            "detail": self.message,
            "errorCode": self.code,
            "message": self.message,
            "attribute": self.attribute,
        });
        let mut response = Response::new(Body::Full(Bytes::from(problem.to_string())));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        let json = HeaderValue::from_static("application/problem+json");
        headers.insert(header::CONTENT_TYPE, json);
        let status = format!("duet; error={}; details=\"{}\"", kind.name(), self.code);
        if let Ok(status) = HeaderValue::from_str(&status) {
            headers.insert(PROXY_STATUS, status);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
