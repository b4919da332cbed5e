//! The admin port: `/metrics`, `/live` and `/ready`, plain HTTP, nothing that changes state. Imports nothing but
//! libraries.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use prometheus::{Encoder as _, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A client that does not say what it wants is let go after this.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// No connection lives longer than this; scrapers connect again.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(300);
/// Connections at once.
const MAX_CONNECTIONS: usize = 256;

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Every metric of the process.
    pub registry: prometheus::Registry,
    /// Everything is bound and loaded, and no drain has begun.
    pub ready: Arc<AtomicBool>,
}

impl Admin {
    fn router(self) -> Router {
        Router::new()
            .route("/metrics", get(metrics))
            .route("/live", get(async || "live\n"))
            .route("/ready", get(ready))
            .with_state(self)
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let encoder = TextEncoder::new();
    let mut text = Vec::new();
    match encoder.encode(&admin.registry.gather(), &mut text) {
        Ok(()) => {
            ([(header::CONTENT_TYPE, encoder.format_type().to_owned())], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn ready(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    match admin.ready.load(Ordering::Acquire) {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

/// Serves until `stop`.
pub async fn serve(
    listener: TcpListener,
    admin: Admin,
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    serve_router(listener, admin.router(), tracker, stop).await;
}

/// Serves any pages until `stop`, with the bounds that a port for people and their tools needs.
pub async fn serve_router(
    listener: TcpListener,
    router: Router,
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = async {
        while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file handles, most likely: let some be closed.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let service = TowerToHyperService::new(router.clone());
            let stop = stop.clone();
            tracker.spawn(async move {
                let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
                server.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
                let connection = server.serve_connection(TokioIo::new(stream), service);
                tokio::pin!(connection);
                let end = async {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = tokio::time::sleep(CONNECTION_LIFETIME) => {}
                    }
                };
                tokio::select! {
                    outcome = connection.as_mut() => {
                        if let Err(error) = outcome {
                            tracing::debug!("admin connection: {error}");
                        }
                    }
                    () = end => {
                        connection.as_mut().graceful_shutdown();
                        let rest = tokio::time::timeout(HEADER_TIMEOUT, connection).await;
                        tracing::debug!(in_time = rest.is_ok(), "admin connection closed");
                    }
                }
                drop(slot);
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        () = stop.cancelled() => {}
    }
}
