//! An event as a NATS message, in the binary mode of CloudEvents: other NATS clients read it too. Pure.

use async_nats::HeaderMap;
use bytes::Bytes;
use http::{HeaderName, HeaderValue};

use crate::cloudevent::{
    EnvelopeError, Event, WrapContext, decode, encode_binary, encode_structured,
};
use duet_api::proto;

const STRUCTURED: &str = "application/cloudevents+json; charset=utf-8";

/// Names of the attributes that are numbers or booleans, separated by commas: a header says only text. Messages of other
/// clients have none, unless they know of it.
const TYPED: &str = "duet-typed";

/// The event's attributes as headers, and its data. Data that is an envelope itself travels in structured mode: to a
/// reader its type would say that it is the event.
pub(super) fn encode(event: &Event) -> (HeaderMap, Bytes) {
    let mut headers = HeaderMap::new();
    if event.attribute("datacontenttype").is_some_and(is_envelope) {
        headers.insert(http::header::CONTENT_TYPE.as_str(), STRUCTURED);
        return (headers, encode_structured(event, &[]));
    }
    let (attributes, data) = encode_binary(event);
    for (name, value) in &attributes {
        // Encoding leaves visible ASCII only.
        headers.insert(name.as_str(), value.to_str().unwrap_or_default());
    }
    let typed = event.typed_names();
    if !typed.is_empty() {
        headers.insert(TYPED, typed.as_str());
    }
    (headers, data)
}

/// Bytes of a message, as a server counts them.
pub(super) fn size(headers: &HeaderMap, data: &Bytes) -> usize {
    let line = |name: &str, value: &str| name.len() + value.len() + ": \r\n".len();
    let lines = headers.iter().flat_map(|(name, values)| {
        values.iter().map(move |value| line(name.as_ref(), value.as_str()))
    });
    "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>() + data.len()
}

/// The event of a message. What another client published without a CloudEvents envelope becomes the data of an event
/// whose `id` is its place in the stream.
pub(super) fn event(
    subject: &str,
    sequence: u64,
    headers: Option<&HeaderMap>,
    payload: Bytes,
) -> Result<Event, EnvelopeError> {
    let mut attributes = http::HeaderMap::new();
    for (name, values) in headers.into_iter().flat_map(HeaderMap::iter) {
        let name = AsRef::<str>::as_ref(name).to_ascii_lowercase();
        if name != "content-type" && !name.starts_with("ce-") {
            continue;
        }
        let Ok(name) = HeaderName::try_from(name) else { continue };
        for value in values {
            let value = HeaderValue::try_from(value.as_str()).map_err(|_invalid| {
                EnvelopeError::invalid(name.as_str(), "is not a header value")
            })?;
            // More than it has room for is no event of anybody's.
            attributes.try_append(name.clone(), value).map_err(|_full| EnvelopeError::Body {
                reason: "comes with too many headers".to_owned(),
            })?;
        }
    }
    let envelope = attributes.keys().any(|name| name.as_str().starts_with("ce-"))
        || attributes
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|value| value.to_str().is_ok_and(is_envelope));
    if !envelope {
        return foreign(subject, sequence, payload);
    }
    let now = jiff::Timestamp::UNIX_EPOCH;
    let wrap = WrapContext { source: subject, bus: "", topic: "", now };
    let mut events = decode(&attributes, payload, &wrap)?;
    let event = events.pop();
    let mut event =
        event.ok_or_else(|| EnvelopeError::Body { reason: "holds no event".to_owned() })?;
    if let Some(typed) = headers.and_then(|headers| headers.get(TYPED)) {
        event.note_typed(typed.as_str());
    }
    Ok(event)
}

fn is_envelope(content_type: &str) -> bool {
    content_type.trim_start().to_ascii_lowercase().starts_with("application/cloudevents")
}

/// A message that is no event, as the data of one.
pub(super) fn foreign(
    subject: &str,
    sequence: u64,
    payload: Bytes,
) -> Result<Event, EnvelopeError> {
    let event = Event::new(format!("{subject}.{sequence}"), subject, "io.nats.message")?;
    Ok(event.with_data(payload))
}

