//! Serving: listening, stopping in order, error answers, and lines for the log. Imports nothing of the shop.

use std::convert::Infallible;
use std::future::Future;
use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use axum::extract::FromRequestParts;
use axum::http::header::{CONTENT_TYPE, HeaderMap};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How long requests that are under way may still take after a signal to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Serves `router` (and `/healthz`) beside `work`, the app's own background work, until SIGTERM or SIGINT; then takes
/// no new connection, finishes what is under way, and returns.
pub(crate) async fn serve<W>(
    name: &'static str,
    (host, port): (&str, u16),
    router: Router,
    work: W,
) -> anyhow::Result<()>
where
    W: Future<Output = Infallible>,
{
    let listener = TcpListener::bind((host, port))
        .await
        .with_context(|| format!("{name} cannot listen on {host}:{port}"))?;
    say(name, &format!("listens on http://{}", listener.local_addr()?));
    let router = router.route("/healthz", get(|| async { "ok\n" }));
    let (stop, stopped) = watch::channel(false);
    let server = axum::serve(listener, router).with_graceful_shutdown(flag(stopped));
    let deadline = async {
        wait_for_signal().await?;
        say(name, "stops");
        stop.send_replace(true);
        tokio::time::sleep(GRACE).await;
        say(name, "leaves requests unfinished: the grace period is over");
        anyhow::Ok(())
    };
    tokio::select! {
        served = server.into_future() => served.with_context(|| format!("{name} cannot serve")),
        waited = deadline => waited,
        never = work => match never {},
    }
}

async fn flag(mut stopped: watch::Receiver<bool>) {
    // A dropped sender means that the process ends anyway.
    stopped.wait_for(|stopped| *stopped).await.map(drop).unwrap_or_default();
}

async fn wait_for_signal() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// One line on standard output. A closed pipe is no reason for a shop to close.
pub(crate) fn say(name: &str, line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{name}: {line}").and_then(|()| out.flush()).unwrap_or_default();
}

/// A failure as its caller sees it: problem+json (RFC 9457) with a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    pub(crate) detail: String,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into() }
    }

    /// This service's own data cannot be read or written.
    pub(crate) fn storage(error: &anyhow::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let title = self.status.canonical_reason().unwrap_or("Error");
        let body = json!({"title": title, "status": self.status.as_u16(), "detail": self.detail});
        let problem = HeaderValue::from_static("application/problem+json");
        (self.status, [(CONTENT_TYPE, problem)], Json(body)).into_response()
    }
}

/// Trace headers of a request, to be sent along with the calls that it causes. This is the one thing that an app
/// must do for its traces not to end at its door.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace(pub(crate) HeaderMap);

impl<S: Sync> FromRequestParts<S> for Trace {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let mut kept = HeaderMap::new();
        for name in ["traceparent", "tracestate", "baggage"].map(HeaderName::from_static) {
            if let Some(value) = parts.headers.get(&name) {
                kept.insert(name, value.clone());
            }
        }
        Ok(Self(kept))
    }
}

/// The `Idempotency-Key` of a request: it names the one effect that all attempts of that request may have.
///
/// # Errors
/// 400 if it is longer than 64 characters or has others than `A-Z a-z 0-9 - _`.
pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let key = value.to_str().ok().filter(|key| (1..=64).contains(&key.len()));
    let key = key.filter(|key| key.as_bytes().iter().all(allowed)).ok_or_else(|| {
        let rule =
            "Idempotency-Key must be 1 to 64 characters out of A-Z a-z 0-9 - _ (a UUID, say)";
        Problem::new(StatusCode::BAD_REQUEST, rule)
    })?;
    Ok(Some(key.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(value: &[u8]) -> Result<Option<String>, Problem> {
        let mut headers = HeaderMap::new();
        headers.insert("idempotency-key", HeaderValue::from_bytes(value).unwrap());
        idempotency_key(&headers)
    }

    #[test]
    fn a_key_is_taken_as_it_is_or_refused() {
        assert_eq!(key(b"7f-A_9").unwrap().as_deref(), Some("7f-A_9"));
        for wrong in [&b""[..], b"a b", b"../x", b"\xff", &[b'a'; 65]] {
            assert_eq!(key(wrong).unwrap_err().status, StatusCode::BAD_REQUEST, "{wrong:?}");
        }
    }
}
