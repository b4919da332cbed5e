//! Load while things go away: nothing is lost, nothing is given up, and no attempt is spent.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::cast_precision_loss,
    reason = "tests: a failure here is a failed test; counts are small"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use duet_tests::app::{App, Asked, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::Backend;
use duet_tests::{SOON, eventually, http, metrics, on_both_buses};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};

const REPLICAS: usize = 4;
/// Publishers, each with a key of its own, together 500 events a second.
const KEYS: usize = 10;
const EACH: Duration = Duration::from_millis(20);
/// Each test wants the machine for itself: it is its load that counts.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Rounds of restarts. Fewer on NATS: what the sidecars do is the same.
fn rounds(backend: &Backend) -> usize {
    match backend {
        Backend::Embedded => 10,
        Backend::Nats(_) => 2,
    }
}

/// How long the bus is away.
fn away(backend: &Backend) -> Duration {
    match backend {
        Backend::Embedded => Duration::from_secs(60),
        Backend::Nats(_) => Duration::from_secs(8),
    }
}

fn resources(backend: &Backend, more: &str) -> String {
    let bus = backend.yaml();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: reader}}\nspec: {{ports: [{{port: 80, targetPort: http}}]}}\n---\napiVersion: duet.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: read}}\nspec:\n  topic: news\n  subscriber: {{service: reader, path: /news}}\n  retry: {{maxAttempts: 2, backoff: 100ms}}\n{more}{bus}"
    )
}

/// What the application saw of an event.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    times: u32,
    highest_attempt: u32,
}

/// Everything that arrived, at any replica: what was seen of each event, and the order of first arrivals.
#[derive(Clone, Default)]
struct Arrivals(Arc<Mutex<Arrived>>);

type Arrived = (BTreeMap<String, Seen>, Vec<String>);

impl Arrivals {
    fn note(&self, event: &Value, attempt: &str) {
        let mut arrivals = self.0.lock().unwrap();
        let id = event["id"].as_str().unwrap().to_owned();
        let seen = arrivals.0.entry(id.clone()).or_default();
        seen.times += 1;
        seen.highest_attempt = seen.highest_attempt.max(attempt.parse().unwrap());
        if seen.times == 1 {
            arrivals.1.push(id);
        }
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().0.len()
    }

    /// An application that takes its time, so that there is always something in flight.
    async fn app(&self, address: SocketAddr) -> App {
        let arrivals = self.clone();
        let answer = move |asked: &Asked| {
            if asked.path == "/news" {
                arrivals.note(&asked.json(), asked.header("duet-delivery-attempt"));
            }
            Reply::new(if asked.path == "/dapr/subscribe" { 404 } else { 200 }, "")
                .after(Duration::from_millis(5))
        };
        App::start("reader", Some(Arc::new(answer)), address).await
    }

    /// Any free port.
    async fn new_app(&self) -> App {
        self.app("127.0.0.1:0".parse().unwrap()).await
    }
}

/// An application and the sidecar beside it.
struct Replica {
    sidecar: Sidecar,
    app: App,
}

impl Replica {
    async fn start(control_plane: &ControlPlane, arrivals: &Arrivals, number: usize) -> Self {
        let app = arrivals.new_app().await;
        let options = Options::service("reader", app.port()).instance(&format!("reader-{number}"));
        Self { sidecar: Sidecar::ready(control_plane, options).await, app }
    }

    /// As a rolling update does: both are told to leave, the application does so when it has answered what it was asked,
    /// and the sidecar after it; then both start again on the same ports and state.
    async fn roll(self, arrivals: &Arrivals) -> Self {
        let Self { mut sidecar, app } = self;
        sidecar.leave();
        eventually("the sidecar drains", SOON, || async {
            http::is_ok(sidecar.ports.metrics, "/ready").await.is_none().then_some(())
        })
        .await;
        let idle = "nothing is in the application's hands";
        eventually(idle, SOON, || in_hand(&sidecar)).await;
        let address = app.address;
        app.stop().await;
        sidecar.gone().await;
        let app = arrivals.app(address).await;
        sidecar.restart().await;
        sidecar.wait_ready().await;
        Self { sidecar, app }
    }
}

/// Something when nothing is.
async fn in_hand(sidecar: &Sidecar) -> Option<()> {
    let count = metrics::sum(sidecar.ports.metrics, "duet_event_in_flight_deliveries", &[]).await;
    (count < 0.5).then_some(())
}

/// Publishes until it is told to stop; each key's events one after the other. Returns the acknowledged ids, and how
/// many publishes were refused.
struct Load {
    stop: Arc<AtomicBool>,
    publishers: Vec<tokio::task::JoinHandle<(Vec<String>, usize)>>,
}

impl Load {
    fn start(api: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let publishers = (0..KEYS).map(|key| tokio::spawn(publish(api, key, Arc::clone(&stop))));
        let publishers = publishers.collect();
        Self { stop, publishers }
    }

    async fn stop(self) -> (BTreeSet<String>, usize) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut acknowledged, mut refused) = (BTreeSet::new(), 0);
        for publisher in self.publishers {
            let (ids, failures) = publisher.await.unwrap();
            acknowledged.extend(ids);
            refused += failures;
        }
        (acknowledged, refused)
    }
}

