//! What the services say to each other: products, orders and the event. Imports nothing of the shop.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Topic on which a placed order is announced.
pub(crate) const TOPIC: &str = "orders.placed";
/// The most of one product that one order may take.
pub(crate) const MAX_QUANTITY: u32 = 10;

/// Something the shop sells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub(crate) id: &'static str,
    pub(crate) name: &'static str,
    pub(crate) price_cents: u64,
}

/// All that the shop sells.
pub(crate) const CATALOGUE: [Product; 6] = [
    Product { id: "teapot", name: "Stoneware teapot", price_cents: 4_900 },
    Product { id: "mug", name: "Enamel mug", price_cents: 1_450 },
    Product { id: "lamp", name: "Reading lamp", price_cents: 7_900 },
    Product { id: "notebook", name: "Linen notebook", price_cents: 1_200 },
    Product { id: "plant", name: "Potted fern", price_cents: 2_300 },
    Product { id: "clock", name: "Wall clock", price_cents: 5_600 },
];

/// The product of that id.
pub(crate) fn product(id: &str) -> Option<&'static Product> {
    CATALOGUE.iter().find(|product| product.id == id)
}

/// What a customer asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NewOrder {
    pub(crate) product: String,
    pub(crate) quantity: u32,
}

/// One line of the inventory's answer to `GET /stock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stock {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) price_cents: u64,
    pub(crate) stock: u64,
}

/// Data of the event `shop.order.placed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OrderPlaced {
    pub(crate) order: String,
    pub(crate) product: String,
    pub(crate) quantity: u32,
    pub(crate) total_cents: u64,
}

/// What `POST /charge` takes; the `Idempotency-Key` header says which charge it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Charge {
    pub(crate) order: String,
    pub(crate) amount_cents: u64,
}

/// One line of the inventory's answer to `GET /fulfilments`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fulfilment {
    pub(crate) order: String,
    /// How often the event was delivered. The order is fulfilled once whatever this says.
    pub(crate) deliveries: u64,
    pub(crate) at_ms: u64,
}

/// The inventory's answer to `GET /fulfilments/summary`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FulfilmentSummary {
    pub(crate) fulfilled: u64,
    /// Deliveries beyond the first of each event; they changed nothing.
    pub(crate) duplicates: u64,
}

/// An event as the sidecar delivers it: CloudEvents JSON with its data. Attributes that the shop does not use
/// are ignored.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Delivery {
    pub(crate) id: String,
    pub(crate) data: OrderPlaced,
}

/// Milliseconds since 1970, for people to look at. Nothing is decided by comparing clocks of two machines
/// except how long an unfinished order may rest.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// `4900` as `49.00 €`.
pub(crate) fn euros(cents: u64) -> String {
    format!("{}.{:02} €", cents / 100, cents % 100)
}
