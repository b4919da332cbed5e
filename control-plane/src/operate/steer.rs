//! Requests that steer one subscription: where it goes on, whether it is handed out, whether it is kept.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use duet_events::bus::{ManageError, ManagedBus, Start, SubscriptionStatus};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::requests::{Answer, default_bus, time};
use super::{Failure, Operate};

/// Until a look at a cluster that elects its leader is given up. With the bus's own patience after it, for the command, that
/// is less than whoever asks waits (30 s).
const ELECTION: Duration = Duration::from_secs(10);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(250);

/// Where to.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Seek {
    #[serde(default = "default_bus")]
    bus: String,
    subscription: String,
    start: SeekTo,
    /// Also when events that wait are skipped by it.
    #[serde(default)]
    skip_waiting: bool,
}

/// As in a `Subscription`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
enum SeekTo {
    Earliest,
    Latest,
    Time(String),
    Position(u64),
}

impl SeekTo {
    fn start(self) -> Result<Start, Failure> {
        Ok(match self {
            Self::Earliest => Start::Earliest,
            Self::Latest => Start::Latest,
            Self::Position(position) => Start::Position(position),
            Self::Time(text) => {
                let time: jiff::Timestamp = text.parse().map_err(|_error| {
                    Failure::bad(format!(
                        "{text:?} is not an RFC 3339 time such as 2026-01-31T12:00:00Z"
                    ))
                })?;
                Start::Time(u64::try_from(time.as_millisecond()).unwrap_or(0))
            }
        })
    }
}

/// What is skipped is neither delivered nor a dead letter, so nobody skips it unawares. A guard against slips: an event that
/// comes to wait meanwhile is not seen.
pub(super) async fn seek(
    State(operate): State<Operate>,
    body: Result<Json<Seek>, JsonRejection>,
) -> Answer {
    let Json(Seek { bus: name, subscription, start, skip_waiting }) =
        body.map_err(|error| Failure::bad(error.body_text()))?;
    let to = start.start()?;
    let bus = operate.bus(&name).await?;
    let found = find(&*bus, &subscription).await?;
    if !skip_waiting && skips(&found, to) {
        let oldest = found.first.and_then(|first| time(first.published_ms)).unwrap_or_default();
        return Err(ManageError::Refused(format!(
            "{subscription}: {} events wait, the oldest since {oldest}, and this start skips some of them; say \
             --skip-waiting if it may",
            found.waiting()
        ))
        .into());
    }
    bus.seek(&subscription, to).await?;
    tracing::warn!(bus = name, subscription, ?to, "moved by an operator");
    Ok(Json(json!({ "moved": true })))
}

/// Whether an event that is not handled yet comes before a start.
fn skips(found: &SubscriptionStatus, to: Start) -> bool {
    let Some(first) = found.first.filter(|_first| found.waiting() > 0) else { return false };
    match to {
        Start::Earliest => false,
        Start::Latest => true,
        Start::Time(ms) => ms > first.published_ms,
        Start::Position(position) => position > first.position,
    }
}

/// Before a command that is patient with a cluster that elects its leader: so is this look.
async fn find(bus: &dyn ManagedBus, name: &str) -> Result<SubscriptionStatus, ManageError> {
    let until = Instant::now() + ELECTION;
    let all = loop {
        match bus.subscriptions().await {
            Err(ManageError::Away(_)) if Instant::now() < until => sleep(PAUSE).await,
            all => break all?,
        }
    };
    let found = all.into_iter().find(|found| found.name == name);
    found.ok_or_else(|| ManageError::Unknown { kind: "subscription", name: name.to_owned() })
}

/// Stop or go on.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pause {
    #[serde(default = "default_bus")]
    bus: String,
    subscription: String,
    paused: bool,
}

pub(super) async fn pause(
    State(operate): State<Operate>,
    body: Result<Json<Pause>, JsonRejection>,
) -> Answer {
    let Json(Pause { bus: name, subscription, paused }) =
        body.map_err(|error| Failure::bad(error.body_text()))?;
    operate.bus(&name).await?.pause(&subscription, paused).await?;
    tracing::warn!(bus = name, subscription, paused, "paused or resumed by an operator");
    Ok(Json(json!({ "paused": paused })))
}

/// What is kept no longer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Forget {
    #[serde(default = "default_bus")]
    bus: String,
    subscription: String,
    /// Also when events wait for it.
    #[serde(default)]
    skip_waiting: bool,
}

/// Only what would stay away: whoever declares or consumes a subscription makes it anew, without what waited for it.
pub(super) async fn forget(
    State(operate): State<Operate>,
    body: Result<Json<Forget>, JsonRejection>,
) -> Answer {
    let Json(Forget { bus: name, subscription, skip_waiting }) =
        body.map_err(|error| Failure::bad(error.body_text()))?;
    let bus = operate.bus(&name).await?;
    let found = find(&*bus, &subscription).await?;
    let refused = |why: &str| ManageError::Refused(format!("{subscription}: {why}"));
    if operate.buses.declares(&name, &subscription) {
        return Err(refused("a Subscription resource declares it: remove that first").into());
    }
    if found.consumers > 0 {
        let why = "an application consumes it and would make it anew: stop that first, or skip what waits with a \
                   replay from latest";
        return Err(refused(why).into());
    }
    let waiting = found.waiting();
    if waiting > 0 && !skip_waiting {
        let why = format!("{waiting} events wait for it; say --skip-waiting if nobody wants them");
        return Err(refused(&why).into());
    }
    bus.remove_subscription(&subscription).await?;
    tracing::warn!(bus = name, subscription, waiting, "forgotten by an operator");
    Ok(Json(json!({ "forgotten": true, "lag": waiting })))
}
