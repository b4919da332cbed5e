//! From an HTTP request to events.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde::de::{DeserializeSeed, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::members::{Members, Name, string};
use super::{EnvelopeError, Event, attribute, encode, header};

/// Type of an event whose publisher says none, as Dapr has it.
const DEFAULT_TYPE: &str = "com.dapr.event.sent";

/// What a plain body lacks to be an event.
#[derive(Clone, Copy, Debug)]
pub struct WrapContext<'a> {
    /// The publisher's name, which becomes the `source`.
    pub source: &'a str,
    /// Name of the bus, which becomes `pubsubname`.
    pub bus: &'a str,
    /// Name of the topic.
    pub topic: &'a str,
    /// When it was published.
    pub now: jiff::Timestamp,
}

/// Reads the events of a request. The content type decides: a batch, a structured event, else binary mode if there
/// are `ce-` headers, else a plain body, which is wrapped as Dapr does.
///
/// # Errors
/// When an envelope is not valid; the error names the attribute.
pub fn decode(
    headers: &HeaderMap,
    body: Bytes,
    wrap: &WrapContext<'_>,
) -> Result<Vec<Event>, EnvelopeError> {
    read(headers, body, wrap, Missing::Refused)
}

/// As [`decode`], but a structured event that lacks `specversion`, `id`, `source` or `type` gets it, as Dapr does it. One
/// that is there and not valid is an error all the same.
///
/// # Errors
/// When an envelope is not valid; the error names the attribute.
pub fn decode_filling(
    headers: &HeaderMap,
    body: Bytes,
    wrap: &WrapContext<'_>,
) -> Result<Vec<Event>, EnvelopeError> {
    read(headers, body, wrap, Missing::Filled(wrap))
}

/// What becomes of a structured event that lacks a required attribute.
#[derive(Clone, Copy)]
enum Missing<'a> {
    Refused,
    Filled(&'a WrapContext<'a>),
}

fn read(
    headers: &HeaderMap,
    body: Bytes,
    wrap: &WrapContext<'_>,
    missing: Missing<'_>,
) -> Result<Vec<Event>, EnvelopeError> {
    let content_type = content_type(headers)?;
    let essence = content_type.map(essence).unwrap_or_default();
    if let Some(format) = essence.strip_prefix("application/cloudevents-batch") {
        check_format(format, content_type)?;
        return decode_batch(&body);
    }
    if let Some(format) = essence.strip_prefix("application/cloudevents") {
        check_format(format, content_type)?;
        return Ok(vec![decode_structured(json_text(&body)?, missing)?]);
    }
    if headers.keys().any(|name| name.as_str().starts_with("ce-")) {
        return Ok(vec![decode_binary(headers, content_type, body)?]);
    }
    Ok(vec![wrap_plain(headers, content_type, body, wrap)?])
}

/// Wraps the body as it is, as data, whatever the request says that it is.
///
/// # Errors
/// When its `Content-Type` is not one.
pub fn decode_opaque(
    headers: &HeaderMap,
    body: Bytes,
    wrap: &WrapContext<'_>,
) -> Result<Event, EnvelopeError> {
    wrap_plain(headers, content_type(headers)?, body, wrap)
}

/// Media type without parameters, in lower case.
pub(super) fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn content_type(headers: &HeaderMap) -> Result<Option<&str>, EnvelopeError> {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(EnvelopeError::invalid("datacontenttype", "Content-Type is given twice"));
    }
    match value.to_str() {
        Ok("") => Ok(None),
        Ok(text) => Ok(Some(text)),
        Err(_opaque) => {
            Err(EnvelopeError::invalid("datacontenttype", "Content-Type is not visible ASCII"))
        }
    }
}

