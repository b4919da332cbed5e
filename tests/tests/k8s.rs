//! The manifests, run: every container of the shop's overlay as a process with exactly the arguments, environment and
//! mounts that the manifests give it, each pod in a network namespace of its own, mounts in plain folders.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

mod k8s {
    pub(crate) mod network;
    pub(crate) mod pod;
}

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use duet_tests::process::program;
use duet_tests::{eventually, tools};
use serde::Deserialize as _;
use serde_json::Value;

use k8s::network::Network;
use k8s::pod::{Pod, Volumes};

const READY: Duration = Duration::from_secs(90);
const CONTROL_PLANE: &str = "duet-control-plane";

/// Every object of the overlay.
fn manifests(kubectl: &Path) -> Vec<Value> {
    let overlay = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s/overlays/shop");
    let output = Command::new(kubectl).arg("kustomize").arg(overlay).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    serde_yaml::Deserializer::from_str(&text).map(|one| Value::deserialize(one).unwrap()).collect()
}

/// As `k8s/README.md` has it: a token for each service account, in a Secret.
fn token(state: &Path, account: &str) -> String {
    let output = Command::new(program("duet"))
        .args(["token", "create", "--namespace", "shop", "--service-account", account])
        .args(["--lifetime", "30d", "--state"])
        .arg(state)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn the_shop_works_with_what_the_manifests_say() {
    let (Some(kubectl), Some(_)) = (tools::find("kubectl"), tools::find("curl")) else { return };
    if tools::find("ip").is_none() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        tools::skip("network namespaces need root");
        return;
    }
    let objects = manifests(&kubectl);
    let folder = tempfile::tempdir().unwrap();
    let configs = objects.iter().filter(|object| object["kind"] == "ConfigMap");
    let configs = configs
        .map(|map| (map["metadata"]["name"].as_str().unwrap().to_owned(), map["data"].clone()));
    let mut volumes = Volumes::new(folder.path(), configs.collect());

    let workloads: Vec<&Value> = objects
        .iter()
        .filter(|object| object["kind"] == "Deployment" || object["kind"] == "StatefulSet")
        .collect();
    let pods: Vec<(String, &Value)> = workloads
        .iter()
        .flat_map(|workload| {
            let name = workload["metadata"]["name"].as_str().unwrap();
            let replicas = workload["spec"]["replicas"].as_u64().unwrap_or(1);
            (0..replicas).map(move |number| (format!("{name}-{number}"), *workload))
        })
        .collect();
    assert_eq!(pods.len(), 9, "the shop's eight replicas and the control plane");
    let network = Network::make(pods.iter().map(|(name, _)| name.as_str()));
    network.name(&format!("{CONTROL_PLANE}.duet-system.svc"), &format!("{CONTROL_PLANE}-0"));

    let mut running = BTreeMap::new();
    let (name, workload) = pods.iter().find(|(name, _)| name.starts_with(CONTROL_PLANE)).unwrap();
    let mut control_plane = Pod::new(name, workload, &network, &mut volumes);
    control_plane.start_sidecars(READY).await;
    control_plane.start_containers();
    control_plane.wait_ready(READY).await;
    let state = control_plane.mounted("/var/lib/duet");
    running.insert(name.clone(), control_plane);

    for object in objects.iter().filter(|object| object["kind"] == "ServiceAccount") {
        let account = object["metadata"]["name"].as_str().unwrap();
        if account != CONTROL_PLANE {
            volumes.secret(&format!("duet-token-{account}"), "token", &token(&state, account));
        }
    }
    for (name, workload) in pods.iter().filter(|(name, _)| !name.starts_with(CONTROL_PLANE)) {
        let mut pod = Pod::new(name, workload, &network, &mut volumes);
        pod.start_sidecars(READY).await;
        pod.start_containers();
        running.insert(name.clone(), pod);
    }
    for pod in running.values() {
        pod.wait_ready(READY).await;
    }

    let page = format!("http://{}:8080", network.address("storefront-0"));
    let order =
        ["-X", "POST", "-H", "content-type: application/json", "-H", "idempotency-key: by-hand"];
    let body = ["-d", "{\"product\":\"mug\",\"quantity\":1}", &format!("{page}/api/orders")];
    let answer = network.curl("storefront-0", &[&order[..], &body[..]].concat());
    assert!(answer.is_some_and(|answer| answer.contains("mug")), "the order was not placed");
    eventually("orders are placed and all of them fulfilled", READY, || async {
        let summary = network.curl("storefront-0", &[&format!("{page}/api/summary")])?;
        let summary: Value = serde_json::from_str(&summary).ok()?;
        let (placed, fulfilled) = (summary["placed"].as_u64()?, summary["fulfilled"].as_u64()?);
        assert_eq!(summary["failed"], 0, "{summary}");
        (placed >= 5 && placed == fulfilled).then_some(())
    })
    .await;
    let page = network.curl("storefront-0", &[&page]).unwrap();
    assert!(page.contains("<html"), "{page}");
}

/// The manifests themselves, strictly, for three minor versions of Kubernetes.
#[test]
fn every_object_is_valid_for_three_kubernetes_versions() {
    let (Some(python), Some(_)) = (tools::find("python"), tools::find("kubernetes-validate"))
    else {
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output =
        Command::new(python).arg("tests/k8s/validate.py").current_dir(root).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complained}");
}
