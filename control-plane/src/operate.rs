//! The operator's port: what `duet events` asks for, over HTTP and JSON, on top of what every bus offers
//! ([`duet_events::bus::ManagedBus`]). It asks nobody who they are, so it listens on loopback only and keeps web pages
//! out (`guard`). Imports [`crate::bus`].
//!
//! | request | what |
//! | --- | --- |
//! | `GET /v1/buses` | names, and why some are not where their resource has them |
//! | `GET /v1/topics?bus=` | topics of a bus |
//! | `GET /v1/subscriptions?bus=` | subscriptions of a bus |
//! | `GET /v1/events?bus=&topic=&from=&limit=&filter=` | events of a topic from a position on |
//! | `POST /v1/publish?bus=&topic=` | CloudEvents in any mode |
//! | `POST /v1/remove`, `/v1/redrive` `{bus, topic, positions}` | dead letters away, or back |
//! | `POST /v1/seek` `{bus, subscription, start, skipWaiting}` | replay |
//! | `POST /v1/forget` `{bus, subscription, skipWaiting}` | a subscription that nobody declares or consumes, away for good |
//! | `POST /v1/migrate` `{bus, skip, leaveBehind, limit}` | what an embedded bus held, to the cluster that it is on now |
//! | `GET /v1/backup?bus=` | a copy of everything that the bus has stored; `duet-missing-events`: but for so many |
//! | `POST /v1/pause` `{bus, subscription, paused}` | stop or go on |

mod guard;
mod requests;
mod steer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use duet_events::bus::{ManageError, ManagedBus, PublishError, PublishErrorKind};
use futures::future::BoxFuture;
use tokio::net::TcpListener;

use crate::bus::{BusError, Buses, Copied, Migration, Moved};

/// Largest request.
const MAX_BODY_BYTES: usize = 8 << 20;
/// For a request to arrive whole. Only answers take their time here.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// Where requests find their bus.
pub trait Shelf: Send + Sync + std::fmt::Debug {
    /// Names of all buses.
    fn names(&self) -> Vec<String>;
    /// A bus by its name.
    fn find<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn ManagedBus>, BusError>>;
    /// Checks that the bus takes publishes to a topic.
    ///
    /// # Errors
    /// Why it does not.
    fn takes(&self, bus: &str, topic: &str) -> Result<(), PublishError>;
    /// Why a bus is not where its resource has it.
    fn not_moved(&self, bus: &str) -> Option<String>;
    /// Whether a resource declares a subscription.
    fn declares(&self, bus: &str, subscription: &str) -> bool;
    /// Moves some of what a bus held on another backend before.
    fn migrate<'a>(
        &'a self,
        name: &'a str,
        wanted: Migration,
    ) -> BoxFuture<'a, Result<Moved, ManageError>>;
    /// A copy of everything that a bus has stored.
    fn backup<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Copied, ManageError>>;
}

impl Shelf for Buses {
    fn names(&self) -> Vec<String> {
        self.names()
    }

    fn find<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn ManagedBus>, BusError>> {
        Box::pin(self.get(name))
    }

    fn takes(&self, bus: &str, topic: &str) -> Result<(), PublishError> {
        self.takes(bus, topic)
    }

    fn not_moved(&self, bus: &str) -> Option<String> {
        self.not_moved(bus)
    }

    fn declares(&self, bus: &str, subscription: &str) -> bool {
        self.declares(bus, subscription)
    }

    fn migrate<'a>(
        &'a self,
        name: &'a str,
        wanted: Migration,
    ) -> BoxFuture<'a, Result<Moved, ManageError>> {
        Box::pin(async move { self.migrate(name, &wanted).await })
    }

    fn backup<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Copied, ManageError>> {
        Box::pin(self.backup(name))
    }
}

/// What the port serves.
#[derive(Clone, Debug)]
pub struct Operate {
    buses: Arc<dyn Shelf>,
    loopback_only: bool,
}

impl Operate {
    /// On top of these buses. With `loopback_only` requests must name a loopback host, too.
    #[must_use]
    pub fn new(buses: Arc<dyn Shelf>, loopback_only: bool) -> Self {
        Self { buses, loopback_only }
    }

