//! `duet events backup`, and a bus that starts from one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http};
use rustix::process::Signal;
use serde_json::{Value, json};

const READER: &str = "\
apiVersion: v1
kind: Service
metadata: {name: reader}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: read}
spec:
  topic: news
  subscriber: {service: reader, path: /news}
";

async fn events(control_plane: &ControlPlane, arguments: &[&str]) -> Output {
    let mut command = Command::new(duet_tests::process::program("duet"));
    command.args(["events", "--operator", &format!("http://{}", control_plane.operator)]);
    command.args(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn publish(writer: &Sidecar, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let url = format!("http://{}/v1.0/publish/default/news", writer.ports.api);
        let event =
            json!({"specversion": "1.0", "id": number.to_string(), "source": "/t", "type": "t"});
        let request =
            http::client().post(url).header("content-type", "application/cloudevents+json");
        assert_eq!(request.body(event.to_string()).send().await.unwrap().status(), 204);
    }
}

fn files(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn a_bus_starts_again_from_its_backup() {
    let mut control_plane = ControlPlane::start(&[("news.yaml", READER)]).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    publish(&writer, 0..200).await;
    let copy = control_plane.folder.path().join("copy");
    let copied = copy.to_str().unwrap();
    let output = events(&control_plane, &["backup", copied, "--output", "json"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["bytes"].as_u64().unwrap(), copy.metadata().unwrap().len());
    assert_eq!(answer["missingEvents"], 0);
    let mode = copy.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "events are not for everybody");
    let bus = control_plane.folder.path().join("control-plane/bus");
    assert_eq!(files(&bus), ["default"], "the copy is made beside it, and does not stay");
    publish(&writer, 200..210).await;

    let again = events(&control_plane, &["backup", copied]).await;
    assert!(!again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("exists already"));
    let other = format!("{copied}-2");
    let unknown = events(&control_plane, &["backup", &other, "--bus", "other"]).await;
    assert!(!unknown.status.success());
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there is no bus \"other\""));
    assert!(!Path::new(&other).exists() && !Path::new(&format!("{other}.partial")).exists());

    // The disk is lost.
    control_plane.kill();
    std::fs::remove_dir_all(&bus).unwrap();
    std::fs::create_dir_all(bus.join("default")).unwrap();
    std::fs::copy(&copy, bus.join("default/log.redb")).unwrap();
    control_plane.restart().await;
    let app = App::echo("reader").await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    publish(&writer, 210..220).await;
    let expected: BTreeSet<u32> = (0..200).chain(210..220).collect();
    eventually("what was stored at the backup arrives, and what came since", SOON, || async {
        let asked = app.asked();
        let ids = asked.iter().filter(|asked| asked.path == "/news");
        let ids: BTreeSet<u32> =
            ids.map(|asked| asked.json()["id"].as_str().unwrap().parse().unwrap()).collect();
        (ids == expected).then_some(())
    })
    .await;
}

/// Takes away what says how the pages are laid out that have this in them.
fn break_page(file: &Path, with: &[u8]) {
    let mut bytes = std::fs::read(file).unwrap();
    let pages = bytes.chunks_mut(4096);
    let found = pages.filter(|page| page.windows(with.len()).any(|part| part == with));
    let broken = found.map(|page| page[..16].fill(0xff)).count();
    assert!(broken > 0);
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test]
async fn a_backup_says_what_it_lacks() {
    let mut control_plane = ControlPlane::start(&[]).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    for letter in ["a", "b", "c"] {
        let url = format!("http://{}/v1.0/publish/default/news", writer.ports.api);
        let request = http::client().post(url).body(letter.repeat(3000));
        assert_eq!(request.send().await.unwrap().status(), 204);
    }
    // In order, so that all of it is in the tables.
    control_plane.process.signal(Signal::TERM);
    control_plane.process.wait();
    break_page(
        &control_plane.folder.path().join("control-plane/bus/default/log.redb"),
        &[b'b'; 500],
    );
    control_plane.restart().await;
    let copy = control_plane.folder.path().join("copy");
    let output =
        events(&control_plane, &["backup", copy.to_str().unwrap(), "--output", "json"]).await;
    assert!(!output.status.success(), "whoever relies on it has to know");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["missingEvents"], 1);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("1 events are not in"), "{said}");
    assert_eq!(
        answer["bytes"].as_u64().unwrap(),
        copy.metadata().unwrap().len(),
        "the rest is kept"
    );
}
