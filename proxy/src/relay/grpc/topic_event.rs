//! An event, or several, as Dapr's gRPC carries them, and what the application's answer means. Pure.

use std::collections::HashMap;

use duet_api::dapr::runtime::v1::topic_event_bulk_request_entry::Event as Entry;
use duet_api::dapr::runtime::v1::topic_event_response::TopicEventResponseStatus;
use duet_api::dapr::runtime::v1::{
    TopicEventBulkRequest, TopicEventBulkRequestEntry, TopicEventBulkResponse, TopicEventCeRequest,
    TopicEventRequest, TopicEventResponse,
};
use duet_events::bus::{AppAnswer, Delivery, SubscriptionSpec};
use duet_events::cloudevent::{AttributeValue, STRUCTURED_CONTENT_TYPE};
use http::StatusCode;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::{Code, Status};
use uuid::Uuid;

use super::super::receive::{ATTEMPT, DELIVERY};
use crate::http::grpc;

/// A number of `google.protobuf.Struct` has each whole number below this, and not each above.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// The message for one delivery.
pub(super) fn request(delivery: &Delivery, spec: &SubscriptionSpec) -> TopicEventRequest {
    let event = &delivery.event;
    let own = ["datacontenttype", "topic", "pubsubname"];
    let extensions = event.values().filter(|(name, _)| !own.contains(name));
    TopicEventRequest {
        id: event.id().to_owned(),
        source: event.source().to_owned(),
        r#type: event.event_type().to_owned(),
        spec_version: "1.0".to_owned(),
        // CloudEvents: data without a content type is JSON.
        data_content_type: event.data_content_type().unwrap_or("application/json").to_owned(),
        data: event.data().cloned().unwrap_or_default(),
        topic: spec.topic.clone(),
        pubsub_name: spec.bus.clone(),
        path: delivery.path.clone().unwrap_or_else(|| spec.path.clone()),
        extensions: Some(Struct {
            fields: extensions.map(|(name, value)| (name.to_owned(), extension(value))).collect(),
        }),
    }
}

fn extension(value: AttributeValue<'_>) -> Value {
    let kind = match value {
        AttributeValue::String(text) => Kind::StringValue(text.to_owned()),
        AttributeValue::Boolean(yes) => Kind::BoolValue(yes),
        AttributeValue::Number(json) => number(json),
    };
    Value { kind: Some(kind) }
}

/// A whole number that would become another one, and one that is too large, stays the text that it was written as.
fn number(json: &str) -> Kind {
    let whole = !json.contains(['.', 'e', 'E']);
    match json.parse::<f64>() {
        Ok(number) if number.abs() < EXACT || (number.is_finite() && !whole) => {
            Kind::NumberValue(number)
        }
        Ok(_) | Err(_) => Kind::StringValue(json.to_owned()),
    }
}

/// The message for one delivery on a stream, where no metadata goes with it: the extensions have what else there is to
/// say. Attributes have no dashes in their names.
pub(super) fn streamed(
    delivery: &Delivery,
    token: &str,
    spec: &SubscriptionSpec,
) -> TopicEventRequest {
    let mut event = request(delivery, spec);
    let value = |text: String| Value { kind: Some(Kind::StringValue(text)) };
    event.extensions.get_or_insert_default().fields.extend([
        (DELIVERY.as_str().to_owned(), value(token.to_owned())),
        (ATTEMPT.as_str().to_owned(), value(delivery.attempt.to_string())),
    ]);
    event
}

/// The message for several deliveries of one path. An entry is called by its delivery's number.
pub(super) fn bulk(deliveries: &[Delivery], spec: &SubscriptionSpec) -> TopicEventBulkRequest {
    let path = deliveries.first().and_then(|first| first.path.clone());
    TopicEventBulkRequest {
        id: Uuid::new_v4().to_string(),
        entries: deliveries.iter().map(|delivery| entry(delivery, spec)).collect(),
        metadata: HashMap::new(),
        topic: spec.topic.clone(),
        pubsub_name: spec.bus.clone(),
        r#type: "com.dapr.event.sent.bulk".to_owned(),
        path: path.unwrap_or_else(|| spec.path.clone()),
    }
}

