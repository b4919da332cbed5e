//! An event as Dapr's gRPC carries it, and what the application's answer means. Pure.

use duet_api::dapr::runtime::v1::topic_event_response::TopicEventResponseStatus;
use duet_api::dapr::runtime::v1::{TopicEventRequest, TopicEventResponse};
use duet_events::bus::{AppAnswer, Delivery, SubscriptionSpec};
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::{Code, Status};

use crate::http::grpc;

/// The message for one delivery.
pub(super) fn request(delivery: &Delivery, spec: &SubscriptionSpec) -> TopicEventRequest {
    let event = &delivery.event;
    let own = ["datacontenttype", "topic", "pubsubname"];
    let extensions = event.attributes().iter().filter(|(name, _)| !own.contains(&name.as_str()));
    let value = |text: &String| Value { kind: Some(Kind::StringValue(text.clone())) };
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
            fields: extensions.map(|(name, text)| (name.clone(), value(text))).collect(),
        }),
    }
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

/// What the application's failure means. `UNIMPLEMENTED`: no handler, and trying again will not make one.
pub(super) fn failure(status: &Status) -> AppAnswer {
    if status.code() == Code::Unimplemented {
        return AppAnswer::Failed { status: 404 };
    }
    AppAnswer::Failed { status: grpc::status(status.code()).as_u16() }
}

#[cfg(test)]
mod tests {
    use duet_events::cloudevent::Event;

    use super::*;

    #[test]
    fn an_event_keeps_all_that_it_has() {
        let event = Event::new("1", "/s", "t").unwrap().with_data("{}");
        let event = event.with_attribute("subject", "me").unwrap();
        let event = event.with_attribute("datacontenttype", "text/plain").unwrap();
        let delivery =
            Delivery { id: 7, position: 1, attempt: 1, event, path: Some("/route".to_owned()) };
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
    fn a_word_that_nobody_knows_is_a_retry() {
        let answer = |status| outcome(Some(TopicEventResponse { status }));
        assert_eq!(outcome(None), AppAnswer::Handled);
        assert_eq!(answer(0), AppAnswer::Handled);
        assert_eq!(answer(1), AppAnswer::AskedToRetry { status: 200 });
        assert_eq!(answer(2), AppAnswer::Dropped { status: 200 });
        assert_eq!(answer(9), AppAnswer::AskedToRetry { status: 200 });
        assert_eq!(failure(&Status::unimplemented("")), AppAnswer::Failed { status: 404 });
        assert_eq!(failure(&Status::unavailable("")), AppAnswer::Failed { status: 503 });
    }
}
