//! Why a call failed inside the mesh: one type that feeds the reply, the metric label and the log field, so
//! that the three always agree. The names are those of RFC 9209 (`Proxy-Status`), section 2.3.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

/// Proxy error types of RFC 9209, as far as this proxy produces them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are RFC 9209's own")]
pub enum ErrorType {
    DestinationNotFound,
    DestinationUnavailable,
    ConnectionRefused,
    ConnectionTimeout,
    ConnectionTerminated,
    ConnectionLimitReached,
    TlsProtocolError,
    TlsCertificateError,
    HttpRequestError,
    HttpRequestDenied,
    HttpProtocolError,
    HttpResponseIncomplete,
    HttpResponseTimeout,
    HttpUpgradeFailed,
    ProxyConfigurationError,
    ProxyInternalError,
    ProxyInternalResponse,
}

const ALL: [ErrorType; 17] = [
    ErrorType::DestinationNotFound,
    ErrorType::DestinationUnavailable,
    ErrorType::ConnectionRefused,
    ErrorType::ConnectionTimeout,
    ErrorType::ConnectionTerminated,
    ErrorType::ConnectionLimitReached,
    ErrorType::TlsProtocolError,
    ErrorType::TlsCertificateError,
    ErrorType::HttpRequestError,
    ErrorType::HttpRequestDenied,
    ErrorType::HttpProtocolError,
    ErrorType::HttpResponseIncomplete,
    ErrorType::HttpResponseTimeout,
    ErrorType::HttpUpgradeFailed,
    ErrorType::ProxyConfigurationError,
    ErrorType::ProxyInternalError,
    ErrorType::ProxyInternalResponse,
];

impl ErrorType {
    /// The type that another sidecar's `Proxy-Status` names: `duet; error=<type>; …`.
    #[must_use]
    pub fn of_proxy_status(value: &str) -> Option<Self> {
        let name = value.split(';').find_map(|part| part.trim().strip_prefix("error="))?;
        ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// As RFC 9209 writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DestinationNotFound => "destination_not_found",
            Self::DestinationUnavailable => "destination_unavailable",
            Self::ConnectionRefused => "connection_refused",
            Self::ConnectionTimeout => "connection_timeout",
            Self::ConnectionTerminated => "connection_terminated",
            Self::ConnectionLimitReached => "connection_limit_reached",
            Self::TlsProtocolError => "tls_protocol_error",
            Self::TlsCertificateError => "tls_certificate_error",
            Self::HttpRequestError => "http_request_error",
            Self::HttpRequestDenied => "http_request_denied",
            Self::HttpProtocolError => "http_protocol_error",
            Self::HttpResponseIncomplete => "http_response_incomplete",
            Self::HttpResponseTimeout => "http_response_timeout",
            Self::HttpUpgradeFailed => "http_upgrade_failed",
            Self::ProxyConfigurationError => "proxy_configuration_error",
            Self::ProxyInternalError => "proxy_internal_error",
            Self::ProxyInternalResponse => "proxy_internal_response",
        }
    }
}

/// How far a failed try had come: decides whether another one can do harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The request provably never reached the application: any method may be tried again.
    Unprocessed,
    /// It may have: only safe to repeat for idempotent requests.
    Unknown,
    /// A policy says that this answer may be followed by another try, whatever the method.
    Allowed,
    /// Trying again cannot help.
    Final,
}

/// Why a call, or one try of it, failed.
#[derive(Debug)]
pub struct Failure {
    /// For machines.
    pub kind: ErrorType,
    /// HTTP status of the reply.
    pub status: http::StatusCode,
    /// For people: who and what. Safe to show to the caller.
    pub details: Cow<'static, str>,
    /// For the retry decision.
    pub progress: Progress,
    /// When asking again may help.
    pub retry_after: Option<Duration>,
    /// What a gRPC caller gets; else what the HTTP status maps to.
    pub grpc_status: Option<u16>,
    /// A connection that had carried requests before ended without a word: probably it was closed while this one was on its
    /// way, and no more is known than [`Progress::Unknown`].
    pub stale: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.name(), self.details)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// A failure that no further try can mend, with the status that RFC 9209 recommends for its type.
    #[must_use]
    pub fn new(kind: ErrorType, details: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            status: status(kind),
            details: details.into(),
            progress: Progress::Final,
            retry_after: None,
            grpc_status: None,
            stale: false,
        }
    }

    /// The same with another status.
    #[must_use]
    pub fn with_status(mut self, status: http::StatusCode) -> Self {
        self.status = status;
        self
    }

    /// The same with a time after which asking again may help.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The same with another progress.
    #[must_use]
    pub fn with_progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }
}

fn status(kind: ErrorType) -> http::StatusCode {
    use http::StatusCode;
    match kind {
        ErrorType::HttpRequestError => StatusCode::BAD_REQUEST,
        ErrorType::HttpRequestDenied => StatusCode::FORBIDDEN,
        ErrorType::DestinationUnavailable | ErrorType::ConnectionLimitReached => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        ErrorType::ConnectionTimeout | ErrorType::HttpResponseTimeout => {
            StatusCode::GATEWAY_TIMEOUT
        }
        ErrorType::ProxyConfigurationError
        | ErrorType::ProxyInternalError
        | ErrorType::ProxyInternalResponse => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorType::DestinationNotFound
        | ErrorType::ConnectionRefused
        | ErrorType::ConnectionTerminated
        | ErrorType::TlsProtocolError
        | ErrorType::TlsCertificateError
        | ErrorType::HttpProtocolError
        | ErrorType::HttpResponseIncomplete
        | ErrorType::HttpUpgradeFailed => StatusCode::BAD_GATEWAY,
    }
}
