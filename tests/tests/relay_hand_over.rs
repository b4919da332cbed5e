//! What an application has in hand when something changes: its subscription is edited, its sidecar leaves, it does not
//! listen for a moment, or another version takes its place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use duet_tests::app::{Answer, App, Asked, History, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::Backend;
use duet_tests::{SOON, eventually, http, metrics, on_both_buses};
use serde_json::json;
use tokio::runtime::Runtime;

/// A handler's time for `slow` events.
const SLOW: Duration = Duration::from_secs(12);
/// What takes less has not waited for one.
const MEANWHILE: Duration = Duration::from_secs(10);

fn subscription(delivery: &str) -> String {
    format!(
        "\
apiVersion: v1
kind: Service
metadata: {{name: reader}}
spec: {{ports: [{{port: 80, targetPort: http}}]}}
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {{name: read}}
spec:
  topic: news
  subscriber: {{service: reader, path: /news}}
  delivery: {{{delivery}}}
"
    )
}

/// Takes its time for `slow` events, and a moment for `brief` ones; subscribes to nothing itself.
fn handler(asked: &Asked) -> Reply {
    match asked.path.as_str() {
        "/news" if asked.json()["type"] == "slow" => Reply::new(200, "").after(SLOW),
        "/news" if asked.json()["type"] == "brief" => {
            Reply::new(200, "").after(Duration::from_millis(300))
        }
        "/news" => Reply::new(200, ""),
        _ => Reply::new(404, ""),
    }
}

async fn publish(api: SocketAddr, topic: &str, kind: &str, number: u32) {
    let event = json!({
        "specversion": "1.0", "id": format!("{kind}{number}"), "source": "/test", "type": kind,
        "partitionkey": "one",
    });
    let request = http::client().post(format!("http://{api}/v1.0/publish/default/{topic}"));
    let request = request.header("content-type", "application/cloudevents+json");
    assert_eq!(request.body(event.to_string()).send().await.unwrap().status(), 204);
}

/// Ids of what arrived at a path.
fn ids(history: &History, path: &str) -> Vec<String> {
    let asked = history.asked().into_iter().filter(|asked| asked.path == path);
    asked.map(|asked| asked.json()["id"].as_str().unwrap().to_owned()).collect()
}

async fn arrives(history: &History, path: &str, id: &str) {
    eventually(&format!("{id} arrives at {path}"), SOON, || async {
        ids(history, path).iter().any(|one| one == id).then_some(())
    })
    .await;
}

/// Waits until the bus knows of everything that it is handled.
async fn all_is_handled(control_plane: &ControlPlane) {
    eventually("everything is handled", SOON, || async {
        let lag = metrics::sum(control_plane.admin, "duet_bus_subscription_lag_events", &[]).await;
        (lag < 1.0).then_some(())
    })
    .await;
}

async fn outcomes(sidecar: &Sidecar, outcome: &str) -> f64 {
    let name = "duet_event_deliveries_total";
    metrics::sum(sidecar.ports.metrics, name, &[("outcome", outcome)]).await
}

on_both_buses!(
    an_edit_delivers_nothing_again_and_holds_up_nothing,
    an_edit_delivers_nothing_again_where_order_is_kept,
    a_leaving_replica_takes_nothing_more,
    an_application_that_did_not_listen_for_a_moment_goes_on,
);

async fn an_edit_delivers_nothing_again_and_holds_up_nothing(backend: &Backend) {
    let resources = |limit: u32| subscription(&format!("maxInFlight: {limit}")) + &backend.yaml();
    let control_plane = ControlPlane::start(&[("news.yaml", &resources(8))]).await;
    let app = App::replying(handler).await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let (api, history) = (reader.ports.api, app.history());
    publish(api, "news", "slow", 1).await;
    arrives(&history, "/news", "slow1").await;
    let began = Instant::now();
    for limit in 9..=11 {
        control_plane.write("news.yaml", &resources(limit));
        tokio::time::sleep(Duration::from_secs(1)).await;
        publish(api, "news", "fast", limit).await;
        arrives(&history, "/news", &format!("fast{limit}")).await;
    }
    assert!(began.elapsed() < MEANWHILE, "they waited for the slow one");
    all_is_handled(&control_plane).await;
    assert_eq!(ids(&history, "/news"), ["slow1", "fast9", "fast10", "fast11"]);
}

async fn an_edit_delivers_nothing_again_where_order_is_kept(backend: &Backend) {
    let resources = |limit: u32| {
        let delivery = format!("ordered: true, once: true, maxInFlight: {limit}");
        subscription(&delivery) + &backend.yaml()
    };
    let control_plane = ControlPlane::start(&[("news.yaml", &resources(8))]).await;
    let app = App::replying(handler).await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let (api, history) = (reader.ports.api, app.history());
    publish(api, "news", "slow", 1).await;
    arrives(&history, "/news", "slow1").await;
    let began = Instant::now();
    control_plane.write("news.yaml", &resources(9));
    publish(api, "news", "fast", 2).await;
    arrives(&history, "/news", "fast2").await;
    assert!(began.elapsed() > MEANWHILE, "it overtook the slow one");
    all_is_handled(&control_plane).await;
    assert_eq!(ids(&history, "/news"), ["slow1", "fast2"]);
}

