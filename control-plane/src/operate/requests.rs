//! One function for each request.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{AppendHeaders, IntoResponse as _, Response};
use duet_api::DEFAULT_BUS;
use duet_events::bus::{ManageError, StoredEvent, SubscriptionStatus, TopicStatus, dead_letter};
use duet_events::cloudevent::{WrapContext, decode, shown};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;

use super::{Failure, Operate};
use crate::bus::{Copied, Migration};
use crate::expression::{Choice, Selector};

pub(super) type Answer = Result<Json<Value>, Failure>;

/// Events of one answer, when nobody says how many.
const DEFAULT_LIMIT: usize = 100;
/// Events that a copy lacks, as they cannot be read any more.
const MISSING_EVENTS: HeaderName = HeaderName::from_static("duet-missing-events");
/// Most events of one answer.
const MAX_LIMIT: usize = 1000;
/// Events that one request moves, when nobody says how many.
const DEFAULT_STEP: usize = 2000;
/// Most events that one request moves.
const MAX_STEP: usize = 10_000;
/// What of a copy is read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Most positions of one request.
const MAX_POSITIONS: usize = 10_000;

pub(super) fn default_bus() -> String {
    DEFAULT_BUS.to_owned()
}

/// A bus.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OfBus {
    #[serde(default = "default_bus")]
    bus: String,
}

pub(super) async fn buses(State(operate): State<Operate>) -> Json<Value> {
    let names = operate.buses.names();
    let why = |name: &String| operate.buses.not_moved(name).map(|why| (name.clone(), why));
    let not_moved: BTreeMap<_, _> = names.iter().filter_map(why).collect();
    Json(json!({ "buses": names, "notMoved": not_moved }))
}

pub(super) async fn topics(
    State(operate): State<Operate>,
    query: Result<Query<OfBus>, QueryRejection>,
) -> Answer {
    let Query(OfBus { bus }) = query.map_err(|error| Failure::bad(error.body_text()))?;
    let topics = operate.bus(&bus).await?.topics().await?;
    let topic = |topic: &TopicStatus| {
        json!({
            "name": topic.name,
            "first": topic.first,
            "next": topic.next,
            "events": topic.events,
            "bytes": topic.bytes,
            "declared": topic.declared,
        })
    };
    Ok(Json(json!({ "topics": topics.iter().map(topic).collect::<Vec<_>>() })))
}

pub(super) async fn subscriptions(
    State(operate): State<Operate>,
    query: Result<Query<OfBus>, QueryRejection>,
) -> Answer {
    let Query(OfBus { bus }) = query.map_err(|error| Failure::bad(error.body_text()))?;
    let found = operate.bus(&bus).await?.subscriptions().await?;
    let subscription = |subscription: &SubscriptionStatus| {
        json!({
            "name": subscription.name,
            "topic": subscription.topic,
            "deadLetterTopic": subscription.dead_letter_topic,
            "lag": subscription.lag,
            "scheduled": subscription.scheduled,
            "oldest": subscription.first.map(|first| time(first.published_ms)),
            "waitingSince": subscription.oldest_ms.map(time),
            "inFlight": subscription.in_flight,
            "retrying": subscription.retrying,
            "attempts": subscription.attempts,
            "consumers": subscription.consumers,
            "paused": subscription.paused,
            "declared": subscription.declared,
        })
    };
    let found: Vec<_> = found.iter().map(subscription).collect();
    Ok(Json(json!({ "subscriptions": found })))
}

/// A piece of a topic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Piece {
    #[serde(default = "default_bus")]
    bus: String,
    topic: String,
    #[serde(default)]
    from: u64,
    limit: Option<usize>,
    /// CEL.
    filter: Option<String>,
}

pub(super) async fn events(
    State(operate): State<Operate>,
    query: Result<Query<Piece>, QueryRejection>,
) -> Answer {
    let Query(piece) = query.map_err(|error| Failure::bad(error.body_text()))?;
    let limit = piece.limit.unwrap_or(DEFAULT_LIMIT).clamp(1, MAX_LIMIT);
    let filter = piece.filter.as_deref().map(Selector::filter).transpose();
    let filter = filter.map_err(|error| Failure::bad(error.to_string()))?;
    let bus = operate.bus(&piece.bus).await?;
    let found = bus.read(&piece.topic, piece.from, limit).await?;
    let next = found.last().map_or(piece.from, |last| last.position + 1);
    let mut events = Vec::new();
    for found in &found {
        if let Some(filter) = &filter {
            let (choice, _problem) = filter.choose(&found.event);
            // It may take some milliseconds, after which it is the turn of others.
            tokio::task::yield_now().await;
            if choice == Choice::Skip {
                continue;
            }
        }
        events.push(stored(found));
    }
    Ok(Json(json!({ "events": events, "next": next })))
}

fn stored(stored: &StoredEvent) -> Value {
    json!({
        "position": stored.position,
        "published": time(stored.published_ms),
        "event": shown(&stored.event),
    })
}

