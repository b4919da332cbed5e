//! From the embedded bus to a real `nats-server`: the resource changes, `duet events migrate` moves the backlog, with a
//! kill in the middle.

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

use std::cell::Cell;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use duet_tests::app::{App, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::NatsServer;
use duet_tests::{SOON, eventually, http};
use serde_json::{Value, json};

const RESOURCES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: reader}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: done}
spec:
  topic: news
  subscriber: {service: reader, path: /done}
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: behind}
spec:
  topic: news
  delivery: {ordered: true}
  subscriber: {service: reader, path: /behind}
  retry: {maxAttempts: 1000, backoff: 50ms, maxBackoff: 50ms}
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: picky}
spec:
  topic: other
  subscriber: {service: reader, path: /picky}
";

fn duet(control_plane: &ControlPlane, arguments: &[&str]) -> Output {
    Command::new(duet_tests::process::program("duet"))
        .args(["events", "--operator", &format!("http://{}", control_plane.operator)])
        .args(["--output", "json"])
        .args(arguments)
        .output()
        .unwrap()
}

fn ask(control_plane: &ControlPlane, arguments: &[&str]) -> Value {
    let output = duet(control_plane, arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "duet events {arguments:?}: {error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn publish(writer: &Sidecar, topic: &str, id: u32) {
    let event = json!({
        "specversion": "1.0", "id": id.to_string(), "source": "/test", "type": "t",
        "partitionkey": "k", "number": id, "data": {"n": id},
    });
    let url = format!("http://{}/v1.0/publish/default/{topic}", writer.ports.api);
    let request = http::client().post(url).header("content-type", "application/cloudevents+json");
    let answer = request.body(event.to_string()).send().await.unwrap();
    assert_eq!(answer.status(), 204, "{event}");
}

fn ids(app: &App, path: &str) -> Vec<u32> {
    let asked = app.asked().into_iter().filter(|asked| asked.path == path);
    let id = |asked: duet_tests::app::Asked| -> u32 {
        let event = asked.json();
        let id = event["id"].as_str().unwrap().parse().unwrap();
        assert_eq!(event["number"], json!(id), "it is no string anywhere: {event}");
        id
    };
    asked.map(id).collect()
}

/// It subscribes itself, and is content with everything.
async fn subscribing_app() -> App {
    App::replying(|asked| match asked.path.as_str() {
        "/dapr/subscribe" => {
            Reply::new(200, r#"[{"pubsubname": "default", "topic": "news", "route": "/own"}]"#)
        }
        _ => Reply::new(200, ""),
    })
    .await
}

/// Moves this many events, by one request.
async fn step(control_plane: &ControlPlane, limit: u32) -> Value {
    let url = format!("http://{}/v1/migrate", control_plane.operator);
    let request = http::client().post(url).header("duet-operator", "1");
    let request = request.header("content-type", "application/json");
    let answer = request.body(json!({ "limit": limit }).to_string()).send().await.unwrap();
    let status = answer.status();
    let text = answer.text().await.unwrap();
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[tokio::test]
async fn a_backlog_moves_to_nats_without_loss_and_to_nobody_else() {
    let Some(nats) = NatsServer::start().await else { return };
    let mut control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let healthy = Arc::new(AtomicBool::new(false));
    let app = App::replying({
        let healthy = Arc::clone(&healthy);
        move |asked| match asked.path.as_str() {
            "/dapr/subscribe" => Reply::new(404, ""),
            "/picky" if !healthy.load(Ordering::Relaxed) => Reply::new(404, ""),
            "/behind" if !healthy.load(Ordering::Relaxed) => Reply::new(503, ""),
            _ => Reply::new(200, ""),
        }
    })
    .await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    for id in 1..=20 {
        publish(&writer, "news", id).await;
    }
    publish(&writer, "other", 1).await;
    eventually("one has handled all, one has a dead letter", SOON, || async {
        let letters = ask(&control_plane, &["topics"])["topics"].clone();
        let dead = letters
            .as_array()?
            .iter()
            .any(|t| t["name"] == "other.dead-letter" && t["events"] == 1);
        let all = ask(&control_plane, &["subscriptions"])["subscriptions"].clone();
        let done = all.as_array()?.iter().any(|s| s["name"] == "default/done" && s["lag"] == 0);
        let behind =
            all.as_array()?.iter().any(|s| s["name"] == "default/behind" && s["lag"] == 20);
        (dead && done && behind).then_some(())
    })
    .await;
    let handled = ids(&app, "/done").len();
    assert_eq!(handled, 20);

    // It moves without a restart.
    control_plane.write("bus.yaml", &nats.default_bus());
    eventually("the bus is on NATS, with its subscriptions", SOON, || async {
        let all = ask(&control_plane, &["subscriptions"])["subscriptions"].clone();
        let all = all.as_array()?.clone();
        (all.len() == 3 && all.iter().all(|s| s["lag"] == 0)).then_some(())
    })
    .await;
    // Published meanwhile: it waits, since it must not overtake what is older.
    publish(&writer, "news", 21).await;
    let by_hand = duet(&control_plane, &["publish", "news", "1"]);
    let error = String::from_utf8_lossy(&by_hand.stderr).into_owned();
    assert!(!by_hand.status.success() && error.contains("duet events migrate"), "{error}");
    assert_eq!(step(&control_plane, 7).await["moved"], 7);
    control_plane.restart().await;
    assert_eq!(step(&control_plane, 5).await["moved"], 5);
    healthy.store(true, Ordering::Relaxed);
    let answer = ask(&control_plane, &["migrate"]);
    // 20 in all of this topic, and the dead letter.
    assert_eq!(answer["moved"], 20 - 7 - 5 + 1, "{answer}");
    let folder = answer["folder"].as_str().unwrap();
    assert!(folder.ends_with("default.moved") && std::path::Path::new(folder).is_dir(), "{folder}");

    eventually("the newest arrives at both", SOON, || async {
        let both = ["/done", "/behind"].iter().all(|path| ids(&app, path).contains(&21));
        both.then_some(())
    })
    .await;
    let mut order = ids(&app, "/behind");
    order.dedup();
    let last = order.split_off(order.len() - 21);
    assert_eq!(last, (1..=21).collect::<Vec<u32>>(), "in order, none missing");
    let done = ids(&app, "/done");
    assert_eq!(done[20..], [21], "what it had handled does not come again");

    let letters = ask(&control_plane, &["dead-letters", "list"]);
    assert_eq!(letters[0]["letter"]["event"]["id"], "1", "{letters}");
    let before = ids(&app, "/picky").len();
    ask(&control_plane, &["dead-letters", "redrive", "--all"]);
    eventually("the dead letter is delivered", SOON, || async {
        (ids(&app, "/picky").len() > before).then_some(())
    })
    .await;

    let again = duet(&control_plane, &["migrate"]);
    let error = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && error.contains("nothing is left to move"), "{error}");
}

#[tokio::test]
async fn events_of_a_subscription_that_is_gone_are_asked_about() {
    let Some(nats) = NatsServer::start().await else { return };
    let mut control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    publish(&writer, "other", 1).await;
    eventually("it is on the bus", SOON, || async {
        let all = ask(&control_plane, &["subscriptions"])["subscriptions"].clone();
        let found = all.as_array()?.iter().any(|s| s["name"] == "default/picky" && s["lag"] == 1);
        found.then_some(())
    })
    .await;
    let fewer: Vec<&str> = RESOURCES.split("---\n").take(3).collect();
    control_plane.write("news.yaml", &fewer.join("---\n"));
    control_plane.write("bus.yaml", &nats.default_bus());
    control_plane.restart().await;
    let refused = duet(&control_plane, &["migrate"]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("default/picky"), "{error}");
    let answer = ask(&control_plane, &["migrate", "--skip", "default/picky"]);
    assert_eq!(answer["moved"], 0, "{answer}");
}

#[tokio::test]
async fn publishing_goes_on_while_the_bus_moves_and_nothing_is_lost_or_turned_around() {
    let Some(nats) = NatsServer::start().await else { return };
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let app = subscribing_app().await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    eventually("what the application subscribes itself is there", SOON, || async {
        let all = ask(&control_plane, &["subscriptions"])["subscriptions"].clone();
        (all.as_array()?.len() == 4).then_some(())
    })
    .await;
    publish(&writer, "news", 1).await;
    control_plane.write("bus.yaml", &nats.default_bus());
    let published = Cell::new(1);
    eventually("events of one key go through NATS", SOON, || {
        let id = published.get() + 1;
        published.set(id);
        let (writer, control_plane) = (&writer, &control_plane);
        async move {
            publish(writer, "news", id).await;
            let all = ask(control_plane, &["topics"])["topics"].clone();
            let news = all.as_array()?.iter().find(|topic| topic["name"] == "news")?.clone();
            // Positions begin anew there.
            (news["next"].as_u64()? < u64::from(id) / 2).then_some(())
        }
    })
    .await;
    let last = published.get() + 20;
    for id in published.get() + 1..=last {
        publish(&writer, "news", id).await;
    }
    // It refuses while events wait for a subscription whose consumer has not come yet.
    eventually("what was in hand at the move is moved", SOON, || async {
        duet(&control_plane, &["migrate"]).status.success().then_some(())
    })
    .await;
    let paths = ["/done", "/own", "/behind"];
    eventually("the newest arrives everywhere", SOON, || async {
        paths.iter().all(|path| ids(&app, path).contains(&last)).then_some(())
    })
    .await;
    for path in paths {
        let mut arrived = ids(&app, path);
        arrived.sort_unstable();
        arrived.dedup();
        assert_eq!(arrived, (1..=last).collect::<Vec<u32>>(), "none missing at {path}");
    }
    // An event in hand at the move comes again, before what is newer.
    let mut newest = 0;
    for id in ids(&app, "/behind") {
        assert!(id <= newest + 1, "{id} after {newest}");
        newest = newest.max(id);
    }
}

#[tokio::test]
async fn a_subscription_of_an_application_that_is_down_moves_as_well() {
    let Some(nats) = NatsServer::start().await else { return };
    let service = RESOURCES.split("---\n").next().unwrap();
    let control_plane = ControlPlane::start(&[("news.yaml", service)]).await;
    let app = subscribing_app().await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    let subscription = || {
        let all = ask(&control_plane, &["subscriptions"])["subscriptions"].clone();
        all.as_array()?.first().cloned()
    };
    eventually("what the application subscribes to is there", SOON, || async {
        subscription().map(drop)
    })
    .await;
    publish(&writer, "news", 1).await;
    eventually("it has handled that", SOON, || async {
        subscription().filter(|it| it["lag"] == 0 && ids(&app, "/own") == [1]).map(drop)
    })
    .await;
    drop(reader);
    control_plane.write("bus.yaml", &nats.default_bus());
    eventually("the bus is on NATS, with a position that begins anew", SOON, || async {
        let all = ask(&control_plane, &["topics"])["topics"].clone();
        all.as_array()?.iter().any(|it| it["name"] == "news" && it["next"] == 1).then_some(())
    })
    .await;
    publish(&writer, "news", 2).await;
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    eventually("what was published while it was down arrives", SOON, || async {
        ids(&app, "/own").contains(&2).then_some(())
    })
    .await;
    assert_eq!(ids(&app, "/own"), [1, 2]);
}

#[tokio::test]
async fn a_paused_subscription_moves_to_an_older_server_only_without_its_events() {
    let Some(nats) = NatsServer::start_old().await else { return };
    let control_plane = ControlPlane::start(&[("news.yaml", RESOURCES)]).await;
    let app = App::replying(|_| Reply::new(200, "")).await;
    let reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
    ask(&control_plane, &["pause", "default/picky"]);
    publish(&writer, "other", 1).await;
    drop(reader);
    publish(&writer, "news", 1).await;
    control_plane.write("bus.yaml", &nats.default_bus());
    eventually(
        "the subscriptions are on NATS, where nothing waits and nothing rests",
        SOON,
        || async {
            let all = ask(&control_plane, &["subscriptions"])["subscriptions"].clone();
            let all = all.as_array()?.clone();
            let fresh = all.iter().all(|it| it["lag"] == 0 && it["paused"] == false);
            (fresh && all.len() == 3).then_some(())
        },
    )
    .await;
    let refused = duet(&control_plane, &["migrate"]);
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && why.contains("2.11") && why.contains("picky"), "{why}");
    ask(&control_plane, &["migrate", "--skip", "default/picky"]);
    let _reader = Sidecar::ready(&control_plane, Options::service("reader", app.port())).await;
    publish(&writer, "other", 2).await;
    eventually("what moved arrives, and what comes from then on", SOON, || async {
        (ids(&app, "/behind") == [1] && ids(&app, "/picky") == [2]).then_some(())
    })
    .await;
}
