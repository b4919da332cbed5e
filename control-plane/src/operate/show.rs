//! Events as an operator sees them: in the JSON format of `CloudEvents`, within an answer that every JSON library reads.
//! What applications get is the data as it was published; this is not.

use axum::http::StatusCode;
use duet_events::Event;
use duet_events::cloudevent::encode_structured;
use serde_json::{Map, Value};

use super::Failure;

/// Deepest data that is shown as it is. Libraries take some 128 levels, and answers put a few around an event.
const MAX_DEPTH: usize = 100;
/// Data of this type is carried as bytes.
const BYTES: &str = "application/octet-stream";
const CONTENT_TYPE: &str = "datacontenttype";

/// The event. A publisher's data has to be JSON, but what JSON allows is more than libraries read (half of a surrogate
/// pair, `1e999`, hundreds of levels): such data is shown as `data_base64`, so that it hides neither itself nor others.
pub(super) fn structured(event: &Event) -> Result<Value, Failure> {
    let shown = serde_json::from_slice::<Map<String, Value>>(&encode_structured(event, &[]));
    match shown {
        Ok(shown) if shown.values().all(|value| is_within(value, MAX_DEPTH)) => Ok(shown.into()),
        Ok(_) | Err(_) => as_bytes(event),
    }
}

/// The event with its data as `data_base64`.
fn as_bytes(event: &Event) -> Result<Value, Failure> {
    let failed = |why: &dyn std::fmt::Display| Failure {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        message: format!("event {:?} cannot be shown: {why}", event.id()),
    };
    let bytes = event.clone().with_attribute(CONTENT_TYPE, BYTES).map_err(|why| failed(&why))?;
    let shown = serde_json::from_slice(&encode_structured(&bytes, &[]));
    let mut shown: Map<String, Value> = shown.map_err(|why| failed(&why))?;
    match event.data_content_type() {
        Some(given) => shown.insert(CONTENT_TYPE.to_owned(), given.into()),
        None => shown.remove(CONTENT_TYPE),
    };
    Ok(shown.into())
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
            let shown = structured(&event(data)).ok().unwrap();
            assert_eq!(shown["data"], serde_json::from_str::<Value>(data).unwrap(), "{data}");
            assert_eq!(shown.get("data_base64"), None);
        }
        assert_eq!(
            structured(&Event::new("1", "/s", "a").unwrap()).ok().unwrap().get("data"),
            None
        );
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
                    event = event.with_attribute(CONTENT_TYPE, content_type).unwrap();
                }
                let shown = structured(&event).ok().unwrap();
                assert_eq!((&shown["id"], &shown["tenant"]), (&json!("1"), &json!("b")));
                assert_eq!(shown.get(CONTENT_TYPE).and_then(Value::as_str), content_type);
                assert_eq!(shown.get("data"), None);
                let bytes = shown["data_base64"].as_str().unwrap();
                assert!(base64.is_none_or(|expected| bytes == expected), "{bytes}");
            }
        }
    }
}
