//! What the gRPC API says to peers that talk nonsense.

use duet_api::dapr::common::v1::{HttpExtension, InvokeRequest};
use duet_api::dapr::runtime::v1::dapr_client::DaprClient;
use duet_api::dapr::runtime::v1::{
    BulkPublishRequest, BulkPublishRequestEntry, InvokeServiceRequest, PublishEventRequest,
    SetMetadataRequest, SubscribeTopicEventsRequestAlpha1,
};
use duet_api::health::HealthCheckRequest;
use duet_api::health::health_client::HealthClient;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use tonic::Code;
use tonic::transport::Endpoint;

use crate::streams::{initial, processed};
use crate::{SERVICES, channel};

const SECRET: &str = "\
apiVersion: duet.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: secret}
spec:
  targetRefs: [{kind: Topic, name: secret}]
  action: Deny
  rules: [{from: [{namespaces: [default]}]}]
";

#[tokio::test]
async fn the_grpc_api_names_what_is_wrong() {
    let resources = [("services.yaml", SERVICES), ("secret.yaml", SECRET)];
    let control_plane = ControlPlane::start(&resources).await;
    let sidecar = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let channel = channel(&sidecar).await;
    let mut dapr = DaprClient::new(channel.clone());
    let event = |bus: &str, topic: &str| PublishEventRequest {
        pubsub_name: bus.to_owned(),
        topic: topic.to_owned(),
        ..Default::default()
    };
    let long = "x".repeat(300);
    for (bus, topic, code) in [
        ("", "t", Code::InvalidArgument),
        ("default", "", Code::InvalidArgument),
        ("default", "a b", Code::InvalidArgument),
        ("default", long.as_str(), Code::InvalidArgument),
        ("nowhere", "t", Code::NotFound),
    ] {
        let status = dapr.publish_event(event(bus, topic)).await.unwrap_err();
        assert_eq!(status.code(), code, "{bus} {topic}: {status}");
    }
    let odd = PublishEventRequest { data_content_type: "a\nb".into(), ..event("default", "t") };
    assert_eq!(dapr.publish_event(odd).await.unwrap_err().code(), Code::InvalidArgument);
    let large = PublishEventRequest { data: vec![0; 5 << 20].into(), ..event("default", "t") };
    let status = dapr.publish_event(large).await.unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");

    let entry = |id: &str| BulkPublishRequestEntry { entry_id: id.into(), ..Default::default() };
    for entries in [vec![entry("")], vec![entry("a"), entry("a")]] {
        let bulk = BulkPublishRequest {
            pubsub_name: "default".into(),
            topic: "t".into(),
            entries,
            ..Default::default()
        };
        let status = dapr.bulk_publish_event(bulk).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("entry_id"), "{status}");
    }
    let one = r#"{"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}"#;
    let batch = BulkPublishRequestEntry {
        event: format!("[{one}, {one}]").into(),
        content_type: "application/cloudevents-batch+json".into(),
        ..entry("batch")
    };
    let bulk = BulkPublishRequest {
        pubsub_name: "default".into(),
        topic: "t".into(),
        entries: vec![batch],
        ..Default::default()
    };
    let failed = dapr.bulk_publish_event(bulk).await.unwrap().into_inner().failed_entries;
    assert_eq!(failed.len(), 1);
    assert!(failed[0].error.contains("not a batch"), "{failed:?}");

    let call = |id: &str, method: &str, verb: i32| InvokeServiceRequest {
        id: id.to_owned(),
        message: Some(InvokeRequest {
            method: method.to_owned(),
            http_extension: Some(HttpExtension { verb, querystring: String::new() }),
            ..Default::default()
        }),
    };
    for (request, code) in [
        (InvokeServiceRequest::default(), Code::InvalidArgument),
        (call("user@reader", "x", 1), Code::InvalidArgument),
        (call("", "x", 1), Code::InvalidArgument),
        (call("reader", "a b", 1), Code::InvalidArgument),
        (call("reader", "x", 99), Code::InvalidArgument),
        (call("reader", "x", 6), Code::InvalidArgument),
        (call("reader", "x", 1), Code::Unavailable),
    ] {
        let what = format!("{request:?}");
        let status = dapr.invoke_service(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{what}: {status}");
    }

    for (first, code) in [
        (processed("a", 0), Code::InvalidArgument),
        (SubscribeTopicEventsRequestAlpha1::default(), Code::InvalidArgument),
        (initial("nowhere", "t"), Code::NotFound),
        (initial("default", ""), Code::InvalidArgument),
    ] {
        let what = format!("{first:?}");
        let first = tokio_stream::iter([first]);
        let status = dapr.subscribe_topic_events_alpha1(first).await.unwrap_err();
        assert_eq!(status.code(), code, "{what}: {status}");
    }
    let denied = tokio_stream::iter([initial("default", "secret")]);
    let status = dapr.subscribe_topic_events_alpha1(denied).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let status = dapr.publish_event(event("default", "secret")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let nothing = tokio_stream::empty::<SubscribeTopicEventsRequestAlpha1>();
    let status = dapr.subscribe_topic_events_alpha1(nothing).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");

    let label = SetMetadataRequest { key: String::new(), value: "x".into() };
    assert_eq!(dapr.set_metadata(label).await.unwrap_err().code(), Code::InvalidArgument);
    let mut health = HealthClient::new(channel.clone());
    let healthy = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(healthy.status, 1);
    let other = HealthCheckRequest { service: "other".into() };
    assert_eq!(health.check(other).await.unwrap_err().code(), Code::NotFound);
    // The HTTP port speaks gRPC too.
    let endpoint = Endpoint::from_shared(format!("http://{}", sidecar.ports.api)).unwrap();
    let mut dapr = DaprClient::new(endpoint.connect().await.unwrap());
    dapr.publish_event(event("default", "t")).await.unwrap();
}
