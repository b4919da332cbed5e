//! `POST /v1.0/publish/bulk/{bus}/{topic}`: many events in one request, with a result for each that failed.

use std::collections::{BTreeMap, HashSet};

use base64::Engine as _;
use bytes::Bytes;
use duet_events::cloudevent::Event;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::super::problem::Problem;
use super::accepted;
use super::options::Options;
use super::store::{MAX_ENTRIES, Publishing};
use crate::http::body::Body;

/// One event of the request, in Dapr's shape.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    #[serde(default)]
    entry_id: String,
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    content_type: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
}

/// What Dapr answers when at least one event was not stored.
const PARTLY: (StatusCode, &str) =
    (StatusCode::INTERNAL_SERVER_ERROR, "ERR_PUBSUB_PUBLISH_MESSAGE");

/// An event that was not stored, and why.
struct Failed {
    entry: String,
    error: String,
    status: StatusCode,
    code: &'static str,
}

/// Stores the entries that are events, all together and in order: 204 when that is all of them, else Dapr's list of those
/// that failed, with 500 as Dapr has it when others were stored.
pub(in crate::relay) async fn bulk(
    publishing: &Publishing,
    target: (&str, &str),
    request: Request<Incoming>,
) -> Result<Response<Body>, Problem> {
    let (bus, topic) = target;
    let read = async {
        publishing.check(bus, topic)?;
        let options = Options::from_query(request.uri().query().unwrap_or_default())?;
        let (head, body) = request.into_parts();
        let (body, room) = publishing.body(body).await?.split();
        let (events, failed) = entries(publishing, target, &head.headers, &body, &options)?;
        Ok((events, failed, room))
    };
    let (good, mut failed, _room) =
        read.await.inspect_err(|problem| publishing.count_refused(bus, topic, problem))?;
    let (ids, events): (Vec<_>, Vec<_>) = good.into_iter().unzip();
    match publishing.store(bus, topic, events).await {
        Ok(done) if failed.is_empty() => Ok(accepted(done)),
        Ok(_nothing) if ids.is_empty() => Ok(failures(&failed, worst(&failed))),
        Ok(_) => Ok(failures(&failed, PARTLY)),
        // None of them was stored.
        Err(problem) => {
            failed.extend(ids.into_iter().map(|entry| failure(entry, &problem)));
            let mut response = failures(&failed, (problem.status, problem.code));
            if let Some(seconds) = problem.retry_after {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            Ok(response)
        }
    }
}

type Read = (Vec<(String, Event)>, Vec<Failed>);

fn entries(
    publishing: &Publishing,
    target: (&str, &str),
    outer: &HeaderMap,
    body: &[u8],
    options: &Options,
) -> Result<Read, Problem> {
    let entries: Vec<Entry<'_>> = serde_json::from_slice(body)
        .map_err(|error| malformed(format!("the body is not an array of entries: {error}")))?;
    if entries.len() > MAX_ENTRIES {
        return Err(malformed(format!("the body has more than {MAX_ENTRIES} entries")));
    }
    let mut ids = HashSet::new();
    let (mut good, mut failed) = (Vec::with_capacity(entries.len()), Vec::new());
    for (index, entry) in entries.iter().enumerate() {
        if entry.entry_id.is_empty() {
            return Err(malformed(format!("entry {index} has no entryId")));
        }
        if !ids.insert(entry.entry_id.as_str()) {
            return Err(malformed(format!("entryId {:?} is given twice", entry.entry_id)));
        }
    }
    for entry in entries {
        match event(publishing, target, outer, &entry, options) {
            Ok(event) => good.push((entry.entry_id, event)),
            Err(problem) => failed.push(failure(entry.entry_id, &problem)),
        }
    }
    Ok((good, failed))
}

fn event(
    publishing: &Publishing,
    target: (&str, &str),
    outer: &HeaderMap,
    entry: &Entry<'_>,
    options: &Options,
) -> Result<Event, Problem> {
    let metadata = entry.metadata.iter().flatten();
    let options =
        options.clone().with(metadata.map(|(key, value)| (key.as_str(), value.as_str())))?;
    let (kind, body) = payload(entry)?;
    let mut headers = HeaderMap::new();
    let value = HeaderValue::from_str(&kind);
    let value = value.map_err(|_err| malformed(format!("contentType {kind:?} is not one")))?;
    headers.insert(header::CONTENT_TYPE, value);
    for name in ["traceparent", "tracestate"] {
        if let Some(value) = outer.get(name) {
            headers.insert(name, value.clone());
        }
    }
    let left = crate::http::deadline::read(outer, false);
    single(publishing.read(target, &headers, body, &options, left)?)
}

/// The event of an entry: a batch in it would have no id for each to fail by.
pub(in crate::relay) fn single(events: Vec<Event>) -> Result<Event, Problem> {
    let mut events = events.into_iter();
    match (events.next(), events.next()) {
        (Some(event), None) => Ok(event),
        _ => Err(malformed("an entry is one event, not a batch".to_owned())),
    }
}

/// The bytes of an entry's event, as Dapr reads them: JSON as it is, text out of a string, anything else as base64.
fn payload(entry: &Entry<'_>) -> Result<(String, Bytes), Problem> {
    let raw = entry.event.map_or("null", RawValue::get);
    let default = if raw.starts_with('"') { "text/plain" } else { "application/json" };
    let kind = entry.content_type.clone().filter(|kind| !kind.is_empty());
    let kind = kind.unwrap_or_else(|| default.to_owned());
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence.ends_with("/json") || essence.ends_with("+json") {
        return Ok((kind, Bytes::copy_from_slice(raw.as_bytes())));
    }
    let text: String = serde_json::from_str(raw)
        .map_err(|_err| malformed(format!("an event of type {kind:?} is given as a string")))?;
    if essence.starts_with("text/") {
        return Ok((kind, text.into()));
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(text);
    let bytes =
        bytes.map_err(|_err| malformed(format!("an event of type {kind:?} is given as base64")))?;
    Ok((kind, bytes.into()))
}

fn failure(entry: String, problem: &Problem) -> Failed {
    let error = problem.message.clone();
    Failed { entry, error, status: problem.status, code: problem.code }
}

/// Status and code where nothing was stored: those of the first failure that is not the publisher's own.
fn worst(failed: &[Failed]) -> (StatusCode, &'static str) {
    let worst = failed.iter().find(|failed| failed.status.is_server_error()).or(failed.first());
    worst.map_or(PARTLY, |worst| (worst.status, worst.code))
}

fn failures(failed: &[Failed], (status, code): (StatusCode, &'static str)) -> Response<Body> {
    let entries: Vec<_> = failed
        .iter()
        .map(|failed| json!({"entryId": failed.entry, "error": failed.error}))
        .collect();
    let answer = json!({"failedEntries": entries, "errorCode": code});
    let mut response = Response::new(Body::Full(answer.to_string().into()));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn malformed(text: String) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "ERR_PUBSUB_EVENTS_SER", text)
}
