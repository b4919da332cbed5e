//! What a peer of the streaming subscription sees.

use std::time::Duration;

use duet_api::dapr::runtime::v1::dapr_client::DaprClient;
use duet_api::dapr::runtime::v1::subscribe_topic_events_request_alpha1::SubscribeTopicEventsRequestType as Asked;
use duet_api::dapr::runtime::v1::subscribe_topic_events_response_alpha1::SubscribeTopicEventsResponseType as Said;
use duet_api::dapr::runtime::v1::{
    PublishEventRequest, SubscribeTopicEventsRequestAlpha1,
    SubscribeTopicEventsRequestInitialAlpha1, SubscribeTopicEventsRequestProcessedAlpha1,
    TopicEventRequest, TopicEventResponse,
};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::Backend;
use duet_tests::{SOON, eventually, http, on_both_buses};
use prost_types::value::Kind;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use crate::{channel, publish};

pub(crate) fn initial(bus: &str, topic: &str) -> SubscribeTopicEventsRequestAlpha1 {
    let initial = SubscribeTopicEventsRequestInitialAlpha1 {
        pubsub_name: bus.to_owned(),
        topic: topic.to_owned(),
        ..Default::default()
    };
    SubscribeTopicEventsRequestAlpha1 {
        subscribe_topic_events_request_type: Some(Asked::InitialRequest(initial)),
    }
}

pub(crate) fn processed(id: &str, status: i32) -> SubscribeTopicEventsRequestAlpha1 {
    let processed = SubscribeTopicEventsRequestProcessedAlpha1 {
        id: id.to_owned(),
        status: Some(TopicEventResponse { status }),
    };
    SubscribeTopicEventsRequestAlpha1 {
        subscribe_topic_events_request_type: Some(Asked::EventProcessed(processed)),
    }
}

pub(crate) type Said1 = duet_api::dapr::runtime::v1::SubscribeTopicEventsResponseAlpha1;

pub(crate) async fn open(
    dapr: &mut DaprClient<Channel>,
    topic: &str,
) -> (mpsc::Sender<SubscribeTopicEventsRequestAlpha1>, Streaming<Said1>) {
    let (answers, receiver) = mpsc::channel(8);
    answers.send(initial("default", topic)).await.unwrap();
    let events = dapr.subscribe_topic_events_alpha1(ReceiverStream::new(receiver)).await;
    let mut events = events.unwrap().into_inner();
    let first = events.message().await.unwrap().unwrap();
    let first = first.subscribe_topic_events_response_type;
    assert!(matches!(first, Some(Said::InitialResponse(_))), "{first:?}");
    (answers, events)
}

/// Id of the next event.
async fn next(events: &mut Streaming<Said1>) -> String {
    next_event(events).await.id
}

async fn next_event(events: &mut Streaming<Said1>) -> TopicEventRequest {
    let message = tokio::time::timeout(SOON, events.message()).await.expect("an event").unwrap();
    match message.unwrap().subscribe_topic_events_response_type {
        Some(Said::EventMessage(event)) => event,
        other => panic!("{other:?}"),
    }
}

on_both_buses!(
    the_end_of_a_stream_gives_unanswered_events_back_unspent,
    a_stream_goes_on_after_a_restart_of_the_control_plane,
);

