use super::*;
use crate::compile::testing::replica;
use crate::index::ServiceKey;

fn registry(dir: &Path) -> Arc<Registry> {
    let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
    let file = dir.join("registrations.json");
    Arc::new(Registry::new(file, Duration::from_secs(15), Arc::default(), metrics))
}

fn instances(registry: &Registry) -> Vec<String> {
    let orders = ServiceKey::new("shop", "orders");
    registry.store.read(|v| v.index.replicas_of(&orders).map(|r| r.instance.clone()).collect())
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_not_renewed_ends() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    registry.register(1, replica("orders", "a", &[])).unwrap();
    registry.register(2, replica("orders", "b", &[])).unwrap();
    tokio::time::advance(Duration::from_secs(10)).await;
    registry.register(1, replica("orders", "a", &[])).unwrap();
    tokio::time::advance(Duration::from_secs(6)).await;
    registry.expire(Instant::now());
    assert_eq!(instances(&registry), ["a"]);
}

#[tokio::test]
async fn a_stream_that_was_replaced_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(dir.path());
    let key = replica("orders", "a", &[]).key();
    registry.register(1, replica("orders", "a", &[])).unwrap();
    registry.register(2, replica("orders", "a", &["8080"])).unwrap();
    registry.release(1, &key);
    assert_eq!(instances(&registry), ["a"]);
    registry.release(2, &key);
    assert_eq!(instances(&registry), Vec::<String>::new());
}

#[tokio::test]
async fn another_account_is_not_in_the_way_of_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let first = registry(dir.path());
    first.register(1, replica("web", "orders-1", &[])).unwrap();
    first.register(2, replica("orders", "orders-1", &["8080"])).unwrap();
    assert_eq!(instances(&first), ["orders-1"]);
    first.release(1, &replica("orders", "orders-1", &[]).key());
    first.release(1, &replica("web", "orders-1", &[]).key());
    assert_eq!(instances(&first), ["orders-1"]);
    first.register(3, replica("web", "orders-1", &[])).unwrap();
    let stop = CancellationToken::new();
    stop.cancel();
    first.run(stop).await;
    let second = registry(dir.path());
    second.restore();
    assert_eq!(second.leases.lock().len(), 2);
    assert_eq!(instances(&second), ["orders-1"]);
}

/// As a control plane wrote it that did not tell instances apart by their accounts.
const SAVED: &str = r#"{"version": 1, "replicas": [{"identity": "spiffe://duet.local/ns/shop/sa/orders",
    "namespace": "shop", "instance": "orders-1", "services": ["orders"], "address": "10.0.0.1:15006",
    "ports": [{"name": "", "port": 8080, "app_protocol": ""}], "zone": "", "ready": true}]}"#;

#[tokio::test]
async fn what_an_older_version_saved_is_restored() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("registrations.json"), SAVED).unwrap();
    let registry = registry(dir.path());
    registry.restore();
    registry.register(1, replica("orders", "orders-1", &["8080"])).unwrap();
    assert_eq!((instances(&registry), registry.leases.lock().len()), (vec!["orders-1".into()], 1));
}

#[tokio::test]
async fn a_restart_brings_registrations_back_for_one_lease() {
    let dir = tempfile::tempdir().unwrap();
    let first = registry(dir.path());
    let stop = CancellationToken::new();
    first.register(1, replica("orders", "a", &["8080"])).unwrap();
    first.register(2, replica("orders", "b", &["8080"])).unwrap();
    stop.cancel();
    first.run(stop).await;

    let second = registry(dir.path());
    second.restore();
    assert_eq!(instances(&second), ["a", "b"]);
    second.register(1, replica("orders", "a", &["8080"])).unwrap();
    second.expire(Instant::now());
    assert_eq!(instances(&second), ["a", "b"]);
    second.leases.lock().get_mut(&replica("orders", "b", &[]).key()).unwrap().until =
        Instant::now();
    second.expire(Instant::now());
    assert_eq!(instances(&second), ["a"]);
}

#[tokio::test]
async fn a_damaged_file_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("registrations.json"), "{").unwrap();
    let registry = registry(dir.path());
    registry.restore();
    assert_eq!(instances(&registry), Vec::<String>::new());
}
