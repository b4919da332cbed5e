//! Storefront: the page, and the few routes that its script calls. It keeps nothing: what it shows it asks of orders
//! and inventory, and what they refuse it says in their words.
//!
//! `GET /`, `GET /api/stock`, `GET /api/orders`, `POST /api/orders`, `GET /api/summary`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::mesh::Mesh;
use crate::model::{FulfilmentSummary, NewOrder};
use crate::settings::Settings;
use crate::web::{self, Problem, Trace, idempotency_key};

#[derive(Debug)]
struct App {
    mesh: Mesh,
    /// Orders that a customer was told did not work, through no fault of the customer's, since this process started.
    failed: AtomicU64,
}

/// Runs the service until it is told to stop.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    let app = App { mesh: Mesh::new(&settings)?, failed: AtomicU64::new(0) };
    let router = router(Arc::new(app));
    let address = (settings.host.as_str(), settings.port);
    web::serve("storefront", address, router, std::future::pending()).await
}

fn router(app: Arc<App>) -> Router {
    let html = "text/html; charset=utf-8";
    let css = "text/css; charset=utf-8";
    let script = "text/javascript; charset=utf-8";
    Router::new()
        .route("/", get(|| async { file(html, include_str!("storefront/page.html")) }))
        .route("/page.css", get(|| async { file(css, include_str!("storefront/page.css")) }))
        .route("/page.js", get(|| async { file(script, include_str!("storefront/page.js")) }))
        .route("/api/stock", get(stock))
        .route("/api/orders", get(orders).post(order))
        .route("/api/summary", get(summary))
        .with_state(app)
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let own = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:";
    let headers =
        [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache"), (CONTENT_SECURITY_POLICY, own)];
    (headers, text)
}

async fn stock(State(app): State<Arc<App>>, trace: Trace) -> Result<Json<Value>, Problem> {
    let url = format!("{}/stock", app.mesh.urls.inventory);
    app.mesh.get("inventory", &url, &trace).await.map(Json)
}

async fn orders(State(app): State<Arc<App>>, trace: Trace) -> Result<Json<Value>, Problem> {
    let url = format!("{}/orders?limit=10", app.mesh.urls.orders);
    app.mesh.get("orders", &url, &trace).await.map(Json)
}

async fn order(
    State(app): State<Arc<App>>,
    trace: Trace,
    headers: HeaderMap,
    Json(wanted): Json<NewOrder>,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let key = idempotency_key(&headers)?.unwrap_or_else(|| Uuid::new_v4().to_string());
    let url = format!("{}/orders", app.mesh.urls.orders);
    match app.mesh.post("orders", &url, &wanted, (&key, &trace)).await {
        Ok(placed) => Ok((StatusCode::CREATED, Json(placed))),
        Err(problem) => {
            app.failed.fetch_add(u64::from(problem.status.is_server_error()), Ordering::Relaxed);
            Err(problem)
        }
    }
}

/// A service that does not answer leaves its number out, with the reason in `problems`; the others are shown.
async fn summary(State(app): State<Arc<App>>, trace: Trace) -> Json<Value> {
    let urls = &app.mesh.urls;
    let orders = format!("{}/orders/summary", urls.orders);
    let fulfilments = format!("{}/fulfilments/summary", urls.inventory);
    let (orders, fulfilments) = tokio::join!(
        app.mesh.get::<Value>("orders", &orders, &trace),
        app.mesh.get::<FulfilmentSummary>("inventory", &fulfilments, &trace)
    );
    let problems = [orders.as_ref().err(), fulfilments.as_ref().err()];
    let problems: Vec<&str> = problems.iter().flatten().map(|p| p.detail.as_str()).collect();
    Json(json!({
        "placed": orders.as_ref().ok().and_then(|summary| summary.get("placed")),
        "fulfilled": fulfilments.as_ref().ok().map(|summary| summary.fulfilled),
        "failed": app.failed.load(Ordering::Relaxed),
        "problems": problems,
    }))
}