async fn a_leaving_replica_takes_nothing_more(backend: &Backend) {
    let resources = subscription("") + &backend.yaml();
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let apps = [App::replying(handler).await, App::replying(handler).await];
    let options = |replica: usize| {
        let options = Options::service("reader", apps[replica].port());
        options.instance(&format!("reader-{replica}")).flags(&["--drain-timeout", "60s"])
    };
    let first = Sidecar::ready(&control_plane, options(0)).await;
    let second = Sidecar::ready(&control_plane, options(1)).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let api = writer.ports.api;
    publish(api, "news", "slow", 1).await;
    let busy = eventually("one has the slow one", SOON, || async {
        apps.iter().position(|app| !app.asked().is_empty())
    })
    .await;
    let began = Instant::now();
    [&first, &second][busy].leave();
    // The other one has more to do, so that it would be this one's turn.
    for number in 0..40 {
        publish(api, "news", "brief", number).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let histories = apps.each_ref().map(App::history);
    let all = || histories.iter().flat_map(|history| ids(history, "/news")).collect::<Vec<_>>();
    eventually("all arrive", SOON, || async { (all().len() >= 41).then_some(()) }).await;
    assert!(began.elapsed() < MEANWHILE, "they waited for the slow one");
    all_is_handled(&control_plane).await;
    let mut all = all();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 41);
    assert_eq!(histories.map(|history| ids(&history, "/news").len()).iter().sum::<usize>(), 41);
}

async fn an_application_that_did_not_listen_for_a_moment_goes_on(backend: &Backend) {
    let resources = subscription("") + &backend.yaml();
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let app = App::replying(handler).await;
    let (address, before) = (app.address, app.history());
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let api = reader.ports.api;
    publish(api, "news", "slow", 1).await;
    arrives(&before, "/news", "slow1").await;
    let began = Instant::now();
    // What it has in hand goes on.
    app.stop().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    publish(api, "news", "fast", 2).await;
    let app = App::start("again", Some(Arc::new(handler)), address).await;
    let after = app.history();
    arrives(&after, "/news", "fast2").await;
    assert!(began.elapsed() < MEANWHILE, "it waited for the slow one");
    all_is_handled(&control_plane).await;
    assert_eq!(
        (ids(&before, "/news"), ids(&after, "/news")),
        (vec!["slow1".into()], vec!["fast2".into()])
    );
}

/// One version of an application, which subscribes in code. It ends as a process does: with its connections.
struct Version {
    /// `None` once it has ended.
    runtime: Option<Runtime>,
    history: History,
    address: SocketAddr,
}

impl Version {
    /// Subscribes to these topics, each at a path of its own.
    async fn start(routes: &'static [(&'static str, &'static str)], address: SocketAddr) -> Self {
        let answer: Answer = Arc::new(move |asked| {
            if asked.path == "/dapr/subscribe" {
                let subscription = |(topic, route): &(&str, &str)| json!({"pubsubname": "default", "topic": topic, "route": route});
                let all: Vec<_> = routes.iter().map(subscription).collect();
                return Reply::new(200, &json!(all).to_string());
            }
            let known = routes.iter().any(|(_, route)| *route == asked.path);
            Reply::new(if known && !asked.path.starts_with("/gone") { 200 } else { 404 }, "")
        });
        let runtime = Runtime::new().unwrap();
        let app = runtime.spawn(App::start("version", Some(answer), address)).await.unwrap();
        let (history, address) = (app.history(), app.address);
        runtime.spawn(async move {
            let _app = app;
            std::future::pending::<()>().await;
        });
        Self { runtime: Some(runtime), history, address }
    }

    /// Takes the place of this one, at once.
    async fn replace(mut self, routes: &'static [(&'static str, &'static str)]) -> Self {
        self.end();
        // The port is free when its listener is dropped.
        eventually("the application is gone", SOON, || async {
            tokio::net::TcpStream::connect(self.address).await.is_err().then_some(())
        })
        .await;
        Self::start(routes, self.address).await
    }

    fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Version {
    fn drop(&mut self) {
        self.end();
    }
}

#[tokio::test]
async fn another_version_that_takes_over_in_no_time_is_asked_what_it_wants() {
    let control_plane = ControlPlane::start(&[]).await;
    let any = "127.0.0.1:0".parse().unwrap();
    let first = Version::start(&[("news", "/old")], any).await;
    let port = first.address.port();
    let reader = Sidecar::ready(&control_plane, Options::service("reader", port)).await;
    let api = reader.ports.api;
    let count = AtomicU32::new(0);
    // A subscription starts with what comes after it.
    let subscribed = async |topic: &str, history: &History, path: &str| {
        eventually(&format!("it is subscribed to {topic}"), SOON, || async {
            publish(api, topic, "early", count.fetch_add(1, Ordering::Relaxed)).await;
            (!ids(history, path).is_empty()).then_some(())
        })
        .await;
    };
    subscribed("news", &first.history, "/old").await;
    let second = first.replace(&[("news", "/new")]).await;
    for number in 0..5 {
        publish(api, "news", "late", number).await;
    }
    for number in 0..5 {
        arrives(&second.history, "/new", &format!("late{number}")).await;
    }
    assert!(outcomes(&reader, "dead_letter").await < 1.0, "an event was given up");

    // Without any event that could tell.
    let third = second.replace(&[("news", "/new"), ("more", "/more"), ("lost", "/gone")]).await;
    subscribed("more", &third.history, "/more").await;
    // A route that it still says and does not have: 404 gives up, as in Dapr.
    publish(api, "lost", "late", 9).await;
    eventually("it is among the dead letters", SOON, || async {
        (outcomes(&reader, "dead_letter").await >= 1.0).then_some(())
    })
    .await;
}
