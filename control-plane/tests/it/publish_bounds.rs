//! What publishers may take of the control plane's memory.

use std::time::Duration;

use bytes::Bytes;
use duet_api::proto::event_bus_client::EventBusClient;
use duet_api::proto::publish_error::Code as PublishCode;
use duet_api::proto::{self, PublishRequest};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::client::GrpcService as _;
use tonic::{Code, Status};

use super::bus::{event, publish};
use super::mesh::{Mesh, SOON, Sidecar, registration};

/// The most that this process ever had in memory.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[tokio::test]
async fn events_without_content_cost_no_memory_and_get_an_answer() {
    let mesh = Mesh::start("").await;
    let orders = mesh.sidecar("shop", "orders").await;
    let mut empty = PublishRequest::decode([0x22, 0].repeat(4_000_000).as_slice()).unwrap();
    (empty.bus, empty.topic) = ("default".into(), "orders.placed".into());
    let fine = PublishRequest { correlation: 2, events: vec![event("1")].into(), ..empty.clone() };
    let before = peak_bytes();
    let requests: Vec<_> = (0..8).map(|_| empty.clone()).chain(std::iter::once(fine)).collect();
    let mut client = EventBusClient::new(orders.channel.clone()).max_encoding_message_size(1 << 24);
    let mut answers = client.publish(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut stored = 0;
    while let Some(answer) = answers.message().await.unwrap() {
        match answer.error {
            Some(error) => {
                assert_eq!(error.code(), PublishCode::Invalid);
                let text = "has 4000000 events with 0 attributes; it may have 10000 with 256000";
                assert!(error.message.contains(text), "{}", error.message);
            }
            None => stored += answer.events.len(),
        }
    }
    assert_eq!(stored, 1);
    let grown = peak_bytes() - before;
    assert!(grown < 300 << 20, "{grown} bytes");
}

/// A publish stream whose messages are written by hand.
async fn raw(sidecar: &Sidecar) -> mpsc::Sender<Result<Frame<Bytes>, Status>> {
    let (chunks, stream) = mpsc::channel(4);
    let request = http::Request::post("http://duet.invalid/duet.v1.EventBus/Publish")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(StreamBody::new(ReceiverStream::new(stream))))
        .unwrap();
    let mut channel = sidecar.channel.clone();
    std::future::poll_fn(|context| channel.poll_ready(context)).await.unwrap();
    // Kept: the stream ends with its answer.
    let call = channel.call(request);
    tokio::spawn(async move {
        let answer = call.await;
        tokio::time::sleep(SOON).await;
        drop(answer);
    });
    chunks
}

#[tokio::test]
async fn an_identity_waits_for_room_of_its_own_and_the_others_go_on() {
    let mesh = Mesh::start("").await;
    let (orders, payments) =
        (mesh.sidecar("shop", "orders").await, mesh.sidecar("shop", "payments").await);
    let mut open = Vec::new();
    for _ in 0..3 {
        let chunks = raw(&orders).await;
        // 24 MiB are said to come; two of them are all that the identity may have.
        chunks.send(Ok(Frame::data(Bytes::from_static(&[0, 1, 128, 0, 0, 9])))).await.unwrap();
        open.push(chunks);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let soon = tokio::time::timeout(SOON, publish(&payments, "default", event("1"))).await;
    assert!(soon.unwrap().error.is_none());
    let waits = publish(&orders, "default", event("2"));
    tokio::pin!(waits);
    assert!(tokio::time::timeout(Duration::from_millis(500), &mut waits).await.is_err());
    drop(open);
    let done = tokio::time::timeout(SOON, waits).await.unwrap();
    assert!(done.error.is_none());
}

#[tokio::test]
async fn a_message_that_is_too_long_ends_the_stream_with_the_limit() {
    let mesh = Mesh::start("").await;
    let orders = mesh.sidecar("shop", "orders").await;
    let event = proto::Event { data: Some(vec![0; 33 << 20].into()), ..event("1") };
    let request = PublishRequest { events: vec![event].into(), ..PublishRequest::default() };
    let mut client = EventBusClient::new(orders.channel.clone()).max_encoding_message_size(1 << 28);
    let mut answers = client.publish(tokio_stream::once(request)).await.unwrap().into_inner();
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains("the limit is: 33554432"), "{status}");
}

#[tokio::test]
async fn the_other_services_take_no_long_messages() {
    let mesh = Mesh::start("").await;
    let orders = mesh.sidecar("shop", "orders").await;
    let mut registered = orders.open_registration().await;
    let ports = vec![proto::WorkloadPort::default(); 100_000];
    let long = proto::Registration { ports, ..registration("orders", "orders-1", 1) };
    let request = proto::RegisterRequest { registration: Some(long) };
    registered.requests.send(request).await.unwrap();
    assert!(!matches!(registered.answers.message().await, Ok(Some(_))));

    let routes = vec![proto::EventRoute::default(); 300_000];
    let open = proto::Subscription { routes, ..proto::Subscription::default() };
    let kind = Some(proto::consume_request::Kind::Open(open));
    let request = tokio_stream::once(proto::ConsumeRequest { kind });
    let mut client = EventBusClient::new(orders.channel.clone());
    let mut answers = client.consume(request).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap_err().code(), Code::OutOfRange);
}