/// JSON is the one event format, and UTF-8 its one encoding.
fn check_format(format: &str, content_type: Option<&str>) -> Result<(), EnvelopeError> {
    let given = content_type.unwrap_or_default();
    let charset = given.split(';').skip(1).find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        let named = name.trim().eq_ignore_ascii_case("charset");
        named.then(|| value.trim().trim_matches('"').to_ascii_lowercase())
    });
    let utf8 = charset.is_none_or(|charset| charset == "utf-8" || charset == "us-ascii");
    if matches!(format, "" | "+json") && utf8 {
        return Ok(());
    }
    Err(EnvelopeError::Format { content_type: given.chars().take(128).collect() })
}

fn json_text(body: &[u8]) -> Result<&str, EnvelopeError> {
    let error = |_invalid| EnvelopeError::Body { reason: "is not valid UTF-8".to_owned() };
    std::str::from_utf8(body).map_err(error)
}

fn json_error(error: &serde_json::Error) -> EnvelopeError {
    EnvelopeError::Body { reason: format!("is not the expected JSON: {error}") }
}

fn decode_batch(body: &[u8]) -> Result<Vec<Event>, EnvelopeError> {
    let mut json = serde_json::Deserializer::from_str(json_text(body)?);
    let (mut events, mut wrong) = (Vec::new(), None);
    let read = Batch { events: &mut events, wrong: &mut wrong }.deserialize(&mut json);
    let read = read.and_then(|()| json.end());
    match (wrong, read) {
        (Some(error), _) => {
            Err(EnvelopeError::InBatch { index: events.len(), error: Box::new(error) })
        }
        (None, Err(error)) => Err(json_error(&error)),
        (None, Ok(())) => Ok(events),
    }
}

/// Makes an event of each element before the next is read: a body of nothing but braces takes no memory.
struct Batch<'e> {
    events: &'e mut Vec<Event>,
    /// What is wrong with the element after those.
    wrong: &'e mut Option<EnvelopeError>,
}

impl<'de> DeserializeSeed<'de> for Batch<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Batch<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        loop {
            let members = match elements.next_element::<Members<'de>>() {
                Ok(Some(members)) => members,
                Ok(None) => return Ok(()),
                Err(error) => {
                    let reason = format!("is not the expected JSON: {error}");
                    *self.wrong = Some(EnvelopeError::Body { reason });
                    return Err(error);
                }
            };
            match decode_members(&members, Missing::Refused) {
                Ok(event) => self.events.push(event),
                Err(error) => {
                    *self.wrong = Some(error);
                    return Err(serde::de::Error::custom("an event is not valid"));
                }
            }
        }
    }
}

fn decode_structured(text: &str, missing: Missing<'_>) -> Result<Event, EnvelopeError> {
    let members = serde_json::from_str(text).map_err(|error| json_error(&error))?;
    decode_members(&members, missing)
}

fn decode_members(members: &Members<'_>, missing: Missing<'_>) -> Result<Event, EnvelopeError> {
    let required = |name: &'static str| match (members.get(name).map(string), missing) {
        (Some(Some(text)), _) => Ok(text),
        (Some(None), _) => Err(EnvelopeError::invalid(name, "is not a string")),
        (None, Missing::Refused) => Err(EnvelopeError::Missing { attribute: name }),
        (None, Missing::Filled(wrap)) => Ok(match name {
            "specversion" => "1.0".into(),
            "id" => random_id().into(),
            "source" => wrap.source.to_owned().into(),
            _ => DEFAULT_TYPE.into(),
        }),
    };
    attribute::check_spec_version(&required("specversion")?)?;
    let mut event = Event::new(required("id")?, required("source")?, required("type")?)?;
    attribute::check_count(members.0.len())?;
    for (Name(name), raw) in &members.0 {
        if !attribute::RESERVED.contains(&&**name) {
            set_member(&mut event, name, raw)?;
        }
    }
    event.data = match (members.get("data"), members.get("data_base64")) {
        (Some(_), Some(_)) => {
            return Err(EnvelopeError::invalid("data_base64", "is given beside data"));
        }
        (Some(data), None) => Some(data_bytes(event.data_content_type(), data)?),
        (None, Some(base64)) => Some(base64_bytes(base64)?),
        (None, None) => None,
    };
    Ok(event)
}

