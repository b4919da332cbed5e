//! The shop of `examples/shop`, whole: traffic, failures on purpose, processes killed, every order accounted for.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::collections::BTreeSet;
use std::time::Duration;

use duet_tests::up::Up;
use duet_tests::{SOON, eventually, metrics, process, tools};
use rustix::process::Signal;
use serde_json::Value;

/// Orders are finished by a sweep some 45 s after their service died in the middle of them.
const SETTLED: Duration = Duration::from_secs(150);

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a number"))
}

fn pid(value: &Value) -> u32 {
    u32::try_from(number(value)).unwrap()
}

/// Waits until the shopper has placed `more` further orders.
async fn more_orders(up: &Up, more: u64) {
    let before = number(&up.json("shopper-1", "/summary").await["placed"]);
    eventually("orders are placed", SOON, || async {
        let placed = number(&up.json("shopper-1", "/summary").await["placed"]);
        (placed >= before + more).then_some(())
    })
    .await;
}

/// Waits until a process has another id.
async fn restarted(up: &Up, of: impl Fn() -> u32, former: u32) {
    eventually("the process is started again", SOON, || async {
        let now = of();
        (now != former && now != 0).then_some(())
    })
    .await;
    more_orders(up, 10).await;
}

/// The page in a real browser: what it shows comes from four services, by calls and by events.
async fn look_at_the_page(up: &Up) {
    let Some(chromium) = tools::find("chromium") else { return };
    let profile = tempfile::tempdir().unwrap();
    let output = tokio::process::Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--virtual-time-budget=8000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(up.url("storefront-1"))
        .output();
    let output = tokio::time::timeout(Duration::from_secs(60), output).await.unwrap().unwrap();
    let page = String::from_utf8_lossy(&output.stdout);
    assert!(page.contains("Enamel mug") && page.contains("in stock"), "{page}");
    assert!(page.contains("fulfilled"), "{page}");
}

async fn kill_in_turn(up: &Up) {
    let payments = || pid(&up.replica("payments-1")["app"]["pid"]);
    let former = payments();
    process::send(former, Signal::KILL);
    restarted(up, payments, former).await;

    let sidecar = || pid(&up.replica("inventory-1")["sidecar"]["pid"]);
    let former = sidecar();
    process::send(former, Signal::KILL);
    restarted(up, sidecar, former).await;

    let control_plane = || pid(&up.state()["control_plane"]["pid"]);
    let former = control_plane();
    process::send(former, Signal::KILL);
    restarted(up, control_plane, former).await;
}

/// Ids of all orders that were acknowledged.
async fn placed(up: &Up) -> BTreeSet<String> {
    let orders = up.json("orders-1", "/orders?limit=1000").await;
    let placed = orders
        .as_array()
        .unwrap()
        .iter()
        .filter(|order| matches!(order["state"].as_str(), Some("placed" | "fulfilled")));
    placed.map(|order| order["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn orders_survive_failures_and_kills_and_each_is_fulfilled_exactly_once() {
    let mut up = Up::shop(|yaml| yaml.replace("RATE: \"2\"", "RATE: \"10\"")).await;
    more_orders(&up, 250).await;

    let before = up.json("shopper-1", "/summary").await;
    assert_eq!(number(&before["failed"]), 0, "payments' failures reached a customer: {before}");
    let charges = up.json("payments-1", "/charges/summary").await;
    assert!(number(&charges["failed_on_purpose"]) > 0, "{charges}");
    let mut retries = 0.0;
    for instance in ["orders-1", "orders-2"] {
        let address = up.replica(instance)["sidecar"]["metrics"].as_str().unwrap().parse().unwrap();
        let labels = [("service", "shop/payments:80"), ("outcome", "sent")];
        retries += metrics::sum(address, "duet_retries_total", &labels).await;
    }
    assert!(retries > 0.0, "the metrics show no retry");

    look_at_the_page(&up).await;
    kill_in_turn(&up).await;

    let shopper = pid(&up.replica("shopper-1")["app"]["pid"]);
    process::send(shopper, Signal::STOP);
    let last = std::sync::Mutex::new(String::new());
    eventually("every order is placed, charged and fulfilled", SETTLED, || async {
        let orders = up.json("orders-1", "/orders/summary").await;
        let fulfilled = up.json("inventory-1", "/fulfilments/summary").await;
        let charges = up.json("payments-1", "/charges/summary").await;
        let counts = format!("orders {orders}, inventory {fulfilled}, payments {charges}");
        if *last.lock().unwrap() != counts {
            eprintln!("{counts}");
            *last.lock().unwrap() = counts;
        }
        // Each counts every order that ever came so far.
        let done = number(&orders["placed"]);
        let open = number(&orders["received"]) - number(&orders["failed"]) - done;
        let all = [number(&fulfilled["fulfilled"]), number(&charges["charges"])];
        (open == 0 && all == [done, done]).then_some(())
    })
    .await;

    let placed = placed(&up).await;
    let fulfilments = up.json("inventory-2", "/fulfilments?limit=1000").await;
    let fulfilled: Vec<String> = fulfilments
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["order"].as_str().unwrap().to_owned())
        .collect();
    let once: BTreeSet<String> = fulfilled.iter().cloned().collect();
    let lost: Vec<&String> = placed.difference(&once).collect();
    assert!(lost.is_empty(), "orders acknowledged and never fulfilled: {lost:?}");
    assert_eq!(fulfilled.len(), once.len(), "an order was fulfilled twice");

    process::send(shopper, Signal::CONT);
    more_orders(&up, 20).await;
    let after = up.json("shopper-1", "/summary").await;
    eprintln!(
        "{} orders placed, {} failed, {retries} retries before the kills; nothing lost",
        after["placed"], after["failed"]
    );
    assert_eq!(up.stop(), Some(0));
}
