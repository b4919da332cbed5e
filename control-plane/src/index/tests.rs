use duet_api::resource::parse;
use duet_api::spiffe::SpiffeId;

use super::*;

fn put(index: &mut Index, yaml: &str) -> Affected {
    let parsed = parse("a.yaml", yaml);
    assert_eq!(parsed.errors, []);
    let mut affected = Affected::default();
    for located in parsed.resources {
        affected.merge(index.apply(Change::Put(Arc::new(located))));
    }
    affected
}

fn names(affected: &Affected) -> Vec<String> {
    affected.services.iter().map(ToString::to_string).collect()
}

const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: orders}, {name: a-gateway}]
  rules: [{backendRefs: [{name: orders-v2, port: 80}]}]
";
const POLICY: &str = "
apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: p, namespace: shop}
spec:
  targetRefs: [{kind: HTTPRoute, name: r}, {kind: Service, name: payments}]
  timeouts: {request: 2s}
";

fn replica(instance: &str, services: &[&str]) -> Replica {
    Replica {
        identity: SpiffeId::new("duet.local", "shop", "orders").unwrap(),
        namespace: "shop".into(),
        instance: instance.into(),
        services: services.iter().map(|&s| s.into()).collect(),
        address: "127.0.0.1:1".parse().unwrap(),
        ports: vec![],
        zone: String::new(),
        ready: true,
    }
}

#[test]
fn a_change_touches_the_services_it_shapes() {
    let mut index = Index::default();
    assert_eq!(names(&put(&mut index, ROUTE)), ["shop/orders"]);
    assert_eq!(names(&put(&mut index, POLICY)), ["shop/orders", "shop/payments"]);
    let moved = ROUTE.replace("Service, name: orders", "Service, name: stock");
    assert_eq!(names(&put(&mut index, &moved)), ["shop/orders", "shop/stock"]);
    let gone = index.apply(Change::Remove(object("HTTPRoute", "shop", "r")));
    assert_eq!(names(&gone), ["shop/stock"]);
    assert_eq!(index.referrers(&ServiceKey::new("shop", "stock").object()).count(), 0);
}

#[test]
fn the_same_again_touches_nothing() {
    let mut index = Index::default();
    put(&mut index, ROUTE);
    assert!(put(&mut index, &format!("# moved down\n{ROUTE}")).is_empty());
    assert_eq!(index.apply(Change::PutReplica(replica("a", &["orders"]))).services.len(), 1);
    assert!(index.apply(Change::PutReplica(replica("a", &["orders"]))).is_empty());
    assert!(index.apply(Change::RemoveReplica(replica("b", &[]).key())).is_empty());
}

#[test]
fn a_replica_that_changes_services_touches_both() {
    let mut index = Index::default();
    index.apply(Change::PutReplica(replica("a", &["orders", "old"])));
    let affected = index.apply(Change::PutReplica(replica("a", &["orders", "new"])));
    assert_eq!(names(&affected), ["shop/new", "shop/old", "shop/orders"]);
    assert!(!index.knows_service(&ServiceKey::new("shop", "old")));
    assert!(index.knows_service(&ServiceKey::new("shop", "new")));
    assert_eq!(index.namespaces_with("new").into_iter().collect::<Vec<_>>(), ["shop"]);
}

#[test]
fn event_resources_touch_events() {
    let mut index = Index::default();
    let topic = "{apiVersion: duet.dev/v1alpha1, kind: Topic, metadata: {name: t}}";
    let affected = put(&mut index, topic);
    assert!(affected.events && affected.services.is_empty());
    assert_eq!(index.of_kind("Topic").count(), 1);
    assert_eq!(index.of_kind("EventBus").count(), 0);
}
