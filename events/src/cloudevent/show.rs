//! Events as operators see them: in the JSON format, within an answer that every JSON library reads. What applications get
//! is the data as it was published; this is not.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::{Event, encode_structured};

/// Deepest data that is shown as it is. Libraries take some 128 levels, and answers put a few around an event.
const MAX_DEPTH: usize = 100;

/// The event as a JSON object. A publisher's data has to be JSON, but what JSON allows is more than libraries read (half of
/// a surrogate pair, `1e999`, hundreds of levels): such data is shown as `data_base64`, so that it hides neither itself nor
/// others. So is that of an event with an attribute that is such a number.
#[must_use]
pub fn shown(event: &Event) -> Map<String, Value> {
    let shown = serde_json::from_slice::<Map<String, Value>>(&encode_structured(event, &[]));
    let shown = shown.ok().filter(|shown| shown.values().all(|value| is_within(value, MAX_DEPTH)));
    shown.unwrap_or_else(|| as_bytes(event))
}

/// The event with its data as `data_base64`.
fn as_bytes(event: &Event) -> Map<String, Value> {
    let (id, source, event_type) = (event.id(), event.source(), event.event_type());
    let required = [("specversion", "1.0"), ("id", id), ("source", source), ("type", event_type)];
    let data = STANDARD.encode(event.data().map(AsRef::as_ref).unwrap_or_default());
    let strings = required.into_iter().chain([("data_base64", data.as_str())]);
    let mut members: Map<String, Value> =
        strings.map(|(name, value)| (name.to_owned(), value.into())).collect();
    for (name, value) in event.values() {
        // A number that libraries do not read is shown as text.
        let text = || event.attribute(name).unwrap_or_default().into();
        let value = serde_json::to_value(value).unwrap_or_else(|_unread| text());
        members.insert(name.to_owned(), value);
    }
    members
}

/// Whether nothing nests deeper.
fn is_within(value: &Value, depth: usize) -> bool {
    let below = depth.checked_sub(1);
    match value {
        Value::Array(values) => {
            below.is_some_and(|depth| values.iter().all(|value| is_within(value, depth)))
        }
        Value::Object(members) => {
            below.is_some_and(|depth| members.values().all(|value| is_within(value, depth)))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nested(depth: usize) -> String {
        format!("{}7{}", "[".repeat(depth), "]".repeat(depth))
    }

    fn event(data: &str) -> Event {
        Event::new("1", "/s", "a").unwrap().with_data(data.to_owned())
    }

    #[test]
    fn data_that_libraries_read_is_shown_as_it_is() {
        for data in ["1", "{\"a\": [null, 1.5, \"\u{fc}\"]}", &nested(MAX_DEPTH)] {
            let shown = shown(&event(data));
            assert_eq!(shown["data"], serde_json::from_str::<Value>(data).unwrap(), "{data}");
            assert_eq!(shown.get("data_base64"), None);
        }
        assert_eq!(shown(&Event::new("1", "/s", "a").unwrap()).get("data"), None);
    }

    #[test]
    fn numbers_and_booleans_are_shown_as_what_they_are() {
        let event = event(&nested(MAX_DEPTH + 1)).with_literal("urgent", "true").unwrap();
        let event = event.with_literal("priority", "5").unwrap();
        for event in [event.clone().with_data("1"), event.clone()] {
            let shown = shown(&event);
            assert_eq!((&shown["priority"], &shown["urgent"]), (&json!(5), &json!(true)));
        }
        let shown = shown(&event.with_literal("huge", "1e999").unwrap());
        assert_eq!((&shown["priority"], &shown["huge"]), (&json!(5), &json!("1e999")));
    }

    #[test]
    fn other_data_is_shown_as_bytes_with_all_the_rest() {
        for content_type in [None, Some("application/json"), Some("application/x+json")] {
            for (data, base64) in [
                (r#""\ud83d""#, Some("Ilx1ZDgzZCI=")),
                ("1e999", Some("MWU5OTk=")),
                (&*nested(MAX_DEPTH + 1), None),
                (&*nested(10_000), None),
            ] {
                let mut event = event(data).with_attribute("tenant", "b").unwrap();
                if let Some(content_type) = content_type {
                    event = event.with_attribute("datacontenttype", content_type).unwrap();
                }
                let shown = shown(&event);
                assert_eq!((&shown["id"], &shown["tenant"]), (&json!("1"), &json!("b")));
                assert_eq!(shown.get("datacontenttype").and_then(Value::as_str), content_type);
                assert_eq!(shown.get("data"), None);
                let bytes = shown["data_base64"].as_str().unwrap();
                assert!(base64.is_none_or(|expected| bytes == expected), "{bytes}");
            }
        }
    }
}
