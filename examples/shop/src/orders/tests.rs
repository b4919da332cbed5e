//! The life of an order with real inventory and payments behind it and a sidecar that can be told to fail.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use serde_json::json;
use tokio::net::TcpListener;

use super::*;
use crate::journal::tests::Folder;
use crate::settings::Urls;
use crate::{inventory, payments};

/// What the sidecar was given: event id -> how often; whether it refuses; where it delivers.
#[derive(Debug, Default)]
struct Sidecar {
    deliver_to: String,
    published: Mutex<HashMap<String, u32>>,
    refuses: AtomicBool,
}

struct Shop {
    folder: Folder,
    settings: Settings,
    sidecar: Arc<Sidecar>,
}

async fn serve(router: Router) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(axum::serve(listener, router).into_future());
    port
}

async fn publish(
    State(sidecar): State<Arc<Sidecar>>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    if sidecar.refuses.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    let id = headers["ce-id"].to_str().unwrap().to_owned();
    assert_eq!(headers["ce-type"], "shop.order.placed");
    assert_eq!(headers["ce-source"], "/shop/orders");
    let data: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(headers["ce-partitionkey"], data["product"].as_str().unwrap());
    *sidecar.published.lock().unwrap().entry(id.clone()).or_default() += 1;
    let delivery = json!({"specversion": "1.0", "id": id, "data": data}).to_string();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request =
        client.post(&sidecar.deliver_to).header(CONTENT_TYPE, "application/cloudevents+json");
    assert!(request.body(delivery).send().await.unwrap().status().is_success());
    StatusCode::NO_CONTENT
}

impl Shop {
    async fn open(fail_percent: f64) -> Self {
        let folder = Folder::new();
        let urls = Urls {
            storefront: String::new(),
            orders: String::new(),
            inventory: String::new(),
            payments: String::new(),
        };
        let mut settings = Settings {
            port: 0,
            host: "127.0.0.1".into(),
            data: folder.0.clone(),
            sidecar_port: 0,
            rate: 0.0,
            fail_percent,
            slow_percent: 0.0,
            urls,
        };
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        settings.urls.inventory = url(serve(inventory::router(&settings).unwrap()).await);
        settings.urls.payments = url(serve(payments::router(&settings).unwrap()).await);
        let deliver_to = format!("{}/events/orders", settings.urls.inventory);
        let sidecar = Arc::new(Sidecar { deliver_to, ..Sidecar::default() });
        let publisher = Router::new()
            .route("/v1.0/publish/default/orders.placed", post(publish))
            .with_state(Arc::clone(&sidecar));
        settings.sidecar_port = serve(publisher).await;
        Self { folder, settings, sidecar }
    }

    /// One more replica of orders on the same data.
    fn replica(&self) -> Arc<App> {
        app(&self.settings, Mesh::direct(&self.settings)).unwrap()
    }

    async fn get(&self, base: &str, path: &str) -> Value {
        let mesh = Mesh::direct(&self.settings);
        mesh.get("shop", &format!("{base}{path}"), &Trace::default()).await.unwrap()
    }

    /// What must hold in the end for each order that was placed: charged once, fulfilled once.
    async fn assert_placed(&self, orders: u64) {
        let summary = self.replica().book.read(Book::summary).await.unwrap();
        assert_eq!((summary.placed, summary.failed), (orders, 0), "{summary:?}");
        let charges = self.get(&self.settings.urls.payments, "/charges/summary").await;
        assert_eq!(charges["charges"], orders);
        let fulfilled = self.get(&self.settings.urls.inventory, "/fulfilments/summary").await;
        assert_eq!(fulfilled["fulfilled"], orders);
    }
}

async fn order(app: &Arc<App>, id: &str, quantity: u32) -> Result<Record, Problem> {
    let mut headers = HeaderMap::new();
    headers.insert("idempotency-key", id.parse().unwrap());
    let asked = NewOrder { product: "mug".into(), quantity };
    let placed = place(State(Arc::clone(app)), Trace::default(), headers, Json(asked)).await;
    placed.map(|(status, Json(record))| {
        assert_eq!(status, StatusCode::CREATED);
        record
    })
}

#[tokio::test]
async fn the_same_key_is_the_same_order_on_every_replica() {
    let shop = Shop::open(0.0).await;
    let (one, two) = (shop.replica(), shop.replica());
    let first = order(&one, "a", 2).await.unwrap();
    assert_eq!((first.step, first.order.total_cents), (Step::Placed, 2900));
    assert_eq!(order(&two, "a", 2).await.unwrap(), order(&one, "a", 2).await.unwrap());
    assert_eq!(shop.sidecar.published.lock().unwrap()["a"], 1);
    shop.assert_placed(1).await;
    let listed = list(State(two), Trace::default(), Query(Page { limit: None })).await.unwrap().0;
    assert_eq!(listed[0]["state"], "fulfilled");
    assert_eq!(listed[0]["product"], "mug");
}

