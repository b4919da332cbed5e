//! Configuration that changes while everything runs.

use std::time::{Duration, Instant};

use duet_api::proto;
use duet_api::proto::destination_update::State;

use super::mesh::{Mesh, Watch};

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop}
spec: {ports: [{port: 80}]}
";

fn policy(timeout: &str) -> String {
    format!(
        "apiVersion: duet.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: orders, namespace: shop}}\n\
         spec:\n  targetRefs: [{{kind: Service, name: orders}}]\n  timeouts: {{request: {timeout}}}\n"
    )
}

fn timeout(update: &proto::DestinationUpdate) -> Option<i64> {
    let Some(State::Config(config)) = &update.state else { panic!("{update:?}") };
    config.rules[0].timeouts.as_ref().unwrap().request.as_ref().map(|duration| duration.seconds)
}

async fn watch_orders(mesh: &Mesh) -> Watch {
    let mut watch = mesh.sidecar("shop", "web").await.watch(&[]).await;
    watch.workload().await;
    watch.subscribe("orders").await;
    watch
}

#[tokio::test]
async fn an_edit_arrives_within_a_second() {
    let mesh = Mesh::start(SERVICE).await;
    let mut watch = watch_orders(&mesh).await;
    assert_eq!(timeout(&watch.destination().await), None);
    for (seconds, text) in [(2, "2s"), (3, "3s")] {
        let edited = Instant::now();
        mesh.write("policy.yaml", &policy(text));
        assert_eq!(timeout(&watch.destination().await), Some(seconds));
        assert!(edited.elapsed() < Duration::from_secs(1), "{:?}", edited.elapsed());
    }
    let deleted = Instant::now();
    std::fs::remove_file(mesh.path("policy.yaml")).unwrap();
    assert_eq!(timeout(&watch.destination().await), None);
    assert!(deleted.elapsed() < Duration::from_secs(1), "{:?}", deleted.elapsed());
}

#[tokio::test]
async fn a_bad_edit_changes_nothing_and_is_counted_until_it_is_mended() {
    let mesh = Mesh::start(SERVICE).await;
    mesh.write("policy.yaml", &policy("2s"));
    mesh.wait_for_metric("duet_config_resources{kind=\"TrafficPolicy\"}", 1.0).await;
    let mut watch = watch_orders(&mesh).await;
    assert_eq!(timeout(&watch.destination().await), Some(2));
    let bad = [policy("2 seconds"), policy("1s").replace("timeouts", "timeout"), ": {".to_owned()];
    for (rejected, bad) in (1..).map(f64::from).zip(&bad) {
        mesh.write("policy.yaml", bad);
        mesh.wait_for_metric("duet_config_rejected_total", rejected).await;
        mesh.wait_for_metric("duet_config_errors", 1.0).await;
    }
    assert!(watch.is_quiet().await, "the last good state stays");
    mesh.write("policy.yaml", &policy("4s"));
    assert_eq!(timeout(&watch.destination().await), Some(4));
    mesh.wait_for_metric("duet_config_errors", 0.0).await;
}

#[tokio::test]
async fn a_start_with_errors_uses_what_is_good() {
    let mesh = Mesh::start(&format!("{SERVICE}---\n{}", policy("soon"))).await;
    mesh.wait_for_metric("duet_config_errors", 1.0).await;
    let mut watch = watch_orders(&mesh).await;
    assert_eq!(timeout(&watch.destination().await), None);
}

#[tokio::test]
async fn swapped_links_of_a_mounted_config_map_are_noticed() {
    let mesh = Mesh::start("").await;
    let version = |number: u32, text: &str| {
        let folder = mesh.path(&format!("..{number}"));
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("orders.yaml"), text).unwrap();
        std::os::unix::fs::symlink(format!("..{number}"), mesh.path("..data_new")).unwrap();
        std::fs::rename(mesh.path("..data_new"), mesh.path("..data")).unwrap();
    };
    version(1, &format!("{SERVICE}---\n{}", policy("1s")));
    std::os::unix::fs::symlink("..data/orders.yaml", mesh.path("orders.yaml")).unwrap();
    mesh.wait_for_metric("duet_config_resources{kind=\"Service\"}", 1.0).await;
    let mut watch = watch_orders(&mesh).await;
    assert_eq!(timeout(&watch.destination().await), Some(1));
    let swapped = Instant::now();
    version(2, &format!("{SERVICE}---\n{}", policy("2s")));
    assert_eq!(timeout(&watch.destination().await), Some(2));
    assert!(swapped.elapsed() < Duration::from_secs(1), "{:?}", swapped.elapsed());
}
