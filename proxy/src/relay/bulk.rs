//! Several events in one request to the application, and its answer for each: Dapr's bulk subscribe.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use bytes::Bytes;
use duet_events::AnyCase;
use duet_events::bus::{AppAnswer, Delivery, SubscriptionSpec};
use duet_events::cloudevent::{STRUCTURED_CONTENT_TYPE, encode_structured};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use super::receive::ATTEMPT;

/// The request's body. An entry is called by its delivery's number.
pub(super) fn encode(spec: &SubscriptionSpec, deliveries: &[Delivery]) -> Bytes {
    let envelope = Envelope {
        id: Uuid::new_v4().to_string(),
        entries: deliveries.iter().map(|delivery| entry(spec, delivery)).collect(),
        metadata: BTreeMap::new(),
        pubsubname: &spec.bus,
        topic: &spec.topic,
        kind: "com.dapr.event.sent.bulk",
    };
    // Strings and checked raw JSON: writing them into memory cannot fail.
    serde_json::to_vec(&envelope).unwrap_or_default().into()
}

#[derive(Serialize)]
struct Envelope<'a> {
    id: String,
    entries: Vec<Entry<'a>>,
    metadata: BTreeMap<String, String>,
    pubsubname: &'a str,
    topic: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    entry_id: String,
    /// Byte for byte: a JSON value in memory has neither every number nor every depth that an event may have.
    event: Cow<'a, RawValue>,
    content_type: &'a str,
    metadata: BTreeMap<String, String>,
}

fn entry<'a>(spec: &SubscriptionSpec, delivery: &'a Delivery) -> Entry<'a> {
    let event = &delivery.event;
    let (content_type, json) = if spec.raw_payload {
        let data = event.data().cloned().unwrap_or_default();
        let text = base64::engine::general_purpose::STANDARD.encode(data);
        // Whatever the bytes are: SDKs undo base64 where they are told of bytes.
        ("application/octet-stream", to_raw_value(&text))
    } else {
        let extra = [("pubsubname", spec.bus.as_str()), ("topic", spec.topic.as_str())];
        (STRUCTURED_CONTENT_TYPE, serde_json::from_slice(&encode_structured(event, &extra)))
    };
    Entry {
        entry_id: delivery.id.to_string(),
        // Both are JSON that was just written.
        event: json.map_or(Cow::Borrowed(RawValue::NULL), Cow::Owned),
        content_type,
        metadata: BTreeMap::from([(ATTEMPT.to_string(), delivery.attempt.to_string())]),
    }
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow, default)]
    statuses: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EntryStatus {
    entry_id: String,
    status: String,
}

/// One answer for each delivery. Whoever is not named, or with a word that nobody knows, is tried again.
pub(super) fn answers(status: u16, body: &[u8], deliveries: &[Delivery]) -> Vec<AppAnswer> {
    if !(200..300).contains(&status) {
        return vec![AppAnswer::Failed { status }; deliveries.len()];
    }
    let answer = serde_json::from_slice::<AnyCase<Answer<'_>>>(body);
    let statuses = answer.map(|AnyCase(answer)| answer.statuses).unwrap_or_default();
    let statuses = statuses.into_iter().filter_map(|raw| {
        let AnyCase(entry): AnyCase<EntryStatus> = serde_json::from_str(raw.get()).ok()?;
        Some((entry.entry_id, entry.status))
    });
    let statuses: HashMap<String, String> = statuses.collect();
    let answer =
        |delivery: &Delivery| match statuses.get(&delivery.id.to_string()).map(String::as_str) {
            Some("SUCCESS") => AppAnswer::Handled,
            Some("DROP") => AppAnswer::Dropped { status },
            _ => AppAnswer::AskedToRetry { status },
        };
    deliveries.iter().map(answer).collect()
}

#[cfg(test)]
mod tests {
    use duet_events::Event;

    use super::*;

    fn deliveries() -> Vec<Delivery> {
        let delivery = |id: u64| Delivery {
            id,
            position: id,
            attempt: 1,
            generation: 0,
            event: Event::new(id.to_string(), "/s", "t").unwrap(),
            path: None,
        };
        (1..=4).map(delivery).collect()
    }

    #[test]
    fn every_entry_has_its_own_answer() {
        let body =
            br#"{"statuses":[{"entryId":"2","status":"DROP"},{"entryId":"1","status":"SUCCESS"},
            {"entryId":"3","status":"WHAT"},{"entryId":9}]}"#;
        let retry = AppAnswer::AskedToRetry { status: 200 };
        let expected = vec![
            AppAnswer::Handled,
            AppAnswer::Dropped { status: 200 },
            retry.clone(),
            retry.clone(),
        ];
        assert_eq!(answers(200, body, &deliveries()), expected);
        assert_eq!(answers(200, b"ok", &deliveries()), vec![retry; 4]);
        assert_eq!(answers(500, body, &deliveries()), vec![AppAnswer::Failed { status: 500 }; 4]);
    }

    #[test]
    fn names_count_whatever_their_case() {
        for body in [
            r#"{"statuses":[{"entryId":"1","status":"SUCCESS"},{"entryId":"2","status":"DROP"}]}"#,
            r#"{"Statuses":[{"EntryId":"1","Status":"SUCCESS"},{"EntryId":"2","Status":"DROP"}]}"#,
            r#"{"statuses":[{"entryID":"1","status":"SUCCESS"},{"entryID":"2","status":"DROP"}]}"#,
        ] {
            let answers = answers(200, body.as_bytes(), &deliveries()[..2]);
            assert_eq!(answers, [AppAnswer::Handled, AppAnswer::Dropped { status: 200 }], "{body}");
        }
    }

    #[test]
    fn the_envelope_is_daprs() {
        let spec = SubscriptionSpec::new("a/b", "default", "t").unwrap();
        let envelope: serde_json::Value =
            serde_json::from_slice(&encode(&spec, &deliveries())).unwrap();
        assert_eq!(envelope["topic"], "t");
        assert_eq!(envelope["entries"][1]["entryId"], "2");
        assert_eq!(envelope["entries"][1]["event"]["id"], "2");
        assert_eq!(envelope["entries"][1]["contentType"], "application/cloudevents+json");
        assert_eq!(envelope["entries"][1]["metadata"]["duet-delivery-attempt"], "1");
        let raw = SubscriptionSpec { raw_payload: true, ..spec };
        let mut one = deliveries();
        let event = one[0].event.clone().with_data("x");
        one[0].event = event.with_attribute("datacontenttype", "text/plain").unwrap();
        let envelope: serde_json::Value = serde_json::from_slice(&encode(&raw, &one)).unwrap();
        let entry = &envelope["entries"][0];
        assert_eq!(entry["event"], "eA==");
        assert_eq!(entry["contentType"], "application/octet-stream");
    }

    #[test]
    fn data_stays_as_it_was_written() {
        let spec = SubscriptionSpec::new("a/b", "default", "t").unwrap();
        for data in [
            "1e400",
            "18446744073709551616",
            "0.10",
            &format!("{0}{1}", "[".repeat(300), "]".repeat(300)),
        ] {
            let mut one = deliveries();
            one[0].event = one[0].event.clone().with_data(data.to_owned());
            let envelope = encode(&spec, &one);
            let sent = format!("\"data\":{data}");
            assert!(String::from_utf8_lossy(&envelope).contains(&sent), "{data}");
        }
    }
}
