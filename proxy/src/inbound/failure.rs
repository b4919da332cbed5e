//! What a failure is to the caller's sidecar, and what an application's failures are.

use http::StatusCode;

use crate::error::{ErrorType, Failure, Progress};

/// What the caller's sidecar has to know for its decision about another try. None where the answer is as good as the
/// application's own, so that the caller's policy decides.
pub(super) fn progress(failure: &Failure) -> Option<&'static str> {
    if failure.status == StatusCode::TOO_MANY_REQUESTS {
        return None;
    }
    if failure.kind == ErrorType::ConnectionLimitReached {
        return Some("shed");
    }
    Some(match failure.progress {
        Progress::Unprocessed => "unprocessed",
        Progress::Unknown => "unknown",
        Progress::Allowed | Progress::Final => "final",
    })
}

/// An application that ends a connection without an answer is as unavailable as one that does not accept any.
pub(super) fn app_died(failure: Failure) -> Failure {
    if failure.kind == ErrorType::ConnectionTerminated {
        return failure.with_status(StatusCode::SERVICE_UNAVAILABLE);
    }
    failure
}

/// An application that does not accept is unavailable, for everybody who asks: 503.
pub(super) fn app_away(failure: &Failure) -> Failure {
    let text = format!("the application does not accept connections: {}", failure.details);
    Failure::new(ErrorType::ConnectionRefused, text)
        .with_status(StatusCode::SERVICE_UNAVAILABLE)
        .with_progress(failure.progress)
}