async fn publish(api: SocketAddr, key: usize, stop: Arc<AtomicBool>) -> (Vec<String>, usize) {
    let client = http::client();
    let (mut acknowledged, mut refused) = (Vec::new(), 0);
    let mut tick = interval(EACH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        tick.tick().await;
        let id = format!("{key}-{number:06}");
        number += 1;
        let event = json!({
            "specversion": "1.0", "id": id, "source": "/load", "type": "t", "partitionkey": key.to_string(),
        });
        let request = client.post(format!("http://{api}/v1.0/publish/default/news"));
        let request = request.header("content-type", "application/cloudevents+json");
        match request.body(event.to_string()).send().await {
            Ok(answer) if answer.status() == 204 => acknowledged.push(id),
            _ => refused += 1,
        }
    }
    (acknowledged, refused)
}

async fn all_arrive(arrivals: &Arrivals, acknowledged: &BTreeSet<String>) {
    eventually("everything arrives", 4 * SOON, || async {
        let seen = &arrivals.0.lock().unwrap().0;
        acknowledged.iter().all(|id| seen.contains_key(id)).then_some(())
    })
    .await;
}

/// Restarts every replica, several times, in turn, while 500 events a second come in.
async fn rolling_restart(backend: &Backend, more: &str, allowed: f64) {
    let _alone = ALONE.lock().await;
    let news = resources(backend, more);
    let control_plane = ControlPlane::start(&[("news.yaml", &news)]).await;
    let arrivals = Arrivals::default();
    let mut replicas = Vec::new();
    for number in 0..REPLICAS {
        replicas.push(Replica::start(&control_plane, &arrivals, number).await);
    }
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let load = Load::start(writer.ports.api);
    for _ in 0..rounds(backend) {
        for _ in 0..REPLICAS {
            let before = arrivals.count();
            let replica = replicas.remove(0).roll(&arrivals).await;
            replicas.push(replica);
            eventually("events go on", SOON, || async {
                (arrivals.count() > before).then_some(())
            })
            .await;
        }
    }
    let (acknowledged, refused) = load.stop().await;
    assert_eq!(refused, 0, "no publish failed");
    all_arrive(&arrivals, &acknowledged).await;
    let seen = arrivals.0.lock().unwrap().0.clone();
    assert_unspent(&seen);
    for replica in &replicas {
        assert_nothing_given_up(&replica.sidecar).await;
    }
    let duplicates: u32 = seen.values().map(|seen| seen.times - 1).sum();
    eprintln!("{} acknowledged, none lost, {duplicates} delivered again", acknowledged.len());
    // While the processes are still there: a failure shows their last words.
    assert!(f64::from(duplicates) <= acknowledged.len() as f64 * allowed, "{duplicates} again");
}

fn assert_unspent(seen: &BTreeMap<String, Seen>) {
    let spent = seen.values().filter(|seen| seen.highest_attempt > 1).count();
    assert_eq!(spent, 0, "events whose attempts were spent by a restart");
}

async fn assert_nothing_given_up(replica: &Sidecar) {
    let labels = [("subscription", "default/read"), ("outcome", "dead_letter")];
    let dead = metrics::sum(replica.ports.metrics, "duet_event_deliveries_total", &labels).await;
    assert!(dead < 0.5, "{dead} dead letters");
}

on_both_buses!(
    a_rolling_restart_loses_nothing_and_spends_nothing,
    with_once_a_rolling_restart_delivers_nothing_again,
    while_the_bus_is_away_publishing_goes_on_and_keeps_its_order,
);

async fn a_rolling_restart_loses_nothing_and_spends_nothing(backend: &Backend) {
    rolling_restart(backend, "", 0.001).await;
}

async fn with_once_a_rolling_restart_delivers_nothing_again(backend: &Backend) {
    rolling_restart(backend, "  delivery: {once: true}\n", 0.0).await;
}

/// Kills what keeps the events: the control plane, or the server.
async fn take_away(backend: &mut Backend, control_plane: &mut ControlPlane) {
    let away = away(backend);
    match backend {
        Backend::Embedded => control_plane.kill(),
        Backend::Nats(server) => server.kill(),
    }
    tokio::time::sleep_until(Instant::now() + away).await;
    match backend {
        Backend::Embedded => control_plane.restart().await,
        Backend::Nats(server) => server.restart().await,
    }
}

async fn while_the_bus_is_away_publishing_goes_on_and_keeps_its_order(backend: &mut Backend) {
    let _alone = ALONE.lock().await;
    let news = resources(backend, "  delivery: {ordered: true}\n");
    let mut control_plane = ControlPlane::start(&[("news.yaml", &news)]).await;
    let arrivals = Arrivals::default();
    let app = arrivals.new_app().await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let load = Load::start(writer.ports.api);
    eventually("events flow", SOON, || async { (arrivals.count() > 100).then_some(()) }).await;
    take_away(backend, &mut control_plane).await;
    let before = arrivals.count();
    eventually("events flow again", SOON, || async { (arrivals.count() > before).then_some(()) })
        .await;
    let (acknowledged, refused) = load.stop().await;
    assert_eq!(refused, 0, "publishes went on");
    all_arrive(&arrivals, &acknowledged).await;
    let order = arrivals.0.lock().unwrap().1.clone();
    for key in 0..KEYS {
        let prefix = format!("{key}-");
        let of_key: Vec<&String> = order.iter().filter(|id| id.starts_with(&prefix)).collect();
        assert!(of_key.is_sorted(), "key {key} is out of order");
    }
    eventually("the outbox is empty", SOON, || async {
        let waiting = metrics::sum(writer.ports.metrics, "duet_outbox_events", &[]).await;
        (waiting < 0.5).then_some(())
    })
    .await;
    eprintln!("{} acknowledged, none lost, in order", acknowledged.len());
}
