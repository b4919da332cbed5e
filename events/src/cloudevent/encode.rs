//! From events to HTTP.

use base64::Engine;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;

use super::{Event, decode, header};

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
pub(super) fn is_json(content_type: &str) -> bool {
    let essence = decode::essence(content_type);
    essence.ends_with("/json") || essence.ends_with("+json")
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
        let given = |name: &String| self.extra.iter().any(|(extra, _)| extra == name);
        for (name, value) in event.attributes.iter().filter(|(name, _)| !given(name)) {
            map.serialize_entry(name, value)?;
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
        if content_type.is_none_or(is_json) {
            return match serde_json::from_slice::<&RawValue>(data) {
                // A null member means no data, so JSON's null itself has to go the other way.
                Ok(raw) if raw.get() != "null" => Self::Json(raw),
                _ => Self::Binary(data),
            };
        }
        let is_text = content_type.is_some_and(|given| decode::essence(given).starts_with("text/"));
        match std::str::from_utf8(data) {
            Ok(text) if is_text => Self::Text(text),
            _ => Self::Binary(data),
        }
    }
}