fn entry(delivery: &Delivery, spec: &SubscriptionSpec) -> TopicEventBulkRequestEntry {
    let one = request(delivery, spec);
    let (event, content_type) = if spec.raw_payload {
        (Entry::Bytes(one.data.to_vec()), one.data_content_type)
    } else {
        let event = TopicEventCeRequest {
            id: one.id,
            source: one.source,
            r#type: one.r#type,
            spec_version: one.spec_version,
            data_content_type: one.data_content_type,
            data: one.data,
            extensions: one.extensions,
        };
        (Entry::CloudEvent(event), STRUCTURED_CONTENT_TYPE.to_owned())
    };
    let attempt = (ATTEMPT.as_str().to_owned(), delivery.attempt.to_string());
    TopicEventBulkRequestEntry {
        entry_id: delivery.id.to_string(),
        event: Some(event),
        content_type,
        metadata: HashMap::from([attempt]),
    }
}

/// One answer for each delivery. Whoever is not named is tried again.
pub(super) fn outcomes(
    response: &TopicEventBulkResponse,
    deliveries: &[Delivery],
) -> Vec<AppAnswer> {
    let statuses = response.statuses.iter().map(|entry| (entry.entry_id.as_str(), entry.status));
    let statuses: HashMap<&str, i32> = statuses.collect();
    let answer = |delivery: &Delivery| match statuses.get(delivery.id.to_string().as_str()) {
        Some(status) => outcome(Some(TopicEventResponse { status: *status })),
        None => AppAnswer::AskedToRetry { status: 200 },
    };
    deliveries.iter().map(answer).collect()
}

/// What the application's word means. A missing one is success, as the message's default is.
pub(super) fn outcome(response: Option<TopicEventResponse>) -> AppAnswer {
    let status = response.map_or(0, |response| response.status);
    match TopicEventResponseStatus::try_from(status) {
        Ok(TopicEventResponseStatus::Success) => AppAnswer::Handled,
        Ok(TopicEventResponseStatus::Drop) => AppAnswer::Dropped { status: 200 },
        // A word that is not known yet is no reason to lose the event.
        Ok(TopicEventResponseStatus::Retry) | Err(_) => AppAnswer::AskedToRetry { status: 200 },
    }
}

/// What the application's failure means. `UNIMPLEMENTED`, as 404 over HTTP: no handler, and trying again will not make one.
/// `NOT_FOUND` is the handler's own word for something else.
pub(super) fn failure(status: &Status) -> AppAnswer {
    let code = status.code();
    let status = if code == Code::Unimplemented {
        StatusCode::NOT_FOUND
    } else if code == Code::NotFound {
        StatusCode::INTERNAL_SERVER_ERROR
    } else {
        grpc::status(code)
    };
    AppAnswer::Failed { status: status.as_u16() }
}

#[cfg(test)]
mod tests {
    use duet_api::dapr::runtime::v1::TopicEventBulkResponseEntry;
    use duet_events::cloudevent::Event;

    use super::*;

    fn delivery(id: u64) -> Delivery {
        let event = Event::new(id.to_string(), "/s", "t").unwrap().with_data("x");
        Delivery { id, position: id, attempt: 2, generation: 0, event, path: None }
    }

    #[test]
    fn every_entry_of_a_bulk_has_its_own_answer() {
        let spec = SubscriptionSpec::new("shop/a", "default", "news").unwrap();
        let deliveries = [delivery(7), delivery(8), delivery(9)];
        let request = bulk(&deliveries, &spec);
        assert_eq!((request.entries.len(), &*request.topic), (3, "news"));
        let first = &request.entries[0];
        assert_eq!((&*first.entry_id, &*first.metadata["duet-delivery-attempt"]), ("7", "2"));
        assert!(matches!(&first.event, Some(Entry::CloudEvent(event)) if event.id == "7"));
        let raw = SubscriptionSpec { raw_payload: true, ..spec };
        let entry = &bulk(&deliveries, &raw).entries[0];
        assert_eq!(entry.event, Some(Entry::Bytes(b"x".to_vec())));
        let say = |id: &str, status| TopicEventBulkResponseEntry { entry_id: id.into(), status };
        let response = TopicEventBulkResponse { statuses: vec![say("8", 2), say("7", 0)] };
        let expected = [
            AppAnswer::Handled,
            AppAnswer::Dropped { status: 200 },
            AppAnswer::AskedToRetry { status: 200 },
        ];
        assert_eq!(outcomes(&response, &deliveries), expected);
    }