#[tokio::test]
async fn two_replicas_that_place_the_same_order_at_once_place_one() {
    let shop = Shop::open(0.0).await;
    let (one, two) = (shop.replica(), shop.replica());
    for id in ["a", "b", "c"] {
        let (first, second) = tokio::join!(order(&one, id, 1), order(&two, id, 1));
        assert_eq!(first.unwrap().order, second.unwrap().order);
    }
    shop.assert_placed(3).await;
}

#[tokio::test]
async fn a_key_cannot_be_used_for_another_order() {
    let shop = Shop::open(0.0).await;
    order(&shop.replica(), "a", 1).await.unwrap();
    let problem = order(&shop.replica(), "a", 2).await.unwrap_err();
    assert_eq!(problem.status, StatusCode::UNPROCESSABLE_ENTITY);
    shop.assert_placed(1).await;
}

#[tokio::test]
async fn what_cannot_be_sold_is_refused_and_not_written_down() {
    let shop = Shop::open(0.0).await;
    for (quantity, status) in [(0, 400), (11, 400)] {
        assert_eq!(order(&shop.replica(), "a", quantity).await.unwrap_err().status, status);
    }
    let asked = Json(NewOrder { product: "yacht".into(), quantity: 1 });
    let headers = HeaderMap::new();
    let refused = place(State(shop.replica()), Trace::default(), headers, asked).await;
    assert_eq!(refused.unwrap_err().status, StatusCode::NOT_FOUND);
    shop.assert_placed(0).await;
}

#[tokio::test]
async fn a_failed_payment_is_told_and_can_be_tried_again() {
    let mut shop = Shop::open(100.0).await;
    let problem = order(&shop.replica(), "a", 1).await.unwrap_err();
    assert_eq!(problem.status, StatusCode::BAD_GATEWAY);
    assert!(problem.detail.starts_with("payments: the bank"), "{}", problem.detail);
    assert!(shop.sidecar.published.lock().unwrap().is_empty());
    let summary = shop.replica().book.read(Book::summary).await.unwrap();
    assert_eq!((summary.received, summary.failed), (1, 1));

    shop.settings.fail_percent = 0.0;
    let payments = serve(payments::router(&shop.settings).unwrap()).await;
    shop.settings.urls.payments = format!("http://127.0.0.1:{payments}");
    order(&shop.replica(), "a", 1).await.unwrap();
    shop.assert_placed(1).await;
}

#[tokio::test]
async fn no_order_is_confirmed_before_its_event_is_durable() {
    let shop = Shop::open(0.0).await;
    shop.sidecar.refuses.store(true, Ordering::SeqCst);
    let app = shop.replica();
    assert_eq!(order(&app, "a", 1).await.unwrap_err().status, StatusCode::BAD_GATEWAY);
    assert_eq!(find(&app, "a").await.unwrap().unwrap().step, Step::Paid);

    // Nobody asks again: it was paid, so it is placed as soon as that is possible.
    shop.sidecar.refuses.store(false, Ordering::SeqCst);
    finish_those_before(&app, u64::MAX).await;
    shop.assert_placed(1).await;
}

/// A replica dies after each of its steps, before and after the line is written; the same key goes to another.
#[tokio::test]
async fn an_order_survives_the_death_of_a_replica_at_any_step() {
    let shop = Shop::open(0.0).await;
    let trace = Trace::default();
    for (died, id) in ["received", "charged", "paid", "published"].into_iter().enumerate() {
        let dies = shop.replica();
        let asked = NewOrder { product: "mug".into(), quantity: 1 };
        let record = receive(&dies, id.into(), asked, &trace).await.unwrap();
        if died >= 1 {
            charge(&dies, &record.order, &trace).await.unwrap();
        }
        if died >= 2 {
            let line = Line::Reached { id: id.into(), step: Step::Paid, at_ms: now_ms() };
            write(&dies, line).await.unwrap();
        }
        if died >= 3 {
            announce(&dies, &record.order, &trace).await.unwrap();
        }
        drop(dies);
        // Half of the customers ask again, for the others the sweep of another replica does.
        if died % 2 == 0 {
            order(&shop.replica(), id, 1).await.unwrap();
        } else {
            finish_those_before(&shop.replica(), u64::MAX).await;
        }
    }
    shop.assert_placed(4).await;
    let published = shop.sidecar.published.lock().unwrap().clone();
    assert_eq!(published["published"], 2, "published again with the same id, fulfilled once");
    assert!(shop.folder.0.join("orders.jsonl").exists());
}
