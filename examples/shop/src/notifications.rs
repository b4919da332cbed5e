//! Notifications: tells customers that their order was placed. It keeps nothing on disk and asks nobody: all
//! that it knows came in events, to which it subscribes by answering `GET /dapr/subscribe` as any Dapr app does.
//!
//! `GET /notifications`, `POST /events/orders` (the sidecar delivers here).

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use serde_json::{Value, json};

use crate::model::{self, Delivery, TOPIC, euros, now_ms};
use crate::settings::Settings;
use crate::web::{self, say};

/// Messages that are shown.
const SHOWN: usize = 20;
/// Event ids that are remembered, so that an event delivered twice is told once.
const REMEMBERED: usize = 10_000;

#[derive(Debug, Clone, Serialize)]
struct Message {
    event: String,
    text: String,
    at_ms: u64,
}

#[derive(Debug, Default)]
struct Board {
    messages: VecDeque<Message>,
    seen: HashSet<String>,
    seen_in_order: VecDeque<String>,
    /// Different events.
    distinct: u64,
    /// Deliveries of any event.
    received: u64,
}

impl Board {
    fn take(&mut self, event: Delivery) {
        self.received += 1;
        if !self.seen.insert(event.id.clone()) {
            return;
        }
        self.distinct += 1;
        self.seen_in_order.push_back(event.id.clone());
        if self.seen_in_order.len() > REMEMBERED
            && let Some(oldest) = self.seen_in_order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        let order = event.data;
        let name =
            model::product(&order.product).map_or(order.product.as_str(), |known| known.name);
        let text = format!(
            "Thank you! {} × {name} for {} is on its way.",
            order.quantity,
            euros(order.total_cents)
        );
        self.messages.push_front(Message { event: event.id, text, at_ms: now_ms() });
        self.messages.truncate(SHOWN);
    }
}

/// Never held across an await: a handler takes it, changes the board, and lets go.
type App = State<Arc<Mutex<Board>>>;

/// Runs the service until it is told to stop.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    web::serve("notifications", ("127.0.0.1", settings.port), router(), std::future::pending())
        .await
}

fn router() -> Router {
    Router::new()
        .route("/dapr/subscribe", get(subscribe))
        .route("/events/orders", post(deliver))
        .route("/notifications", get(notifications))
        .with_state(Arc::default())
}

async fn subscribe() -> Json<Value> {
    Json(json!([
        {"pubsubname": "default", "topic": TOPIC, "routes": {"default": "/events/orders"}},
    ]))
}

async fn deliver(State(board): App, body: Bytes) -> Json<Value> {
    match serde_json::from_slice(&body) {
        Ok(event) => {
            board.lock().unwrap_or_else(PoisonError::into_inner).take(event);
            Json(json!({"status": "SUCCESS"}))
        }
        Err(error) => {
            say("notifications", &format!("drops an event: {error}"));
            Json(json!({"status": "DROP"}))
        }
    }
}

async fn notifications(State(board): App) -> Json<Value> {
    let board = board.lock().unwrap_or_else(PoisonError::into_inner);
    Json(json!({
        "distinct": board.distinct,
        "received": board.received,
        "messages": board.messages,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::OrderPlaced;

    fn event(id: usize) -> Delivery {
        let order = id.to_string();
        let data = OrderPlaced { order, product: "mug".into(), quantity: 2, total_cents: 2900 };
        Delivery { id: id.to_string(), data }
    }

    #[test]
    fn an_event_delivered_twice_is_told_once() {
        let mut board = Board::default();
        for id in [1, 2, 1] {
            board.take(event(id));
        }
        assert_eq!((board.distinct, board.received, board.messages.len()), (2, 3, 2));
        assert_eq!(board.messages[0].text, "Thank you! 2 × Enamel mug for 29.00 € is on its way.");
    }

    #[test]
    fn memory_is_bounded() {
        let mut board = Board::default();
        for id in 0..REMEMBERED + 5 {
            board.take(event(id));
        }
        assert_eq!((board.messages.len(), board.seen.len()), (SHOWN, REMEMBERED));
    }
}