    #[test]
    fn an_event_keeps_all_that_it_has() {
        let event = Event::new("1", "/s", "t").unwrap().with_data("{}");
        let event = event.with_attribute("subject", "me").unwrap();
        let event = event.with_attribute("datacontenttype", "text/plain").unwrap();
        let path = Some("/route".to_owned());
        let delivery = Delivery { id: 7, position: 1, attempt: 1, generation: 0, event, path };
        let spec = SubscriptionSpec::new("shop/a", "default", "news").unwrap();
        let request = request(&delivery, &spec);
        assert_eq!((&*request.id, &*request.source, &*request.r#type), ("1", "/s", "t"));
        assert_eq!((&*request.topic, &*request.pubsub_name), ("news", "default"));
        assert_eq!((&*request.path, &*request.data_content_type), ("/route", "text/plain"));
        assert_eq!(request.data, "{}");
        let fields = request.extensions.unwrap().fields;
        assert_eq!(fields.keys().collect::<Vec<_>>(), ["subject"]);
    }

    #[test]
    fn extensions_keep_their_types() {
        let mut delivery = delivery(1);
        for (name, json) in [
            ("urgent", "true"),
            ("priority", "5"),
            ("rate", "-1.50"),
            ("mass", "1e30"),
            ("serial", "9007199254740993"),
            ("huge", "1e999"),
        ] {
            delivery.event = delivery.event.with_literal(name, json).unwrap();
        }
        delivery.event = delivery.event.with_attribute("note", "5").unwrap();
        let spec = SubscriptionSpec::new("shop/a", "default", "news").unwrap();
        let text = |text: &str| Kind::StringValue(text.to_owned());
        let expected = [
            ("urgent", Kind::BoolValue(true)),
            ("priority", Kind::NumberValue(5.0)),
            ("rate", Kind::NumberValue(-1.5)),
            ("mass", Kind::NumberValue(1e30)),
            ("serial", text("9007199254740993")),
            ("huge", text("1e999")),
            ("note", text("5")),
        ];
        let streamed = streamed(&delivery, "token", &spec).extensions.unwrap().fields;
        let bulk = bulk(&[delivery], &spec).entries.remove(0).event;
        let Some(Entry::CloudEvent(bulk)) = bulk else { panic!("{bulk:?}") };
        let bulk = bulk.extensions.unwrap().fields;
        for (name, kind) in expected {
            assert_eq!(streamed[name].kind, Some(kind.clone()), "{name}");
            assert_eq!(bulk[name].kind, Some(kind), "{name}");
        }
    }

    #[test]
    fn a_word_that_nobody_knows_is_a_retry() {
        let answer = |status| outcome(Some(TopicEventResponse { status }));
        assert_eq!(outcome(None), AppAnswer::Handled);
        assert_eq!(answer(0), AppAnswer::Handled);
        assert_eq!(answer(1), AppAnswer::AskedToRetry { status: 200 });
        assert_eq!(answer(2), AppAnswer::Dropped { status: 200 });
        assert_eq!(answer(9), AppAnswer::AskedToRetry { status: 200 });
        assert_eq!(failure(&Status::unimplemented("")), AppAnswer::Failed { status: 404 });
        assert_eq!(failure(&Status::unavailable("")), AppAnswer::Failed { status: 503 });
        assert_eq!(failure(&Status::not_found("")), AppAnswer::Failed { status: 500 });
    }
}