/// RFC 3339.
pub(super) fn time(ms: u64) -> Option<String> {
    let time = jiff::Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok()?;
    Some(time.to_string())
}

/// A topic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OfTopic {
    #[serde(default = "default_bus")]
    bus: String,
    topic: String,
}

pub(super) async fn publish(
    State(operate): State<Operate>,
    query: Result<Query<OfTopic>, QueryRejection>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let Query(OfTopic { bus: name, topic }) =
        query.map_err(|error| Failure::bad(error.body_text()))?;
    let bus = operate.bus(&name).await?;
    operate.buses.takes(&name, &topic)?;
    let now = jiff::Timestamp::now();
    let wrap = WrapContext { source: "duet-events", bus: &name, topic: &topic, now };
    let bad = |error: &duet_events::cloudevent::EnvelopeError| Failure::bad(error.to_string());
    let events = decode(&headers, body, &wrap).map_err(|error| bad(&error))?;
    let events: Vec<_> = events.into_iter().map(dead_letter::unmarked).collect();
    for event in &events {
        event.check_schedule().map_err(|error| bad(&error))?;
    }
    let published = bus.publish(&topic, events).await?;
    let published: Vec<_> = published
        .iter()
        .map(|at| json!({ "position": at.position, "duplicate": at.duplicate }))
        .collect();
    tracing::info!(bus = name, topic, events = published.len(), "published by an operator");
    Ok(Json(json!({ "published": published })))
}

/// Events of a topic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Positions {
    #[serde(default = "default_bus")]
    bus: String,
    topic: String,
    positions: Vec<u64>,
}

impl Positions {
    fn checked(body: Result<Json<Self>, JsonRejection>) -> Result<Self, Failure> {
        let Json(body) = body.map_err(|error| Failure::bad(error.body_text()))?;
        if body.positions.len() > MAX_POSITIONS {
            return Err(Failure::bad(format!("more than {MAX_POSITIONS} positions at once")));
        }
        Ok(body)
    }
}

pub(super) async fn remove(
    State(operate): State<Operate>,
    body: Result<Json<Positions>, JsonRejection>,
) -> Answer {
    let Positions { bus: name, topic, positions } = Positions::checked(body)?;
    let removed = operate.bus(&name).await?.remove_events(&topic, positions).await?;
    tracing::warn!(bus = name, topic, removed, "events removed by an operator");
    Ok(Json(json!({ "removed": removed })))
}

pub(super) async fn redrive(
    State(operate): State<Operate>,
    body: Result<Json<Positions>, JsonRejection>,
) -> Answer {
    let Positions { bus: name, topic, positions } = Positions::checked(body)?;
    let redriven = operate.bus(&name).await?.redrive(&topic, positions).await?;
    tracing::info!(bus = name, topic, redriven, "dead letters moved back by an operator");
    Ok(Json(json!({ "redriven": redriven })))
}

/// A move to where the bus is now.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Migrate {
    #[serde(default = "default_bus")]
    bus: String,
    /// Subscriptions.
    #[serde(default)]
    skip: Vec<String>,
    #[serde(default)]
    leave_behind: bool,
    limit: Option<usize>,
}

pub(super) async fn migrate(
    State(operate): State<Operate>,
    body: Result<Json<Migrate>, JsonRejection>,
) -> Answer {
    let Json(body) = body.map_err(|error| Failure::bad(error.body_text()))?;
    let wanted = Migration {
        skip: body.skip.into_iter().collect(),
        leave_behind: body.leave_behind,
        limit: body.limit.unwrap_or(DEFAULT_STEP).clamp(1, MAX_STEP),
    };
    let moved = operate.buses.migrate(&body.bus, wanted).await?;
    tracing::warn!(bus = body.bus, moved = moved.events, "events moved by an operator");
    let folder = moved.folder.map(|folder| folder.display().to_string());
    Ok(Json(json!({ "moved": moved.events, "folder": folder })))
}

/// The file itself, as it is read.
pub(super) async fn backup(
    State(operate): State<Operate>,
    query: Result<Query<OfBus>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(OfBus { bus }) = query.map_err(|error| Failure::bad(error.body_text()))?;
    let unreadable = |error: std::io::Error| ManageError::Failed(format!("the copy: {error}"));
    // Known first: a bus that nobody declared is not found.
    operate.bus(&bus).await?;
    let Copied { file, missing_events } = operate.buses.backup(&bus).await?;
    let length = file.metadata().map_err(unreadable)?.len();
    tracing::info!(bus, bytes = length, missing_events, "backed up by an operator");
    let stream = ReaderStream::with_capacity(tokio::fs::File::from_std(file), CHUNK_BYTES);
    let kind = HeaderValue::from_static("application/octet-stream");
    let headers = AppendHeaders([
        (CONTENT_TYPE, kind),
        (CONTENT_LENGTH, length.into()),
        (MISSING_EVENTS, missing_events.into()),
    ]);
    Ok((headers, Body::from_stream(stream)).into_response())
}
