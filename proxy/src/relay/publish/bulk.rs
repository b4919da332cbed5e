//! `POST /v1.0/publish/bulk/{bus}/{topic}`: many events in one request, with a result for each that failed.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use base64::Engine as _;
use bytes::Bytes;
use duet_events::AnyCase;
use duet_events::cloudevent::{Event, is_json, is_text};
use http::header::{self, HeaderValue};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer as _};
use serde_json::json;
use serde_json::value::RawValue;

use super::super::problem::Problem;
use super::accepted;
use super::options::Options;
use super::store::{MAX_ENTRIES, Publishing, check_encoding};
use crate::http::body::Body;
use crate::http::leftover::Coming;

/// One event of the request, in Dapr's shape: to be read as [`AnyCase`].
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
    request: &mut Request<Coming<Incoming>>,
) -> Result<Response<Body>, Problem> {
    let (bus, topic) = target;
    let read = async {
        publishing.check(bus, topic)?;
        let options = Options::from_query(request.uri().query().unwrap_or_default())?;
        check_encoding(request.headers())?;
        let (body, room) = publishing.body(request.body_mut()).await?.split();
        let headers = request.headers();
        let event = |entry: &Entry<'_>| event(publishing, target, headers, entry, &options);
        let (events, failed) = Entries::new(event).read(&body)?;
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

/// Makes an event of each entry before the next is read: a body of nothing but braces takes no memory.
struct Entries<F> {
    /// Makes it.
    event: F,
    ids: HashSet<String>,
    good: Vec<(String, Event)>,
    failed: Vec<Failed>,
    /// Why none of them counts.
    wrong: Option<Problem>,
}

impl<F: Fn(&Entry<'_>) -> Result<Event, Problem>> Entries<F> {
    fn new(event: F) -> Self {
        let (good, failed) = (Vec::new(), Vec::new());
        Self { event, ids: HashSet::new(), good, failed, wrong: None }
    }

    fn read(mut self, body: &[u8]) -> Result<Read, Problem> {
        let mut json = serde_json::Deserializer::from_slice(body);
        let read = json.deserialize_seq(&mut self).and_then(|()| json.end());
        match (self.wrong, read) {
            (Some(problem), _) => Err(problem),
            (None, Err(error)) => {
                Err(malformed(format!("the body is not an array of entries: {error}")))
            }
            (None, Ok(())) => Ok((self.good, self.failed)),
        }
    }

    fn take(&mut self, entry: Entry<'_>) -> Result<(), Problem> {
        let index = self.ids.len();
        if index == MAX_ENTRIES {
            return Err(malformed(format!("the body has more than {MAX_ENTRIES} entries")));
        }
        if entry.entry_id.is_empty() {
            return Err(malformed(format!("entry {index} has no entryId")));
        }
        if !self.ids.insert(entry.entry_id.clone()) {
            return Err(malformed(format!("entryId {:?} is given twice", entry.entry_id)));
        }
        match (self.event)(&entry) {
            Ok(event) => self.good.push((entry.entry_id, event)),
            Err(problem) => self.failed.push(failure(entry.entry_id, &problem)),
        }
        Ok(())
    }
}

impl<'de, F: Fn(&Entry<'_>) -> Result<Event, Problem>> Visitor<'de> for &mut Entries<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while let Some(AnyCase(entry)) = entries.next_element::<AnyCase<Entry<'de>>>()? {
            if let Err(problem) = self.take(entry) {
                self.wrong = Some(problem);
                return Err(A::Error::custom("an entry is not valid"));
            }
        }
        Ok(())
    }
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
    if is_json(&kind) {
        return Ok((kind, Bytes::copy_from_slice(raw.as_bytes())));
    }
    let text: String = serde_json::from_str(raw)
        .map_err(|_err| malformed(format!("an event of type {kind:?} is given as a string")))?;
    if is_text(&kind) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Read, Problem> {
        let event = |entry: &Entry<'_>| {
            let (kind, body) = payload(entry)?;
            let event = Event::new("1", "/s", "t").unwrap().with_data(body);
            Ok(event.with_attribute("datacontenttype", &kind).unwrap())
        };
        Entries::new(event).read(body.as_bytes())
    }

    fn refused(body: &str) -> String {
        read(body).err().map(|problem| problem.message).unwrap()
    }

    #[test]
    fn the_entries_of_the_sdk_for_javascript_are_read() {
        let body = r#"[{"entryID":"a","event":"hi","contentType":"text/plain","metadata":{}},
            {"entryID":"b","event":{"n":1},"contentType":"application/json"}]"#;
        let (good, failed) = read(body).unwrap();
        let good: Vec<_> = good.iter().map(|(id, event)| (&**id, event.data().unwrap())).collect();
        assert_eq!(good, [("a", &"hi".into()), ("b", &"{\"n\":1}".into())]);
        assert!(failed.is_empty());
    }

    #[test]
    fn an_event_is_given_as_its_type_says() {
        let data = |kind: &str, event: &str| {
            let body = format!(r#"[{{"entryId":"a","event":{event},"contentType":"{kind}"}}]"#);
            let (good, failed) = read(&body).unwrap();
            let data = good.into_iter().next().and_then(|(_, event)| event.data().cloned());
            data.ok_or_else(|| failed.into_iter().next().unwrap().error)
        };
        for text in ["text/csv", "application/xml", "application/atom+xml", "application/yaml"] {
            assert_eq!(data(text, r#""<a/>""#).unwrap(), "<a/>", "{text}");
        }
        assert_eq!(data("application/octet-stream", r#""AAE=""#).unwrap(), &[0, 1][..]);
        assert_eq!(data("application/json", r#""AAE=""#).unwrap(), r#""AAE=""#);
        assert!(data("image/png", r#""<a/>""#).unwrap_err().contains("base64"));
        assert!(data("application/xml", "7").unwrap_err().contains("string"));
    }

    #[test]
    fn what_is_too_much_is_not_read_to_its_end() {
        let entries = |count: usize| -> Vec<String> {
            (0..count).map(|n| format!(r#"{{"entryId":"{n}","event":1}}"#)).collect()
        };
        assert_eq!(read(&format!("[{}]", entries(10_000).join(","))).unwrap().0.len(), 10_000);
        // What follows is not even JSON.
        let body = format!("[{},nonsense", entries(10_001).join(","));
        assert_eq!(refused(&body), "the body has more than 10000 entries");
        assert_eq!(refused("[{},nonsense"), "entry 0 has no entryId");
        assert!(refused(r#"[{"entryId":"a"},{"entryID":"a"},nonsense"#).contains("twice"));
        for body in ["", "{}", "[", "[] x", "[7]", r#"[{"entryId":"a"}"#] {
            assert!(refused(body).starts_with("the body is not an array of entries"), "{body}");
        }
    }
}
