//! Payments: charges an order once, however often it is asked to. On purpose it is a bad neighbour: a share of
//! the attempts fails with 503 before anything is charged, and a share is slow.
//!
//! `POST /charge` (`Idempotency-Key` needed), `GET /charges/summary`.

mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use rand::Rng;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::journal::Journal;
use crate::model::{Charge, now_ms};
use crate::settings::Settings;
use crate::web::{self, Problem, idempotency_key};
use store::{Ledger, Receipt};

/// How long a slow attempt takes.
const SLOW_MS: std::ops::RangeInclusive<u64> = 300..=800;

#[derive(Debug)]
struct App {
    ledger: Journal<Ledger>,
    fail_percent: f64,
    slow_percent: f64,
    /// Since this process started, unlike the charges.
    attempts: AtomicU64,
    failed_on_purpose: AtomicU64,
}

/// Runs the service until it is told to stop.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    let app = router(&settings)?;
    web::serve("payments", ("127.0.0.1", settings.port), app, std::future::pending()).await
}

pub(crate) fn router(settings: &Settings) -> anyhow::Result<Router> {
    let app = App {
        ledger: Journal::open(&settings.data, "payments.jsonl")?,
        fail_percent: settings.fail_percent,
        slow_percent: settings.slow_percent,
        attempts: AtomicU64::new(0),
        failed_on_purpose: AtomicU64::new(0),
    };
    Ok(Router::new()
        .route("/charge", post(charge))
        .route("/charges/summary", get(summary))
        .with_state(Arc::new(app)))
}

async fn charge(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Json(asked): Json<Charge>,
) -> Result<Json<Receipt>, Problem> {
    app.attempts.fetch_add(1, Ordering::Relaxed);
    let key = idempotency_key(&headers)?.ok_or_else(|| {
        let text = "a charge needs an Idempotency-Key, so that asking again is no second charge";
        Problem::new(StatusCode::BAD_REQUEST, text)
    })?;
    if let Some(receipt) = known(&app, &key).await? {
        return same(&asked, receipt);
    }
    misbehave(&app).await?;
    let receipt = Receipt {
        key: key.clone(),
        charge: Uuid::new_v4().to_string(),
        order: asked.order.clone(),
        amount_cents: asked.amount_cents,
        at_ms: now_ms(),
    };
    app.ledger.append(receipt).await.map_err(|error| Problem::storage(&error))?;
    // Another attempt with the same key may have come first: then its charge is the one that counts.
    let first = known(&app, &key).await?;
    same(&asked, first.ok_or_else(|| Problem::storage(&anyhow::anyhow!("a charge was lost")))?)
}

async fn known(app: &App, key: &str) -> Result<Option<Receipt>, Problem> {
    let key = key.to_owned();
    let receipt = app.ledger.read(move |ledger| ledger.receipt(&key)).await;
    receipt.map_err(|error| Problem::storage(&error))
}

fn same(asked: &Charge, receipt: Receipt) -> Result<Json<Receipt>, Problem> {
    if asked.order == receipt.order && asked.amount_cents == receipt.amount_cents {
        return Ok(Json(receipt));
    }
    let text = "this Idempotency-Key was used for another charge";
    Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, text))
}

async fn misbehave(app: &App) -> Result<(), Problem> {
    let chance = || rand::rng().random_range(0.0..100.0);
    if chance() < app.slow_percent {
        let slow = rand::rng().random_range(SLOW_MS);
        tokio::time::sleep(Duration::from_millis(slow)).await;
    }
    if chance() < app.fail_percent {
        app.failed_on_purpose.fetch_add(1, Ordering::Relaxed);
        let text = "payments: the bank did not answer (this shop fails on purpose)";
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, text));
    }
    Ok(())
}

async fn summary(State(app): State<Arc<App>>) -> Result<Json<Value>, Problem> {
    let sums = app.ledger.read(|ledger| (ledger.charges(), ledger.amount_cents)).await;
    let (charges, amount_cents) = sums.map_err(|error| Problem::storage(&error))?;
    Ok(Json(json!({
        "charges": charges,
        "amount_cents": amount_cents,
        "attempts": app.attempts.load(Ordering::Relaxed),
        "failed_on_purpose": app.failed_on_purpose.load(Ordering::Relaxed),
    })))
}
