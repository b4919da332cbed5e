//! The shop: six small services that call each other over HTTP and exchange one event, `orders.placed`.
//! Nothing here knows Duet. A call goes to `http://<service>/…` through the proxy that `HTTP_PROXY` names,
//! an event is published with one POST to the sidecar, and arrives as one POST from it.
//!
//! # Layout
//!
//! - `storefront`: the page, and the routes behind it;
//! - `orders`, `inventory`, `payments`: the services that keep data, each in one [`journal`] that its
//!   replicas share;
//! - `notifications`: tells customers what happened, from events alone;
//! - `shopper`: customers who never tire;
//! - below them [`mesh`] (outgoing HTTP), [`web`] (serving), [`settings`] (environment), [`model`] (what the
//!   services say to each other).

mod inventory;
mod journal;
mod mesh;
mod model;
mod notifications;
mod orders;
mod payments;
mod settings;
mod shopper;
mod storefront;
mod web;

use std::process::ExitCode;

use anyhow::bail;
use settings::Settings;

const USAGE: &str = "usage: shop storefront|orders|inventory|payments|notifications|shopper

Environment: PORT (0 or unset: any free port), HOST (storefront only), SHOP_DATA (default ./data),
DAPR_HTTP_PORT (default 3500), HTTP_PROXY, RATE, FAIL_PERCENT, SLOW_PERCENT,
STOREFRONT_URL, ORDERS_URL, INVENTORY_URL, PAYMENTS_URL (default http://<service>).";

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            web::say("shop", &format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let app = arguments.next().unwrap_or_default();
    if let Some(extra) = arguments.next() {
        bail!("unexpected argument {extra:?}\n{USAGE}");
    }
    let settings = Settings::from_env()?;
    match app.as_str() {
        "storefront" => storefront::run(settings).await,
        "orders" => orders::run(settings).await,
        "inventory" => inventory::run(settings).await,
        "payments" => payments::run(settings).await,
        "notifications" => notifications::run(settings).await,
        "shopper" => shopper::run(settings).await,
        "-h" | "--help" | "help" => {
            web::say("shop", USAGE);
            Ok(())
        }
        "" => bail!("which app?\n{USAGE}"),
        other => bail!("there is no app {other:?}\n{USAGE}"),
    }
}
