//! Registration and watch.

use duet_api::proto;
use duet_api::proto::destination_update::State;
use duet_api::proto::watch_request::Kind as Ask;
use tonic::Code;

use super::mesh::{Mesh, Watch, registration};

const ORDERS: &str = "{apiVersion: v1, kind: Service, metadata: {name: orders, namespace: shop}, spec: {ports: [{port: 80, targetPort: 8080}]}}";

fn config(update: &proto::DestinationUpdate) -> &proto::Destination {
    match &update.state {
        Some(State::Config(config)) => config,
        other => panic!("{other:?}"),
    }
}

/// Instances that an update brings, and addresses that it takes.
fn changes(update: &proto::DestinationUpdate) -> (bool, Vec<&str>, Vec<&str>) {
    let [change] = update.endpoints.as_slice() else { panic!("{update:?}") };
    let instances = change.upsert.iter().map(|endpoint| endpoint.instance.as_str()).collect();
    (change.reset, instances, change.remove.iter().map(String::as_str).collect())
}

async fn subscribed(watch: &mut Watch, authority: &str) -> proto::DestinationUpdate {
    watch.subscribe(authority).await;
    watch.destination().await
}

#[tokio::test]
async fn a_watch_sees_replicas_come_and_go_without_configuration_again() {
    let mesh = Mesh::start(ORDERS).await;
    let orders = mesh.sidecar("shop", "orders").await;
    let mut first = orders.register(registration("orders", "o-1", 1001)).await;

    let mut watch = mesh.sidecar("shop", "web").await.watch(&["web"]).await;
    assert_eq!(watch.workload().await.buses[0].name, "default");
    let update = subscribed(&mut watch, "orders").await;
    assert_eq!(update.authority, "orders");
    assert_eq!(config(&update).service, "shop/orders:80");
    assert_eq!(changes(&update), (true, vec!["o-1"], vec![]));
    let endpoint = &update.endpoints[0].upsert[0];
    assert_eq!((endpoint.address.as_str(), endpoint.port), ("127.0.0.1:1001", 8080));
    assert_eq!(endpoint.identity, "spiffe://duet.local/ns/shop/sa/orders");

    let second = orders.register(registration("orders", "o-2", 1002)).await;
    let added = watch.destination().await;
    assert!(added.version > update.version && added.state.is_none());
    assert_eq!(changes(&added), (false, vec!["o-2"], vec![]));

    let tired = proto::Registration { ready: false, ..registration("orders", "o-1", 1001) };
    first.send(tired).await.unwrap();
    assert_eq!(changes(&watch.destination().await), (false, vec![], vec!["127.0.0.1:1001"]));

    drop(second.requests);
    let mut answers = second.answers;
    assert!(answers.message().await.unwrap().is_none(), "closed in order");
    assert_eq!(changes(&watch.destination().await), (false, vec![], vec!["127.0.0.1:1002"]));
    assert!(watch.is_quiet().await);
    mesh.wait_for_metric("duet_control_plane_replicas{ready=\"false\"}", 1.0).await;
}

#[tokio::test]
async fn unknown_names_get_a_reason_and_are_told_when_they_appear() {
    let mesh = Mesh::start(ORDERS).await;
    let mut watch = mesh.sidecar("shop", "web").await.watch(&[]).await;
    watch.workload().await;
    let expected = [
        ("pay", "no service \"pay\" in namespace \"shop\""),
        ("orders:81", "service shop/orders has no port 81; it has 80"),
        ("www.example.org", "is not a service of the mesh"),
    ];
    for (authority, reason) in expected {
        let update = subscribed(&mut watch, authority).await;
        let Some(State::NotFound(why)) = &update.state else { panic!("{update:?}") };
        assert!(why.contains(reason), "{why}");
    }
    let pay = mesh.sidecar("shop", "pay").await;
    let _registered = pay.register(registration("pay", "p-1", 1003)).await;
    let update = watch.destination().await;
    assert_eq!(
        (update.authority.as_str(), config(&update).service.as_str()),
        ("pay", "shop/pay:80")
    );
    watch.ask(Ask::Unsubscribe(proto::Unsubscribe { authority: "pay".into() })).await;
    mesh.wait_for_metric("duet_control_plane_subscriptions", 2.0).await;
}

