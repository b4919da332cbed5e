//! Inventory: says what is in stock, and fulfils orders when the event `shop.order.placed` arrives.
//!
//! `GET /stock`, `POST /events/orders` (the sidecar delivers here), `GET /fulfilments?order=ID[,ID…]` or
//! `?limit=N`, `GET /fulfilments/summary`.

mod store;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::journal::Journal;
use crate::model::{self, Delivery, Fulfilment, FulfilmentSummary, MAX_QUANTITY, Stock, now_ms};
use crate::settings::Settings;
use crate::web::{self, Problem, say};
use store::{Delivered, Shelves};

type App = State<Journal<Shelves>>;

/// Runs the service until it is told to stop.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    let app = router(&settings)?;
    web::serve("inventory", ("127.0.0.1", settings.port), app, std::future::pending()).await
}

pub(crate) fn router(settings: &Settings) -> anyhow::Result<Router> {
    Ok(Router::new()
        .route("/stock", get(stock))
        .route("/events/orders", post(deliver))
        .route("/fulfilments", get(fulfilments))
        .route("/fulfilments/summary", get(summary))
        .with_state(Journal::open(&settings.data, "inventory.jsonl")?))
}

async fn read<R: Send + 'static>(
    shelves: &Journal<Shelves>,
    look: impl FnOnce(&Shelves) -> R + Send + 'static,
) -> Result<R, Problem> {
    shelves.read(look).await.map_err(|error| Problem::storage(&error))
}

async fn stock(State(shelves): App) -> Result<Json<Vec<Stock>>, Problem> {
    read(&shelves, Shelves::stock).await.map(Json)
}

async fn summary(State(shelves): App) -> Result<Json<FulfilmentSummary>, Problem> {
    read(&shelves, Shelves::summary).await.map(Json)
}

#[derive(Debug, Deserialize)]
struct Wanted {
    order: Option<String>,
    limit: Option<usize>,
}

async fn fulfilments(
    State(shelves): App,
    Query(wanted): Query<Wanted>,
) -> Result<Json<Vec<Fulfilment>>, Problem> {
    let look = move |shelves: &Shelves| match wanted.order {
        Some(orders) => shelves.of(orders.split(',')),
        None => shelves.newest(wanted.limit.unwrap_or(50)),
    };
    read(&shelves, look).await.map(Json)
}

/// Success is answered only once the delivery is on disk. An event that can never be fulfilled is given back
/// with `DROP`, since trying it again would not help.
async fn deliver(State(shelves): App, body: Bytes) -> Result<Json<Value>, Problem> {
    let order = match order(&body) {
        Ok(order) => order,
        Err(reason) => {
            say("inventory", &format!("drops an event: {reason}"));
            return Ok(Json(json!({"status": "DROP"})));
        }
    };
    shelves.append(order).await.map_err(|error| Problem::storage(&error))?;
    Ok(Json(json!({"status": "SUCCESS"})))
}

fn order(body: &[u8]) -> Result<Delivered, String> {
    let event: Delivery = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let order = event.data;
    if model::product(&order.product).is_none() {
        return Err(format!("{}: there is no product {:?}", event.id, order.product));
    }
    if !(1..=MAX_QUANTITY).contains(&order.quantity) {
        return Err(format!("{}: nobody can order {}", event.id, order.quantity));
    }
    let (product, quantity) = (order.product, order.quantity);
    Ok(Delivered { event: event.id, product, quantity, at_ms: now_ms() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(product: &str, quantity: i64) -> Result<Delivered, String> {
        let body = json!({
            "specversion": "1.0", "id": "o1", "source": "/shop/orders", "type": "shop.order.placed",
            "topic": "orders.placed", "pubsubname": "default", "datacontenttype": "application/json",
            "data": {"order": "o1", "product": product, "quantity": quantity, "total_cents": 1},
        });
        order(body.to_string().as_bytes())
    }

    #[test]
    fn an_order_is_read_from_an_event_with_more_attributes_than_it_needs() {
        let order = event("mug", 2).unwrap();
        assert_eq!((order.event.as_str(), order.quantity), ("o1", 2));
    }

    #[test]
    fn an_event_that_can_never_be_fulfilled_is_refused() {
        for (product, quantity) in [("yacht", 1), ("mug", 0), ("mug", 11), ("mug", -1)] {
            event(product, quantity).unwrap_err();
        }
        order(b"{").unwrap_err();
    }
}
