//! Customers who never tire: a steady number of orders a second through the storefront, whatever happens.
//!
//! `GET /summary`.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use rand::Rng;
use rand::seq::IndexedRandom;
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use uuid::Uuid;

use crate::mesh::Mesh;
use crate::model::{CATALOGUE, NewOrder};
use crate::settings::Settings;
use crate::web::{self, Problem, Trace, say};

/// Orders that may be under way at once. When the shop is slow, customers queue; they do not pile up.
const AT_ONCE: usize = 64;
const REPORT: Duration = Duration::from_secs(10);
/// Fewer than are left on a shelf when it is filled up, so that an order is never refused as sold out.
const QUANTITY: std::ops::RangeInclusive<u32> = 1..=3;

#[derive(Debug, Clone, Default, Serialize)]
struct Counts {
    /// Orders sent, answered or not.
    attempted: u64,
    placed: u64,
    failed: u64,
    last_error: Option<String>,
}

impl Counts {
    fn line(&self, since: &Self) -> String {
        let (placed, failed) = (self.placed - since.placed, self.failed - since.failed);
        let mut line = format!(
            "placed {}, failed {} ({:.2} % succeeded); now {placed} and {failed} in {} s",
            self.placed,
            self.failed,
            percent(self.placed, self.failed),
            REPORT.as_secs()
        );
        if let Some(error) = self.last_error.as_ref().filter(|_| failed > 0) {
            line.push_str(&format!("; last error: {error}"));
        }
        line
    }
}

#[allow(clippy::cast_precision_loss, reason = "a percentage for people")]
fn percent(placed: u64, failed: u64) -> f64 {
    match placed + failed {
        0 => 100.0,
        all => placed as f64 * 100.0 / all as f64,
    }
}

/// Never held across an await: one answer is counted at a time.
type Shared = Arc<Mutex<Counts>>;

fn change(counts: &Shared, change: impl FnOnce(&mut Counts)) {
    change(&mut counts.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Runs the service until it is told to stop.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    let counts = Shared::default();
    let router = Router::new().route("/summary", get(summary)).with_state(Arc::clone(&counts));
    let work = shop(Mesh::new(&settings)?, settings.rate, counts);
    web::serve("shopper", ("127.0.0.1", settings.port), router, work).await
}

async fn summary(State(counts): State<Shared>) -> Json<Counts> {
    Json(counts.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

async fn shop(mesh: Mesh, rate: f64, counts: Shared) -> Infallible {
    let mut under_way = JoinSet::new();
    let mut reported = Counts::default();
    let mut report = interval(REPORT);
    report.tick().await;
    // No rate is a day off: a tick that is a year away.
    let pause = if rate > 0.0 { rate.recip().min(31_536_000.0) } else { 31_536_000.0 };
    let mut orders = interval(Duration::from_secs_f64(pause));
    orders.set_missed_tick_behavior(MissedTickBehavior::Delay);
    if rate <= 0.0 {
        orders.tick().await;
    }
    loop {
        tokio::select! {
            _ = orders.tick(), if under_way.len() < AT_ONCE => {
                under_way.spawn(order(mesh.clone(), Arc::clone(&counts)));
            }
            Some(_) = under_way.join_next() => {}
            _ = report.tick() => {
                let now = counts.lock().unwrap_or_else(PoisonError::into_inner).clone();
                say("shopper", &now.line(&reported));
                reported = now;
            }
        }
    }
}

async fn order(mesh: Mesh, counts: Shared) {
    let wanted = NewOrder {
        product: CATALOGUE
            .choose(&mut rand::rng())
            .map(|product| product.id)
            .unwrap_or_default()
            .to_owned(),
        quantity: rand::rng().random_range(QUANTITY),
    };
    change(&counts, |counts| counts.attempted += 1);
    let url = format!("{}/api/orders", mesh.urls.storefront);
    let key = Uuid::new_v4().to_string();
    let placed: Result<Value, Problem> =
        mesh.post("storefront", &url, &wanted, (&key, &Trace::default())).await;
    change(&counts, |counts| match placed {
        Ok(_) => counts.placed += 1,
        Err(problem) => {
            counts.failed += 1;
            counts.last_error = Some(problem.detail);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_happened_and_why() {
        let before = Counts { attempted: 10, placed: 10, ..Counts::default() };
        let last_error = Some("payments: no".to_owned());
        let now = Counts { attempted: 20, placed: 18, failed: 2, last_error };
        assert_eq!(
            now.line(&before),
            "placed 18, failed 2 (90.00 % succeeded); now 8 and 2 in 10 s; last error: payments: no"
        );
        assert!(
            Counts::default().line(&Counts::default()).starts_with("placed 0, failed 0 (100.00 %")
        );
    }
}