/// A JSON member as what it is: a string, a number as it is written, or a boolean.
fn set_member(event: &mut Event, name: &str, raw: &RawValue) -> Result<(), EnvelopeError> {
    match string(raw) {
        Some(text) => event.set_attribute(name, text.into_owned()),
        None if attribute::STRINGS.contains(&name) => {
            Err(EnvelopeError::invalid(name, "is not a string"))
        }
        None => event.set_literal(name, raw.get()),
    }
}

/// JSON data stays byte for byte as it was written; a JSON string of another type is the text itself.
fn data_bytes(content_type: Option<&str>, raw: &RawValue) -> Result<Bytes, EnvelopeError> {
    let text = raw.get();
    if content_type.is_none_or(encode::is_json) || !text.starts_with('"') {
        return Ok(Bytes::copy_from_slice(text.as_bytes()));
    }
    let text = string(raw);
    let text = text.ok_or_else(|| EnvelopeError::invalid("data", "is not a valid string"))?;
    Ok(text.into_owned().into())
}

fn base64_bytes(raw: &RawValue) -> Result<Bytes, EnvelopeError> {
    let error = || EnvelopeError::invalid("data_base64", "is not a string of standard base64");
    let text = string(raw).ok_or_else(error)?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(&*text);
    bytes.map(Bytes::from).map_err(|_invalid| error())
}

fn decode_binary(
    headers: &HeaderMap,
    content_type: Option<&str>,
    body: Bytes,
) -> Result<Event, EnvelopeError> {
    attribute::check_count(headers.keys_len())?;
    let mut attributes = BTreeMap::new();
    for header_name in headers.keys() {
        let Some(name) = header_name.as_str().strip_prefix("ce-") else {
            continue;
        };
        let mut values = headers.get_all(header_name).iter();
        let value = values.next().map(|value| header::decode(name, value)).transpose()?;
        if values.next().is_some() {
            return Err(EnvelopeError::invalid(name, "is given twice"));
        }
        attributes.insert(name.to_owned(), value.unwrap_or_default());
    }
    if attributes.contains_key("datacontenttype") {
        let reason = "is Content-Type in binary mode, never a header of its own";
        return Err(EnvelopeError::invalid("datacontenttype", reason));
    }
    let mut required = |name: &'static str| {
        attributes.remove(name).ok_or(EnvelopeError::Missing { attribute: name })
    };
    attribute::check_spec_version(&required("specversion")?)?;
    let mut event = Event::new(required("id")?, required("source")?, required("type")?)?;
    for (name, value) in attributes {
        event.set_attribute(&name, value)?;
    }
    if let Some(content_type) = content_type {
        event.set_attribute("datacontenttype", content_type.to_owned())?;
    }
    event.data = if body.is_empty() { None } else { Some(body) };
    Ok(event)
}

/// From a generator of this process: a system call for each event would be dearer than the rest of it.
fn random_id() -> String {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string()
}

fn wrap_plain(
    headers: &HeaderMap,
    content_type: Option<&str>,
    body: Bytes,
    wrap: &WrapContext<'_>,
) -> Result<Event, EnvelopeError> {
    let mut event = Event::new(random_id(), wrap.source, DEFAULT_TYPE)?;
    event.set_attribute("datacontenttype", content_type.unwrap_or("text/plain").to_owned())?;
    event.set_attribute("topic", wrap.topic.to_owned())?;
    event.set_attribute("pubsubname", wrap.bus.to_owned())?;
    // Of our own making, so that it needs no look.
    event.attributes.insert("time".to_owned(), wrap.now.to_string());
    event.fill_trace(headers);
    Ok(event.with_data(body))
}
