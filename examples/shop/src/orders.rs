//! Orders: takes an order, checks the stock, has it paid, announces it.
//!
//! `POST /orders` (with an `Idempotency-Key`, which becomes the order's id), `GET /orders?limit=N`,
//! `GET /orders/summary`.
//!
//! # The life of an order
//!
//! 1. look at the stock, then write the order down (`received`);
//! 2. `POST http://payments/charge` with the order's id as idempotency key, write `paid`;
//! 3. publish `shop.order.placed` with the order's id as event id, write `placed`;
//! 4. answer 201.
//!
//! A replica may die between any two of these. Whoever sends the same key again, to whichever replica, has the
//! order go on from the last line that was written; a step that was done but not written is done again, which
//! payments (by key), the topic and the inventory (by event id) each take for the same one. If nobody asks
//! again, [`finish_abandoned`] does. So an order that was paid is always placed, and 201 is only ever answered for
//! one whose event is durable.

mod store;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use crate::journal::Journal;
use crate::mesh::{Event, Mesh};
use crate::model::{Charge, Fulfilment, MAX_QUANTITY, NewOrder, OrderPlaced, Stock, TOPIC, now_ms};
use crate::settings::Settings;
use crate::web::{self, Problem, Trace, idempotency_key, say};
use store::{Book, Line, Order, Record, Step, Summary};

/// How often to look for abandoned orders.
const SWEEP: Duration = Duration::from_secs(5);
/// Longer than any one step that may still be under way: see the timeouts in [`crate::mesh`].
const ABANDONED_AFTER_MS: u64 = 45_000;
/// How many orders are listed at most, and how many fulfilments are asked for in one URL.
const LIMIT: usize = 1000;
const ASK_AT_ONCE: usize = 50;

#[derive(Debug)]
struct App {
    book: Journal<Book>,
    mesh: Mesh,
}

/// Runs the service until it is told to stop.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    let app = app(&settings, Mesh::new(&settings)?)?;
    let sweep = finish_abandoned(Arc::clone(&app));
    web::serve("orders", ("127.0.0.1", settings.port), router(app), sweep).await
}

fn app(settings: &Settings, mesh: Mesh) -> anyhow::Result<Arc<App>> {
    Ok(Arc::new(App { book: Journal::open(&settings.data, "orders.jsonl")?, mesh }))
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/orders", post(place).get(list))
        .route("/orders/summary", get(summary))
        .with_state(app)
}

async fn place(
    State(app): State<Arc<App>>,
    trace: Trace,
    headers: HeaderMap,
    Json(asked): Json<NewOrder>,
) -> Result<(StatusCode, Json<Record>), Problem> {
    // Who sends no key cannot ask again, so any fresh one will do.
    let id = idempotency_key(&headers)?.unwrap_or_else(|| Uuid::new_v4().to_string());
    let record = match find(&app, &id).await? {
        Some(record) => record,
        None => receive(&app, id, asked.clone(), &trace).await?,
    };
    if record.order.asked != asked {
        let text = "orders: this Idempotency-Key was used for another order";
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, text));
    }
    let record = bring_to_end(&app, record, &trace).await?;
    Ok((StatusCode::CREATED, Json(record)))
}

async fn find(app: &App, id: &str) -> Result<Option<Record>, Problem> {
    let id = id.to_owned();
    app.book.read(move |book| book.find(&id)).await.map_err(|error| Problem::storage(&error))
}

async fn write(app: &App, line: Line) -> Result<(), Problem> {
    app.book.append(line).await.map_err(|error| Problem::storage(&error))
}

/// Step 1. Two replicas may do this at once for the same id: the order that came first is the one returned.
async fn receive(app: &App, id: String, asked: NewOrder, trace: &Trace) -> Result<Record, Problem> {
    if !(1..=MAX_QUANTITY).contains(&asked.quantity) {
        let text = format!("orders: the quantity must be 1 to {MAX_QUANTITY}");
        return Err(Problem::new(StatusCode::BAD_REQUEST, text));
    }
    let url = format!("{}/stock", app.mesh.urls.inventory);
    let stock: Vec<Stock> = app.mesh.get("inventory", &url, trace).await.map_err(dependency)?;
    let Some(line) = stock.into_iter().find(|line| line.id == asked.product) else {
        let text = format!("orders: there is no product {:?}", asked.product);
        return Err(Problem::new(StatusCode::NOT_FOUND, text));
    };
    if line.stock < u64::from(asked.quantity) {
        let text = format!("orders: sold out: {} left of {}", line.stock, line.name);
        return Err(Problem::new(StatusCode::CONFLICT, text));
    }
    let total_cents = line.price_cents.saturating_mul(u64::from(asked.quantity));
    let order = Order { id: id.clone(), asked, total_cents, at_ms: now_ms() };
    write(app, Line::Received(order)).await?;
    let lost = || Problem::storage(&anyhow::anyhow!("order {id} was lost"));
    find(app, &id).await?.ok_or_else(lost)
}

