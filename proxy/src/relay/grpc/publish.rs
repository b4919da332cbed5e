//! `PublishEvent` and `BulkPublishEvent`: the same checks and the same promises as over HTTP, but that an envelope may
//! leave out what Dapr fills in.

use std::collections::{HashMap, HashSet};

use duet_api::dapr::runtime::v1::{
    BulkPublishRequest, BulkPublishRequestEntry, BulkPublishResponse,
    BulkPublishResponseFailedEntry, PublishEventRequest,
};
use http::HeaderMap;
use http::header::{self, HeaderValue};
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use super::super::api::Api;
use super::super::problem::Problem;
use super::super::publish::bulk::single;
use super::super::publish::options::Options;
use super::super::publish::store::{MAX_ENTRIES, check_name};
use crate::http::deadline;
use crate::http::headers::{TRACEPARENT, TRACESTATE};

pub(super) async fn one(api: &Api, request: Request<PublishEventRequest>) -> Result<(), Status> {
    let (metadata, _extensions, event) = request.into_parts();
    let (bus, topic) = (event.pubsub_name.as_str(), event.topic.as_str());
    let publishing = &api.publishing;
    let prepared = prepare(api, bus, topic, event.data.len()).and_then(|room| {
        let options = Options::of_grpc().with(pairs(&event.metadata))?;
        let headers = headers(&metadata, &event.data_content_type)?;
        let left = deadline::read(metadata.as_ref(), true);
        let data = event.data.clone();
        Ok((publishing.read((bus, topic), &headers, data, &options, left)?, room))
    });
    let (events, _room) = prepared.inspect_err(|problem| {
        publishing.count_refused(bus, topic, problem);
    })?;
    publishing.store(bus, topic, events).await?;
    Ok(())
}

/// Entries that cannot be events fail one by one; the others are stored together.
pub(super) async fn bulk(
    api: &Api,
    request: Request<BulkPublishRequest>,
) -> Result<BulkPublishResponse, Status> {
    let (metadata, _extensions, batch) = request.into_parts();
    let (bus, topic) = (batch.pubsub_name.as_str(), batch.topic.as_str());
    check_entries(&batch.entries)?;
    let publishing = &api.publishing;
    let size = batch.entries.iter().map(|entry| entry.event.len()).sum();
    let prepared = prepare(api, bus, topic, size)
        .and_then(|room| Ok((Options::of_grpc().with(pairs(&batch.metadata))?, room)));
    let (options, _room) = prepared.inspect_err(|problem| {
        publishing.count_refused(bus, topic, problem);
    })?;
    let left = deadline::read(metadata.as_ref(), true);
    let (mut events, mut failed) = (Vec::with_capacity(batch.entries.len()), Vec::new());
    for entry in &batch.entries {
        let read = options.clone().with(pairs(&entry.metadata)).and_then(|options| {
            let headers = headers(&metadata, &entry.content_type)?;
            let data = entry.event.clone();
            single(publishing.read((bus, topic), &headers, data, &options, left)?)
        });
        match read {
            Ok(event) => events.push(event),
            Err(problem) => failed.push(BulkPublishResponseFailedEntry {
                entry_id: entry.entry_id.clone(),
                error: format!("{}: {}", problem.code, problem.message),
            }),
        }
    }
    publishing.store(bus, topic, events).await?;
    Ok(BulkPublishResponse { failed_entries: failed })
}

/// Checks what needs no look at the event, and takes the room that it needs.
fn prepare(
    api: &Api,
    bus: &str,
    topic: &str,
    size: usize,
) -> Result<tokio::sync::OwnedSemaphorePermit, Problem> {
    check_name(bus)?;
    check_name(topic)?;
    api.publishing.check(bus, topic)?;
    api.publishing.take_room(size)
}

fn check_entries(entries: &[BulkPublishRequestEntry]) -> Result<(), Status> {
    if entries.len() > MAX_ENTRIES {
        return Err(Status::invalid_argument(format!("at most {MAX_ENTRIES} entries")));
    }
    let mut seen = HashSet::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        if entry.entry_id.is_empty() || !seen.insert(&entry.entry_id) {
            let text = format!("entries[{index}].entry_id is empty or not unique");
            return Err(Status::invalid_argument(text));
        }
    }
    Ok(())
}

fn pairs(metadata: &HashMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    metadata.iter().map(|(name, value)| (name.as_str(), value.as_str()))
}

/// The headers that the same publish would have over HTTP.
fn headers(metadata: &MetadataMap, content_type: &str) -> Result<HeaderMap, Problem> {
    let given: &HeaderMap = metadata.as_ref();
    let mut headers = HeaderMap::with_capacity(3);
    for name in [TRACEPARENT, TRACESTATE] {
        if let Some(value) = given.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    if !content_type.is_empty() {
        let value = HeaderValue::try_from(content_type).map_err(|error| {
            let text = format!("data_content_type: {error}");
            Problem::new(http::StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text)
        })?;
        headers.insert(header::CONTENT_TYPE, value);
    }
    Ok(headers)
}
