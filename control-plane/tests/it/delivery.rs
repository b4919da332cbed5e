//! How much a sidecar gets at once, and by whose clock events come and end.

use std::time::Duration;

use duet_api::proto;
use duet_api::proto::consume_request::Kind as Ask;
use jiff::Timestamp;

use super::bus::{Consumer, event, publish};
use super::mesh::Mesh;

const SERVICE: &str = "
{apiVersion: v1, kind: Service, metadata: {name: inventory, namespace: shop}, spec: {ports: [{port: 80}]}}
";

fn subscription(name: &str) -> String {
    format!(
        "---\n{{apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {{name: {name}, namespace: shop}}, \
         spec: {{topic: orders.placed, subscriber: {{service: inventory, path: /events}}}}}}\n"
    )
}

/// What comes without anything being settled.
async fn unsettled(consumer: &mut Consumer) -> Vec<u64> {
    consumer.ask(Ask::Credit(64)).await;
    let mut deliveries = Vec::new();
    while let Ok(delivery) =
        tokio::time::timeout(Duration::from_millis(500), consumer.delivery()).await
    {
        deliveries.push(delivery.delivery);
    }
    deliveries
}

#[tokio::test]
async fn a_sidecar_has_so_many_bytes_of_events_in_hand_and_each_subscription_gets_one() {
    let names = ["a", "b", "c"];
    let mesh = Mesh::start(&(SERVICE.to_owned() + &names.map(subscription).concat())).await;
    let orders = mesh.sidecar("shop", "orders").await;
    for number in 0..12 {
        let data = Some(vec![b'x'; 3 << 20].into());
        publish(&orders, "default", proto::Event { data, ..event(&number.to_string()) }).await;
    }
    let inventory = mesh.sidecar("shop", "inventory").await;
    let mut consumers = Vec::new();
    let mut counts = Vec::new();
    for name in names {
        let mut consumer = Consumer::open(&inventory, &format!("shop/{name}")).await.unwrap();
        counts.push(unsettled(&mut consumer).await.len());
        consumers.push(consumer);
    }
    // 16 MiB for one, and one more that began below; 32 MiB for all; and one for who has none.
    assert_eq!(counts, [6, 4, 1]);
    // Another connection has room of its own.
    let other = mesh.sidecar("shop", "inventory").await;
    let mut consumer = Consumer::open(&other, "shop/c").await.unwrap();
    assert_eq!(unsettled(&mut consumer).await.len(), 6);
    drop(consumer);
    // What is done makes room: the first one settles all that it has, and the last one gets more.
    for delivery in 1..=6 {
        consumers[0].ack(delivery).await;
    }
    consumers[2].delivery().await;
}

#[tokio::test]
async fn a_time_that_a_sidecar_computed_holds_by_the_clock_of_the_bus() {
    let mesh = Mesh::start(&(SERVICE.to_owned() + &subscription("a"))).await;
    let orders = mesh.sidecar("shop", "orders").await;
    // Its clock is two minutes behind, and the event has a minute.
    let behind = Timestamp::now() - Duration::from_secs(120);
    let expiry = (behind + Duration::from_secs(60)).to_string();
    let late =
        proto::Event { attributes: [("expirytime".to_owned(), expiry)].into(), ..event("1") };
    let sent_ms = behind.as_millisecond().try_into().unwrap();
    let local = proto::Event { local_expiry: true, sent_ms, ..event("2") };
    let local = proto::Event { attributes: late.attributes.clone(), ..local };
    publish(&orders, "default", late).await;
    publish(&orders, "default", local).await;
    let inventory = mesh.sidecar("shop", "inventory").await;
    let mut consumer = Consumer::open(&inventory, "shop/a").await.unwrap();
    consumer.ask(Ask::Credit(2)).await;
    let event = consumer.delivery().await.event.unwrap();
    assert_eq!(event.id, "2", "what the application said holds as it is");
    let expires: Timestamp = event.attributes["expirytime"].parse().unwrap();
    let left = expires.duration_since(Timestamp::now()).as_secs();
    assert!((50..=60).contains(&left), "{left}");
    assert_eq!((event.local_expiry, event.sent_ms), (false, 0));
}