/// The event with its attributes changed by the bus.
pub(super) fn edit(
    event: Event,
    change: impl FnOnce(&mut std::collections::BTreeMap<String, String>),
) -> Result<Event, EnvelopeError> {
    let mut attributes = event.attributes().clone();
    change(&mut attributes);
    let mut raw = proto::Event::from(event);
    raw.attributes = attributes.into_iter().collect();
    raw.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloudevent::AttributeValue;

    #[test]
    fn an_event_survives_the_way_through_headers() {
        let event = Event::new("1 %ö", "/s", "t").unwrap();
        let event = event.with_attribute("datacontenttype", "text/plain").unwrap();
        let event = event.with_attribute("partitionkey", "a b").unwrap().with_data("x");
        let (headers, data) = encode(&event);
        let read = super::event("duet.t", 1, Some(&headers), data);
        assert_eq!(read, Ok(event));
    }

    #[test]
    fn numbers_and_booleans_survive_headers_and_the_buss_own_changes() {
        let event = Event::new("1", "/s", "t").unwrap().with_attribute("note", "7").unwrap();
        let event = event.with_literal("urgent", "true").unwrap();
        let event = event.with_literal("priority", "5").unwrap().with_data("x");
        let (headers, data) = encode(&event);
        assert_eq!(headers.get("ce-priority").unwrap().as_str(), "5", "other clients read it");
        let read = super::event("duet.t", 1, Some(&headers), data.clone());
        assert_eq!(read, Ok(event.clone()));
        let edited = edit(event.clone(), |attributes| {
            attributes.insert("deadletterattempts".into(), "3".into());
            attributes.remove("urgent");
        });
        let values = edited.unwrap();
        let values: Vec<_> = values.values().collect();
        let expected = [
            ("deadletterattempts", AttributeValue::String("3")),
            ("note", AttributeValue::String("7")),
            ("priority", AttributeValue::Number("5")),
        ];
        assert_eq!(values, expected);
        // Of another client, or of a version that does not know it.
        let mut without = HeaderMap::new();
        for (name, values) in headers.iter() {
            if AsRef::<str>::as_ref(name) != TYPED {
                without.insert(name.clone(), values[0].clone());
            }
        }
        let read = super::event("duet.t", 1, Some(&without), data).unwrap();
        assert_eq!(read.attributes(), event.attributes());
        assert!(read.values().all(|(_, value)| matches!(value, AttributeValue::String(_))));
    }

    #[test]
    fn an_event_without_types_has_no_header_for_them() {
        let event = Event::new("1", "/s", "t").unwrap().with_attribute("note", "7").unwrap();
        let (headers, _) = encode(&event);
        assert!(headers.get(TYPED).is_none(), "{headers:?}");
    }

    #[test]
    fn an_envelope_as_data_stays_data() {
        let inner = r#"{"specversion": "1.0", "id": "inner", "source": "/s", "type": "t"}"#;
        let event = Event::new("outer", "/s", "t").unwrap();
        let event = event.with_attribute("datacontenttype", "application/cloudevents+json");
        let event = event.unwrap().with_data(inner);
        let event = event.with_literal("priority", "5").unwrap();
        let (headers, data) = encode(&event);
        let read = super::event("duet.t", 1, Some(&headers), data);
        assert_eq!(read, Ok(event));
    }

    #[test]
    fn what_is_no_event_becomes_the_data_of_one() {
        let event = event("duet.t", 7, None, "plain".into()).unwrap();
        assert_eq!((event.id(), event.source()), ("duet.t.7", "duet.t"));
        assert_eq!(event.data().unwrap().as_ref(), b"plain");
    }

    #[test]
    fn a_broken_envelope_is_named() {
        let mut headers = HeaderMap::new();
        headers.insert("ce-id", "1");
        headers.insert("ce-specversion", "1.0");
        assert!(event("duet.t", 1, Some(&headers), Bytes::new()).is_err());
    }
}
