//! What of a topic a subscription gets, and who may have it.

use duet_api::proto;
use duet_api::proto::consume_request::Kind as Ask;
use duet_api::proto::publish_error::Code as PublishCode;
use tonic::Code;

use super::bus::{Consumer, event, publish};
use super::mesh::Mesh;

const SERVICES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: inventory, namespace: shop}, spec: {ports: [{port: 80}]}}
---
";

fn subscription(more: &str) -> String {
    format!(
        "{SERVICES}apiVersion: duet.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: fulfil, namespace: shop}}\n\
         spec:\n  topic: orders.placed\n  {more}\n"
    )
}

fn order(id: &str, total: u32) -> proto::Event {
    let data = format!("{{\"total\": {total}}}").into_bytes();
    proto::Event { data: Some(data.into()), ..event(id) }
}

#[tokio::test]
async fn a_filter_leaves_events_out_without_a_delivery() {
    let filter =
        "filter: event.data.total > 100\n  subscriber: {service: inventory, path: /events}";
    let mesh = Mesh::start(&subscription(filter)).await;
    let orders = mesh.sidecar("shop", "orders").await;
    for (id, total) in [("1", 5), ("2", 500), ("3", 7), ("4", 101)] {
        publish(&orders, "default", order(id, total)).await;
    }
    let broken = proto::Event { data: Some(b"[]".as_slice().into()), ..event("5") };
    publish(&orders, "default", broken).await;
    publish(&orders, "default", order("6", 1000)).await;
    let inventory = mesh.sidecar("shop", "inventory").await;
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    // What is left out takes none of the credit.
    consumer.ask(Ask::Credit(3)).await;
    for id in ["2", "4", "6"] {
        let delivery = consumer.delivery().await;
        assert_eq!((delivery.event.unwrap().id.as_str(), delivery.path.as_str()), (id, ""));
        consumer.ack(delivery.delivery).await;
    }
    let label = "{subscription=\"shop/fulfil\"}";
    mesh.wait_for_metric(&format!("duet_bus_filtered_total{label}"), 3.0).await;
    mesh.wait_for_metric(&format!("duet_bus_filter_errors_total{label}"), 1.0).await;
    drop(consumer);
    // Done is done: they do not come again.
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    consumer.ask(Ask::Credit(9)).await;
    publish(&orders, "default", order("7", 700)).await;
    assert_eq!(consumer.delivery().await.event.unwrap().id, "7");
}

#[tokio::test]
async fn routes_choose_the_path_and_an_edit_counts_at_once() {
    let routes = "subscriber: {service: inventory}\n  routes: [{match: event.data.total > 100, path: /large}, \
                  {match: event.data.total > 10, path: /small}]";
    let mesh = Mesh::start(&subscription(routes)).await;
    let (orders, inventory) =
        (mesh.sidecar("shop", "orders").await, mesh.sidecar("shop", "inventory").await);
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    consumer.ask(Ask::Credit(9)).await;
    for (id, total) in [("1", 50), ("2", 5), ("3", 500)] {
        publish(&orders, "default", order(id, total)).await;
    }
    for (id, path) in [("1", "/small"), ("3", "/large")] {
        let delivery = consumer.delivery().await;
        assert_eq!((delivery.event.unwrap().id.as_str(), delivery.path.as_str()), (id, path));
        consumer.ack(delivery.delivery).await;
    }
    mesh.write("all.yaml", &subscription("subscriber: {service: inventory, path: /all}"));
    let status = consumer.next().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "the subscription changed"));
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    consumer.ask(Ask::Credit(9)).await;
    publish(&orders, "default", order("4", 1)).await;
    let delivery = consumer.delivery().await;
    assert_eq!((delivery.event.unwrap().id.as_str(), delivery.path.as_str()), ("4", ""));
}