    /// The pages.
    pub fn router(self) -> Router {
        let keep_out = guard::layer(self.loopback_only);
        Router::new()
            .route("/v1/buses", get(requests::buses))
            .route("/v1/topics", get(requests::topics))
            .route("/v1/subscriptions", get(requests::subscriptions))
            .route("/v1/events", get(requests::events))
            .route("/v1/publish", post(requests::publish))
            .route("/v1/remove", post(requests::remove))
            .route("/v1/redrive", post(requests::redrive))
            .route("/v1/seek", post(steer::seek))
            .route("/v1/pause", post(steer::pause))
            .route("/v1/forget", post(steer::forget))
            .route("/v1/migrate", post(requests::migrate))
            .route("/v1/backup", get(requests::backup))
            .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
            .layer(axum::middleware::from_fn(whole))
            .layer(axum::middleware::from_fn_with_state(keep_out, guard::check))
            .with_state(self)
    }

    async fn bus(&self, name: &str) -> Result<Arc<dyn ManagedBus>, Failure> {
        self.buses.find(name).await.map_err(|error| {
            let unknown = matches!(error, BusError::Unknown(_));
            let mut failure = Failure::from(error);
            if unknown {
                // Nothing else says which there are.
                failure
                    .message
                    .push_str(&format!("; known are: {}", self.buses.names().join(", ")));
            }
            failure
        })
    }
}

/// Takes a request whole before it is answered, so that nobody holds a connection with half of one.
async fn whole(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let (status, message) =
        match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY_BYTES)).await {
            Ok(Ok(body)) => return next.run(Request::from_parts(head, Body::from(body))).await,
            Ok(Err(error)) => (
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the request broke off, or is larger than {MAX_BODY_BYTES} bytes: {error}"),
            ),
            Err(_late) => {
                (StatusCode::REQUEST_TIMEOUT, "the request did not arrive in time".to_owned())
            }
        };
    Failure { status, message }.into_response()
}

/// Binds the port.
///
/// # Errors
/// When it is taken, or when other machines would reach it and nobody said that they may.
pub async fn bind(address: SocketAddr, anywhere: bool) -> anyhow::Result<TcpListener> {
    if !anywhere && !address.ip().is_loopback() {
        bail!(
            "--operator-listen {address} can be reached from other machines, and whoever reaches it can read and drop \
             every event; use a loopback address, or say --operator-anywhere"
        );
    }
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// What an operator is told instead of an answer: `{"error": "…"}`.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    fn bad(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into() }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = axum::Json(serde_json::json!({ "error": self.message }));
        (self.status, body).into_response()
    }
}

impl From<BusError> for Failure {
    fn from(error: BusError) -> Self {
        let status = match error {
            BusError::Unknown(_) => StatusCode::NOT_FOUND,
            BusError::Open { .. } | BusError::Nats { .. } => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self { status, message: format!("{:#}", anyhow::Error::new(error)) }
    }
}

impl From<ManageError> for Failure {
    fn from(error: ManageError) -> Self {
        let status = match error {
            ManageError::Unknown { .. } => StatusCode::NOT_FOUND,
            ManageError::Refused(_) => StatusCode::CONFLICT,
            ManageError::Away(_) | ManageError::Failed(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self { status, message: error.to_string() }
    }
}

impl From<PublishError> for Failure {
    fn from(error: PublishError) -> Self {
        let status = match error.kind {
            PublishErrorKind::UnknownBus | PublishErrorKind::UnknownTopic => StatusCode::NOT_FOUND,
            PublishErrorKind::Invalid => StatusCode::BAD_REQUEST,
            PublishErrorKind::Denied => StatusCode::FORBIDDEN,
            PublishErrorKind::Full => StatusCode::TOO_MANY_REQUESTS,
            PublishErrorKind::Unavailable | PublishErrorKind::Internal => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        };
        Self { status, message: error.message }
    }
}

#[cfg(test)]
mod tests;