async fn the_end_of_a_stream_gives_unanswered_events_back_unspent(backend: &Backend) {
    let control_plane = ControlPlane::start(&[("bus.yaml", &backend.yaml())]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("streamer")).await;
    let mut dapr = DaprClient::new(channel(&sidecar).await);
    let (answers, mut events) = open(&mut dapr, "orders").await;
    for text in ["a", "b"] {
        publish(&sidecar, text).await;
    }
    assert_eq!((next(&mut events).await, next(&mut events).await), ("a".into(), "b".into()));
    // An answer to what nobody asked is of no consequence.
    answers.send(processed("unknown", 0)).await.unwrap();
    answers.send(processed("a", 0)).await.unwrap();
    eventually("the first one is done", SOON, || async {
        let acked = r#"duet_event_deliveries_total{outcome="ack""#;
        let metrics = http::text(sidecar.ports.metrics, "/metrics").await;
        metrics.lines().any(|line| line.starts_with(acked) && line.ends_with(" 1")).then_some(())
    })
    .await;
    drop((answers, events));

    // Given back by every stream that leaves: more often than there are attempts.
    for _ in 0..12 {
        let (answers, mut events) = open(&mut dapr, "orders").await;
        assert_eq!(next(&mut events).await, "b");
        drop((answers, events));
    }
    let (answers, mut events) = open(&mut dapr, "orders").await;
    assert_eq!(next(&mut events).await, "b", "never among the dead letters");
    answers.send(processed("b", 0)).await.unwrap();
    publish(&sidecar, "c").await;
    assert_eq!(next(&mut events).await, "c");
    // A second initial request is nonsense: said, and nothing is lost.
    answers.send(initial("default", "orders")).await.unwrap();
    let error = loop {
        match tokio::time::timeout(SOON, events.message()).await.expect("an end") {
            Ok(Some(_event)) => {}
            Ok(None) => panic!("it ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let (_answers, mut events) = open(&mut dapr, "orders").await;
    assert_eq!(next(&mut events).await, "c");
}

async fn a_stream_goes_on_after_a_restart_of_the_control_plane(backend: &Backend) {
    let mut control_plane = ControlPlane::start(&[("bus.yaml", &backend.yaml())]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("streamer")).await;
    let mut dapr = DaprClient::new(channel(&sidecar).await);
    let (answers, mut events) = open(&mut dapr, "orders").await;
    publish(&sidecar, "before").await;
    assert_eq!(next(&mut events).await, "before");
    answers.send(processed("before", 0)).await.unwrap();
    control_plane.kill();
    publish(&sidecar, "meanwhile").await;
    control_plane.restart().await;
    publish(&sidecar, "after").await;
    let mut seen = Vec::new();
    while !seen.contains(&"after".to_owned()) {
        let id = next(&mut events).await;
        answers.send(processed(&id, 0)).await.unwrap();
        seen.push(id);
    }
    // The answer to the first may have been lost with the control plane.
    seen.retain(|id| id != "before");
    assert_eq!(seen, ["meanwhile", "after"]);
}

#[tokio::test]
async fn an_event_says_how_to_ask_for_more_time_and_which_attempt_it_is() {
    let control_plane = ControlPlane::start(&[]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("streamer")).await;
    let mut dapr = DaprClient::new(channel(&sidecar).await);
    let (answers, mut events) = open(&mut dapr, "orders").await;
    publish(&sidecar, "a").await;
    for attempt in ["1", "2"] {
        let event = next_event(&mut events).await;
        let said = event.extensions.unwrap().fields;
        let said = |name: &str| match said[name].kind.clone() {
            Some(Kind::StringValue(text)) => text,
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(said("duet-delivery-attempt"), attempt);
        let (api, token) = (sidecar.ports.api, said("duet-delivery"));
        let url = format!("http://{api}/v1.0/deliveries/{token}/extend?by=5m");
        assert_eq!(http::client().post(&url).send().await.unwrap().status(), 204);
        // RETRY: it comes again.
        answers.send(processed("a", 1)).await.unwrap();
    }
}

#[tokio::test]
async fn numbers_and_booleans_among_the_attributes_come_as_such() {
    let control_plane = ControlPlane::start(&[]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("streamer")).await;
    let mut dapr = DaprClient::new(channel(&sidecar).await);
    let (_answers, mut events) = open(&mut dapr, "orders").await;
    let event = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","priority":5,"urgent":true,"note":"5"}"#;
    let request = PublishEventRequest {
        pubsub_name: "default".into(),
        topic: "orders".into(),
        data: event.into(),
        data_content_type: "application/cloudevents+json".into(),
        ..Default::default()
    };
    dapr.publish_event(request).await.unwrap();
    let said = next_event(&mut events).await.extensions.unwrap().fields;
    for (name, kind) in [
        ("priority", Kind::NumberValue(5.0)),
        ("urgent", Kind::BoolValue(true)),
        ("note", Kind::StringValue("5".to_owned())),
    ] {
        assert_eq!(said[name].kind, Some(kind), "{name}");
    }
}

#[tokio::test]
async fn of_two_events_with_one_id_the_second_waits_for_the_answer_to_the_first() {
    let control_plane = ControlPlane::start(&[]).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("streamer")).await;
    let mut dapr = DaprClient::new(channel(&sidecar).await);
    let (answers, mut events) = open(&mut dapr, "orders").await;
    for source in ["/a", "/b"] {
        let event = format!(r#"{{"specversion":"1.0","id":"1","source":"{source}","type":"t"}}"#);
        let url = format!("http://{}/v1.0/publish/default/orders", sidecar.ports.api);
        let request = http::client().post(url);
        let request = request.header("content-type", "application/cloudevents+json");
        assert_eq!(request.body(event).send().await.unwrap().status(), 204);
    }
    assert_eq!(next_event(&mut events).await.source, "/a");
    // Longer than a sidecar keeps the second one waiting, and gives it back.
    let second = tokio::time::timeout(Duration::from_millis(2500), events.message()).await;
    assert!(second.is_err(), "{second:?}");
    // RETRY, which is for nothing but the first one. Both come again, one after the other.
    answers.send(processed("1", 1)).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let event = next_event(&mut events).await;
        let attempt = event.extensions.unwrap().fields["duet-delivery-attempt"].kind.clone();
        seen.push((event.source, attempt));
        answers.send(processed("1", 0)).await.unwrap();
    }
    seen.sort_by(|one, other| one.0.cmp(&other.0));
    let attempt = |number: &str| Some(Kind::StringValue(number.to_owned()));
    assert_eq!(seen, [("/a".to_owned(), attempt("2")), ("/b".to_owned(), attempt("1"))]);
}