#[tokio::test]
async fn acknowledgements_and_rejections_are_counted() {
    let mesh = Mesh::start(ORDERS).await;
    let mut watch = mesh.sidecar("shop", "web").await.watch(&[]).await;
    let version = watch.workload().await.version;
    watch.ask(Ask::Ack(proto::Ack { authority: String::new(), version })).await;
    let version = subscribed(&mut watch, "orders").await.version;
    let reason = "a test cannot use it".to_owned();
    watch.ask(Ask::Reject(proto::Reject { authority: "orders".into(), version, reason })).await;
    mesh.wait_for_metric("duet_control_plane_acks_total", 1.0).await;
    mesh.wait_for_metric("duet_control_plane_rejects_total", 1.0).await;
}

#[tokio::test]
async fn a_restart_keeps_registrations_until_they_are_renewed() {
    let mut mesh = Mesh::start(ORDERS).await;
    let orders = mesh.sidecar("shop", "orders").await;
    let mut registered = orders.register(registration("orders", "o-1", 1001)).await;
    mesh.restart().await;
    let ended = registered.answers.message().await;
    assert_eq!(ended.unwrap_err().code(), Code::Unavailable);
    let mut watch = mesh.sidecar("shop", "web").await.watch(&[]).await;
    watch.workload().await;
    assert_eq!(changes(&subscribed(&mut watch, "orders").await).1, ["o-1"]);
    // Coming back is no change.
    let again = mesh.sidecar("shop", "orders").await;
    let _registered = again.register(registration("orders", "o-1", 1001)).await;
    assert!(watch.is_quiet().await);
}

#[tokio::test]
async fn a_broken_connection_keeps_the_registration_for_its_lease() {
    let mesh = Mesh::start(ORDERS).await;
    let mut watch = mesh.sidecar("shop", "web").await.watch(&[]).await;
    watch.workload().await;
    let orders = mesh.sidecar("shop", "orders").await;
    let registered = orders.register(registration("orders", "o-1", 1001)).await;
    assert_eq!(changes(&subscribed(&mut watch, "orders").await).1, ["o-1"]);
    // The answers' end resets the stream, as a lost connection does.
    drop(registered.answers);
    drop(orders);
    assert!(watch.is_quiet().await);
}

#[tokio::test]
async fn only_its_own_account_and_namespace_may_register_a_service() {
    let listed = ORDERS.replace(
        "namespace: shop}",
        "namespace: shop, annotations: {duet.dev/service-accounts: 'deputy'}}",
    );
    let mesh = Mesh::start(&listed).await;
    let cases = [
        ("shop", "web", registration("orders", "o-1", 1001), "may not serve shop/orders"),
        (
            "ops",
            "orders",
            registration("orders", "o-1", 1001),
            "cannot register in namespace \"shop\"",
        ),
    ];
    for (namespace, account, wanted, reason) in cases {
        let sidecar = mesh.sidecar(namespace, account).await;
        let status = sidecar.open_registration().await.send(wanted).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().contains(reason), "{status}");
    }
    let refused = "duet_control_plane_refused_requests_total{reason=\"permission_denied\",service=\"workloads\"}";
    mesh.wait_for_metric(refused, 2.0).await;
    let deputy = mesh.sidecar("shop", "deputy").await;
    let _registered = deputy.register(registration("orders", "o-1", 1001)).await;
}

#[tokio::test]
async fn a_name_that_another_account_took_first_keeps_nobody_out() {
    let mesh = Mesh::start(ORDERS).await;
    let squatter = mesh.sidecar("shop", "web").await;
    let _squats = squatter.register(registration("web", "o-1", 1001)).await;
    let orders = mesh.sidecar("shop", "orders").await;
    let _registered = orders.register(registration("orders", "o-1", 1002)).await;
    let mut watch = mesh.sidecar("shop", "web").await.watch(&["web"]).await;
    watch.workload().await;
    let update = subscribed(&mut watch, "orders").await;
    assert_eq!(update.endpoints[0].upsert[0].address, "127.0.0.1:1002");
}

#[tokio::test]
async fn a_node_of_another_namespace_is_refused() {
    let mesh = Mesh::start("").await;
    let mut sidecar = mesh.sidecar("shop", "web").await;
    sidecar.material.id = "spiffe://duet.local/ns/ops/sa/web".parse().unwrap();
    let mut watch = sidecar.watch(&[]).await;
    assert_eq!(watch.next().await.unwrap_err().code(), Code::PermissionDenied);
}