#[tokio::test]
async fn an_application_that_asks_for_nonsense_is_told_what_it_is() {
    let mesh = Mesh::start(SERVICES).await;
    let inventory = mesh.sidecar("shop", "inventory").await;
    let wanted = |filter: &str, routes| proto::Subscription {
        name: "shop/inventory.orders.placed".into(),
        bus: "default".into(),
        topic: "orders.placed".into(),
        filter: filter.into(),
        routes,
        ..Default::default()
    };
    let Err(status) = Consumer::open_as(&inventory, wanted("event.type ==", vec![])).await else {
        panic!("taken");
    };
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().starts_with(
            "subscription \"shop/inventory.orders.placed\": filter: \"event.type ==\""
        ),
        "{status}"
    );
    let routes = vec![proto::EventRoute { r#match: "nope".into(), path: "/a".into() }];
    let Err(status) = Consumer::open_as(&inventory, wanted("", routes)).await else {
        panic!("taken");
    };
    assert!(
        status.message().contains("routes[0].match: \"nope\" \"nope\" is not known"),
        "{status}"
    );
    let routes = vec![proto::EventRoute { r#match: "true".into(), path: "/a".into() }; 65];
    let Err(status) = Consumer::open_as(&inventory, wanted("", routes)).await else {
        panic!("taken");
    };
    assert!(status.message().contains("routes has 65 entries, more than 64"), "{status}");
    let pattern = "event.data.exists(x, event.id.matches('\\\\w{100}'))";
    let Err(status) = Consumer::open_as(&inventory, wanted(pattern, vec![])).await else {
        panic!("taken");
    };
    assert!(status.message().contains("takes more than 256 KiB as a pattern"), "{status}");
}

#[tokio::test]
async fn every_replica_gets_a_broadcast_and_none_can_take_it_from_others() {
    let broadcast = "broadcast: true\n  subscriber: {service: inventory, path: /events}";
    let mesh = Mesh::start(&subscription(broadcast)).await;
    let orders = mesh.sidecar("shop", "orders").await;
    publish(&orders, "default", event("early")).await;
    let inventory = mesh.sidecar("shop", "inventory").await;
    let mut consumers = Vec::new();
    for name in ["shop/fulfil@a", "shop/fulfil@b"] {
        let consumer = Consumer::open(&inventory, name).await.unwrap();
        consumer.ask(Ask::Credit(9)).await;
        consumers.push(consumer);
    }
    publish(&orders, "default", event("1")).await;
    for consumer in &mut consumers {
        assert_eq!(consumer.delivery().await.event.unwrap().id, "1");
    }
    for (name, why) in
        [("shop/fulfil", "each replica consumes"), ("shop/fulfil@", "is a broadcast")]
    {
        let Err(status) = Consumer::open(&inventory, name).await else { panic!("{name}") };
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().contains(why), "{status}");
    }
    mesh.write("all.yaml", &subscription("subscriber: {service: inventory, path: /events}"));
    let status = consumers[0].next().await.unwrap_err();
    assert!(status.message().contains("is no broadcast"), "{status}");
    Consumer::open(&inventory, "shop/fulfil").await.unwrap();
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: duet.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: orders, namespace: ops}}\n\
         spec:\n  targetRefs: [{{kind: Topic, name: orders.placed}}]\n  {spec}\n"
    )
}

#[tokio::test]
async fn policies_decide_who_publishes_and_who_subscribes() {
    let mesh = Mesh::start(&subscription("subscriber: {service: inventory, path: /e}")).await;
    let orders = mesh.sidecar("shop", "orders").await;
    let inventory = mesh.sidecar("shop", "inventory").await;
    let mut workload = mesh.sidecar("shop", "inventory").await.watch(&[]).await;
    assert_eq!(workload.workload().await.buses[0].denied, []);
    let mut consumer = Consumer::open(&inventory, "shop/fulfil").await.unwrap();
    let allow = "rules: [{from: [{identities: ['spiffe://duet.local/ns/shop/sa/orders']}], to: [{operations: [publish]}]}]";
    mesh.write("policy.yaml", &policy(allow));
    // Sidecars are told, so that they refuse at once.
    let denied = workload.workload().await.buses[0].denied.clone();
    assert_eq!(denied[0].topic, "orders.placed");
    assert!(denied[0].reason.contains("sa/inventory may not publish to topic"), "{denied:?}");
    // Who consumed may not any more, and may not come back.
    assert_eq!(consumer.next().await.unwrap_err().code(), Code::PermissionDenied);
    let Err(status) = Consumer::open(&inventory, "shop/fulfil").await else { panic!("consumed") };
    assert!(status.message().contains("may not subscribe to topic \"orders.placed\""), "{status}");
    assert_eq!(publish(&orders, "default", event("1")).await.error, None);
    let error = publish(&inventory, "default", event("2")).await.error.unwrap();
    assert_eq!(error.code(), PublishCode::Denied);
    assert!(error.message.contains("no AuthorizationPolicy allows it"), "{error:?}");
    let counted = "duet_bus_authorizations_total{decision=\"denied\",operation=\"publish\"}";
    mesh.wait_for_metric(counted, 1.0).await;

    mesh.write("policy.yaml", &policy("action: Audit\n  rules: [{}]"));
    assert_eq!(workload.workload().await.buses[0].denied, []);
    assert_eq!(publish(&inventory, "default", event("3")).await.error, None);
    let counted = "duet_bus_authorizations_total{decision=\"audited\",operation=\"publish\"}";
    mesh.wait_for_metric(counted, 1.0).await;
}
