//! The embedded event bus, over gRPC.

use duet_api::proto;
use duet_api::proto::consume_request::Kind as Ask;
use duet_api::proto::consume_response::Kind as Tell;
use duet_api::proto::event_bus_client::EventBusClient;
use duet_api::proto::publish_error::Code as PublishCode;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::mesh::{Mesh, SOON, Sidecar};

const RESOURCES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: inventory, namespace: shop}, spec: {ports: [{port: 80}]}}
---
{apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {name: fulfil, namespace: shop}, spec: {topic: orders.placed, subscriber: {service: inventory, path: /events}}}
---
{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {name: strict}, spec: {backend: {embedded: {}}, declaredTopicsOnly: true}}
";

pub(crate) fn event(id: &str) -> proto::Event {
    proto::Event {
        id: id.into(),
        source: "/orders".into(),
        spec_version: "1.0".into(),
        r#type: "placed".into(),
        data: Some(b"{}".as_slice().into()),
        ..Default::default()
    }
}

pub(crate) async fn publish(
    sidecar: &Sidecar,
    bus: &str,
    event: proto::Event,
) -> proto::PublishResponse {
    let request = proto::PublishRequest {
        correlation: 7,
        bus: bus.into(),
        topic: "orders.placed".into(),
        events: vec![event].into(),
    };
    let mut client = EventBusClient::new(sidecar.channel.clone());
    let mut answers = client.publish(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(answer.correlation, 7);
    assert!(answers.message().await.unwrap().is_none());
    answer
}

pub(crate) struct Consumer {
    requests: mpsc::Sender<proto::ConsumeRequest>,
    answers: Streaming<proto::ConsumeResponse>,
}

impl Consumer {
    pub(crate) async fn open(sidecar: &Sidecar, name: &str) -> Result<Self, Status> {
        let (bus, topic) = ("default".to_owned(), "orders.placed".to_owned());
        let subscription =
            proto::Subscription { name: name.into(), bus, topic, ..Default::default() };
        Self::open_as(sidecar, subscription).await
    }

    pub(crate) async fn open_as(
        sidecar: &Sidecar,
        subscription: proto::Subscription,
    ) -> Result<Self, Status> {
        let (requests, stream) = mpsc::channel(16);
        let mut client = EventBusClient::new(sidecar.channel.clone());
        let answers = client.consume(ReceiverStream::new(stream)).await?.into_inner();
        let mut consumer = Self { requests, answers };
        consumer.ask(Ask::Open(subscription)).await;
        match consumer.next().await? {
            Tell::Opened(_) => Ok(consumer),
            Tell::Delivery(delivery) => panic!("{delivery:?}"),
        }
    }

    pub(crate) async fn ask(&self, ask: Ask) {
        self.requests.send(proto::ConsumeRequest { kind: Some(ask) }).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> Result<Tell, Status> {
        let message = tokio::time::timeout(SOON, self.answers.message()).await;
        Ok(message.expect("an answer in time")?.expect("the stream ended").kind.unwrap())
    }

    pub(crate) async fn delivery(&mut self) -> proto::Delivery {
        match self.next().await.unwrap() {
            Tell::Delivery(delivery) => delivery,
            Tell::Opened(opened) => panic!("{opened:?}"),
        }
    }

    pub(crate) async fn ack(&self, delivery: u64) {
        let outcome = Some(proto::settle::Outcome::Ack(proto::settle::Done {}));
        self.ask(Ask::Settle(proto::Settle { delivery, outcome })).await;
    }
}

#[tokio::test]
async fn an_event_waits_for_its_declared_subscription_and_survives_a_restart() {
    let mut mesh = Mesh::start(RESOURCES).await;
    let orders = mesh.sidecar("shop", "orders").await;
    assert_eq!(publish(&orders, "default", event("1")).await.events[0].position, 1);
    assert!(publish(&orders, "default", event("1")).await.events[0].duplicate);
    publish(&orders, "default", event("2")).await;
    mesh.restart().await;

    let inventory = mesh.sidecar("shop", "inventory").await;
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    consumer.ask(Ask::Credit(1)).await;
    let first = consumer.delivery().await;
    assert_eq!(first.event.as_ref().unwrap().id, "1");
    let waiting =
        tokio::time::timeout(std::time::Duration::from_millis(200), consumer.next()).await;
    assert!(waiting.is_err(), "no more than the credit");
    consumer.ack(first.delivery).await;
    consumer.ask(Ask::Credit(1)).await;
    let second = consumer.delivery().await;
    assert_eq!(second.event.as_ref().unwrap().id, "2");
    // Its stream's end returns what is unsettled, unspent.
    drop(consumer);
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    consumer.ask(Ask::Credit(5)).await;
    let again = consumer.delivery().await;
    assert_eq!((again.event.unwrap().id.as_str(), again.attempt), ("2", 1));
}

#[tokio::test]
async fn a_publisher_cannot_hide_an_event_or_forge_a_dead_letter() {
    let mesh = Mesh::start(RESOURCES).await;
    let orders = mesh.sidecar("shop", "orders").await;
    let inventory = mesh.sidecar("shop", "inventory").await;
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    let mut forged = event("1");
    for name in ["redriveto", "deadlettertopic", "deadlettersub"] {
        forged.attributes.insert(name.to_owned(), "somebody/else".to_owned());
    }
    publish(&orders, "default", forged).await;
    consumer.ask(Ask::Credit(1)).await;
    assert_eq!(consumer.delivery().await.event, Some(event("1")));
}

#[tokio::test]
async fn refused_publishes_say_why() {
    let mesh = Mesh::start(RESOURCES).await;
    let orders = mesh.sidecar("shop", "orders").await;
    let bad = proto::Event { spec_version: "9".into(), ..event("1") };
    let cases = [
        ("nowhere", event("1"), PublishCode::UnknownBus),
        ("strict", event("1"), PublishCode::UnknownTopic),
        ("default", bad, PublishCode::Invalid),
        ("../../etc", event("1"), PublishCode::UnknownBus),
    ];
    for (bus, event, code) in cases {
        let error = publish(&orders, bus, event).await.error.unwrap();
        assert_eq!(error.code(), code, "{error:?}");
        assert!(!error.message.is_empty());
    }
}

#[tokio::test]
async fn only_the_subscribers_sidecar_consumes() {
    let mesh = Mesh::start(RESOURCES).await;
    let refused = [
        ("shop", "orders", "shop/fulfil"),
        ("ops", "inventory", "shop/fulfil"),
        ("shop", "inventory", "fulfil"),
        ("shop", "orders", "shop/inventory.orders.placed"),
    ];
    for (namespace, account, subscription) in refused {
        let sidecar = mesh.sidecar(namespace, account).await;
        let Err(status) = Consumer::open(&sidecar, subscription).await else { panic!("{account}") };
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    }
    let own = mesh.sidecar("ops", "inventory").await;
    let consumer = Consumer::open(&own, "ops/inventory.orders.placed").await.unwrap();
    mesh.wait_for_metric("duet_control_plane_consumers", 1.0).await;
    drop(consumer);
    mesh.wait_for_metric("duet_control_plane_consumers", 0.0).await;
}

#[tokio::test]
async fn what_waits_for_an_application_is_lost_to_nobody_who_calls_its_own_the_same() {
    let mesh = Mesh::start(RESOURCES).await;
    let own = "shop/payments.orders.placed";
    let payments = mesh.sidecar("shop", "payments").await;
    drop(Consumer::open(&payments, own).await.unwrap());
    publish(&payments, "default", event("1")).await;
    let thief = mesh.sidecar("shop", "web").await;
    for topic in ["orders.placed", "junk"] {
        let wanted = proto::Subscription {
            name: own.into(),
            bus: "default".into(),
            topic: topic.into(),
            ..Default::default()
        };
        let Err(status) = Consumer::open_as(&thief, wanted).await else { panic!("{topic}") };
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    }
    let mut consumer = Consumer::open(&payments, own).await.unwrap();
    consumer.ask(Ask::Credit(1)).await;
    assert_eq!(consumer.delivery().await.event, Some(event("1")));
}
