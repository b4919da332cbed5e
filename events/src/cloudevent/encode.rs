//! From events to HTTP.

use base64::Engine;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;

use super::{Event, decode, header};

/// Types whose data is text although their names do not say so.
const TEXT: [&str; 17] = [
    "application/ecmascript",
    "application/graphql",
    "application/javascript",
    "application/jsonl",
    "application/ndjson",
    "application/sparql-query",
    "application/sql",
    "application/toml",
    "application/typescript",
    "application/x-javascript",
    "application/x-ndjson",
    "application/x-sh",
    "application/x-www-form-urlencoded",
    "application/x-yaml",
    "application/xml",
    "application/xml-dtd",
    "application/yaml",
];

/// The event as one JSON object. `extra` attributes (name, value) are the bus's own word and replace those of the event, as
/// Dapr does with `topic` and `pubsubname`.
#[must_use]
pub fn encode_structured(event: &Event, extra: &[(&str, &str)]) -> Bytes {
    to_json(&Envelope { event, extra })
}

/// The events as one JSON array.
#[must_use]
pub fn encode_batch(events: &[Event], extra: &[(&str, &str)]) -> Bytes {
    let envelopes: Vec<_> = events.iter().map(|event| Envelope { event, extra }).collect();
    to_json(&envelopes)
}

/// The event as headers and body.
#[must_use]
pub fn encode_binary(event: &Event) -> (HeaderMap, Bytes) {
    let mut headers = HeaderMap::with_capacity(event.attributes.len() + 4);
    headers.insert("ce-specversion", HeaderValue::from_static("1.0"));
    headers.insert("ce-id", header::encode(&event.id));
    headers.insert("ce-source", header::encode(&event.source));
    headers.insert("ce-type", header::encode(&event.event_type));
    for (name, value) in &event.attributes {
        if name == "datacontenttype" {
            // Checked to be visible ASCII when the event was made.
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(CONTENT_TYPE, value);
            }
            continue;
        }
        // Attribute names are lower-case letters and digits, so this is always a header name.
        if let Ok(name) = HeaderName::try_from(format!("ce-{name}")) {
            headers.insert(name, header::encode(value));
        }
    }
    (headers, event.data.clone().unwrap_or_default())
}

/// Whether a media type is JSON: `application/json`, `text/json`, `application/x+json` and the like.
#[must_use]
pub fn is_json(content_type: &str) -> bool {
    let essence = decode::essence(content_type);
    essence.ends_with("/json") || essence.ends_with("+json")
}

/// Whether a media type is text, which a JSON envelope carries as a string: `text/*`, XML and YAML of any kind, source code
/// and the like. The type alone decides, so that what is binary never is a string for once because of its bytes.
#[must_use]
pub fn is_text(content_type: &str) -> bool {
    let essence = decode::essence(content_type);
    let named = ["+xml", "+yaml"].iter().any(|suffix| essence.ends_with(suffix));
    named || essence.starts_with("text/") || TEXT.contains(&essence.as_str())
}

fn to_json<T: Serialize>(value: &T) -> Bytes {
    // Serialising strings and checked raw JSON into memory cannot fail.
    serde_json::to_vec(value).unwrap_or_default().into()
}

struct Envelope<'a> {
    event: &'a Event,
    extra: &'a [(&'a str, &'a str)],
}

impl Serialize for Envelope<'_> {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        let event = self.event;
        let mut map = output.serialize_map(None)?;
        map.serialize_entry("specversion", "1.0")?;
        map.serialize_entry("id", &event.id)?;
        map.serialize_entry("source", &event.source)?;
        map.serialize_entry("type", &event.event_type)?;
        let given = |name: &str| self.extra.iter().any(|(extra, _)| *extra == name);
        for (name, value) in event.values().filter(|(name, _)| !given(name)) {
            map.serialize_entry(name, &value)?;
        }
        for (name, value) in self.extra {
            map.serialize_entry(name, value)?;
        }
        match event.data.as_deref().map(|data| Data::of(event.data_content_type(), data)) {
            None => {}
            Some(Data::Json(raw)) => map.serialize_entry("data", raw)?,
            Some(Data::Text(text)) => map.serialize_entry("data", text)?,
            Some(Data::Binary(bytes)) => {
                let text = base64::engine::general_purpose::STANDARD.encode(bytes);
                map.serialize_entry("data_base64", &text)?;
            }
        }
        map.end()
    }
}

/// How the JSON format carries a payload.
enum Data<'a> {
    Json(&'a RawValue),
    Text(&'a str),
    Binary(&'a [u8]),
}

impl<'a> Data<'a> {
    fn of(content_type: Option<&str>, data: &'a [u8]) -> Self {
        if content_type.is_none_or(is_json)
            && let Ok(raw) = serde_json::from_slice::<&RawValue>(data)
        {
            // A null member means no data, so JSON's null itself has to go the other way.
            return if raw.get() == "null" { Self::Binary(data) } else { Self::Json(raw) };
        }
        match std::str::from_utf8(data) {
            Ok(text) if content_type.is_some_and(may_be_string) => Self::Text(text),
            _ => Self::Binary(data),
        }
    }
}

/// Text, and JSON that is none: a subscriber reads what it is in either case, as from Dapr. An envelope that is none is kept
/// byte for byte, since NATS carries it in this very format.
fn may_be_string(content_type: &str) -> bool {
    let envelope = decode::essence(content_type).starts_with("application/cloudevents");
    is_text(content_type) || (is_json(content_type) && !envelope)
}