/// Steps 2 and 3, from wherever the order stands.
async fn bring_to_end(app: &App, mut record: Record, trace: &Trace) -> Result<Record, Problem> {
    while record.step < Step::Placed {
        let (done, next) = if record.step == Step::Received {
            (charge(app, &record.order, trace).await, Step::Paid)
        } else {
            (announce(app, &record.order, trace).await, Step::Placed)
        };
        let id = record.order.id.clone();
        if let Err(problem) = done {
            let line = Line::Failed { id, problem: problem.detail.clone(), at_ms: now_ms() };
            write(app, line).await?;
            return Err(dependency(problem));
        }
        write(app, Line::Reached { id, step: next, at_ms: now_ms() }).await?;
        record.step = next;
        record.problem = None;
    }
    Ok(record)
}

async fn charge(app: &App, order: &Order, trace: &Trace) -> Result<(), Problem> {
    let url = format!("{}/charge", app.mesh.urls.payments);
    let charge = Charge { order: order.id.clone(), amount_cents: order.total_cents };
    let receipt: Result<Value, Problem> =
        app.mesh.post("payments", &url, &charge, (&order.id, trace)).await;
    receipt.map(drop)
}

async fn announce(app: &App, order: &Order, trace: &Trace) -> Result<(), Problem> {
    let data = OrderPlaced {
        order: order.id.clone(),
        product: order.asked.product.clone(),
        quantity: order.asked.quantity,
        total_cents: order.total_cents,
    };
    let event = Event {
        id: &order.id,
        source: "/shop/orders",
        kind: "shop.order.placed",
        partition_key: &order.asked.product,
        data: &data,
    };
    app.mesh.publish(TOPIC, &event, trace).await
}

/// What went wrong behind this service is a bad gateway to the one before it: it is not asked to try again with a
/// status that invites retries, since the mesh has tried already, at the hop that failed.
fn dependency(problem: Problem) -> Problem {
    Problem { status: StatusCode::BAD_GATEWAY, ..problem }
}

/// Brings orders to their end that were left in the middle by a replica that died.
async fn finish_abandoned(app: Arc<App>) -> Infallible {
    loop {
        tokio::time::sleep(SWEEP).await;
        finish_those_before(&app, now_ms().saturating_sub(ABANDONED_AFTER_MS)).await;
    }
}

async fn finish_those_before(app: &App, before_ms: u64) {
    let abandoned = match app.book.read(move |book| book.abandoned(before_ms)).await {
        Ok(abandoned) => abandoned,
        Err(error) => {
            return say("orders", &format!("cannot look for abandoned orders: {error:#}"));
        }
    };
    for record in abandoned {
        let id = record.order.id.clone();
        match bring_to_end(app, record, &Trace::default()).await {
            Ok(_) => say("orders", &format!("finished {id}, which was left in the middle")),
            Err(problem) => say("orders", &format!("cannot finish {id} yet: {}", problem.detail)),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Page {
    limit: Option<usize>,
}

async fn list(
    State(app): State<Arc<App>>,
    trace: Trace,
    Query(page): Query<Page>,
) -> Result<Json<Vec<Value>>, Problem> {
    let limit = page.limit.unwrap_or(50).min(LIMIT);
    let records = app.book.read(move |book| book.newest(limit)).await;
    let records = records.map_err(|error| Problem::storage(&error))?;
    let fulfilled = fulfilled(&app, &records, &trace).await;
    let shown = |record: &Record| {
        let mut shown = serde_json::to_value(record).unwrap_or_default();
        if let Some(fields) = shown.as_object_mut()
            && fulfilled.contains(&record.order.id)
        {
            fields.insert("state".into(), "fulfilled".into());
        }
        shown
    };
    Ok(Json(records.iter().map(shown).collect()))
}

/// Which of these the inventory has fulfilled. If it cannot be asked, the list is still worth showing: its
/// orders then stay at `placed` for as long.
async fn fulfilled(app: &App, records: &[Record], trace: &Trace) -> HashSet<String> {
    let mut fulfilled = HashSet::new();
    for some in records.chunks(ASK_AT_ONCE) {
        let ids: Vec<&str> = some.iter().map(|record| record.order.id.as_str()).collect();
        let url = format!("{}/fulfilments?order={}", app.mesh.urls.inventory, ids.join(","));
        match app.mesh.get::<Vec<Fulfilment>>("inventory", &url, trace).await {
            Ok(known) => fulfilled.extend(known.into_iter().map(|known| known.order)),
            Err(problem) => {
                say("orders", &format!("cannot ask what is fulfilled: {}", problem.detail));
                break;
            }
        }
    }
    fulfilled
}

async fn summary(State(app): State<Arc<App>>) -> Result<Json<Summary>, Problem> {
    let summary = app.book.read(Book::summary).await;
    summary.map(Json).map_err(|error| Problem::storage(&error))
}
