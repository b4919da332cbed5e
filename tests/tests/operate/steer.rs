//! Replay, pause and resume, and what is said of what does not exist.

use std::process::Command;

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::Backend;
use duet_tests::process::program;
use duet_tests::{SOON, eventually, on_both_buses};
use jiff::Timestamp;
use serde_json::json;

use super::operator::{Operator, SERVICES, arrive, arrives, cells, ids, subscription, willing};

on_both_buses!(
    a_replay_is_for_one_subscription_from_where_it_is_asked,
    a_pause_survives_a_restart_of_the_control_plane,
);

async fn a_replay_is_for_one_subscription_from_where_it_is_asked(backend: &Backend) {
    let ordered = "  delivery: {ordered: true}\n";
    let resources =
        [SERVICES, &subscription("read", "reader", ordered), &subscription("other", "reader", "")];
    let resources = resources.concat() + &backend.yaml();
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let app = willing().await;
    let options = Options::service("reader", app.port());
    let _reader = Sidecar::ready(&control_plane, options).await;
    let operator = Operator::of(&control_plane);
    // Times apart from each other.
    let mut published: Vec<Timestamp> = Vec::new();
    for number in 1..=3 {
        operator.text(&["publish", "news", "1", "--id", &format!("e{number}"), "--key", "k"]);
        let from = number.to_string();
        let stored = operator.json_lines(&["tail", "news", "--from", &from, "--no-follow"]);
        let time: Timestamp = stored[0]["published"].as_str().unwrap().parse().unwrap();
        assert!(published.iter().all(|before| *before < time));
        published.push(time);
        eventually("the clock goes on", SOON, || async {
            (Timestamp::now().as_millisecond() > time.as_millisecond()).then_some(())
        })
        .await;
    }
    arrive(&app, "/read", 3).await;
    arrive(&app, "/other", 3).await;
    operator.becomes("default/read", "lag", json!(0)).await;

    let mut seen = 3;
    for (from, expected) in [
        (published[1].to_string().as_str(), &["e2", "e3"][..]),
        ("3", &["e3"]),
        ("earliest", &["e1", "e2", "e3"]),
    ] {
        let said = operator.text(&["replay", "default/read", "--from", from]);
        assert_eq!(said, format!("default/read goes on from {from}\n"));
        arrive(&app, "/read", seen + expected.len()).await;
        operator.becomes("default/read", "lag", json!(0)).await;
        assert_eq!(ids(&app, "/read").split_off(seen), expected, "from {from}");
        seen += expected.len();
    }
    assert_eq!(ids(&app, "/other").len(), 3, "nobody else is concerned");

    // The other way: what waits is left out.
    operator.text(&["pause", "default/read"]);
    operator.publish("skipped", 4);
    arrives(&app, "/other", "skipped").await;
    for skips in ["latest", "5", "2100-01-01T00:00:00Z"] {
        let error = operator.fails(&["replay", "default/read", "--from", skips]);
        assert!(error.contains("1 events wait") && error.contains("--skip-waiting"), "{error}");
    }
    let latest = ["replay", "default/read", "--from", "latest", "--skip-waiting"];
    assert_eq!(operator.json(&latest), json!({"moved": true}));
    operator.text(&["resume", "default/read"]);
    operator.publish("next", 5);
    arrives(&app, "/read", "next").await;
    assert!(!ids(&app, "/read").contains(&"skipped".to_owned()));

    let error = operator.fails(&["replay", "default/nope", "--from", "earliest"]);
    assert!(error.contains("there is no subscription \"default/nope\""), "{error}");
    let error = operator.fails(&["replay", "default/read", "--from", "noon"]);
    assert!(error.contains("\"noon\""), "{error}");
}

async fn a_pause_survives_a_restart_of_the_control_plane(backend: &Backend) {
    let resources =
        [SERVICES, &subscription("read", "reader", ""), &subscription("other", "reader", "")];
    let resources = resources.concat() + &backend.yaml();
    let mut control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let app = willing().await;
    let options = Options::service("reader", app.port());
    let _reader = Sidecar::ready(&control_plane, options).await;
    let operator = Operator::of(&control_plane);
    assert_eq!(operator.text(&["pause", "default/read"]), "default/read is paused\n");
    operator.publish("before", 1);
    arrives(&app, "/other", "before").await;
    control_plane.restart().await;
    operator.publish("after", 2);
    arrives(&app, "/other", "after").await;
    // Its consumer is back, and gets nothing.
    let status = operator.becomes("default/read", "consumers", json!(1)).await;
    assert_eq!((&status["paused"], &status["lag"]), (&json!(true), &json!(2)));
    let table = operator.text(&["subscriptions"]);
    assert!(
        cells(&table).iter().any(|row| row[0] == "default/read" && row[10] == "yes"),
        "{table}"
    );
    assert_eq!(ids(&app, "/read"), [""; 0]);
    assert_eq!(operator.text(&["resume", "default/read"]), "default/read is resumed\n");
    arrive(&app, "/read", 2).await;
    assert_eq!(operator.becomes("default/read", "lag", json!(0)).await["paused"], false);
    assert_eq!(operator.json(&["pause", "default/read"]), json!({"paused": true}));
    assert_eq!(operator.json(&["resume", "default/read"]), json!({"paused": false}));
    for action in ["pause", "resume"] {
        let error = operator.fails(&[action, "default/nope"]);
        assert!(error.contains("there is no subscription \"default/nope\""), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_exist_is_named() {
    let control_plane = ControlPlane::start(&[]).await;
    let operator = Operator::of(&control_plane);
    let commands: [&[&str]; 8] = [
        &["topics"],
        &["subscriptions"],
        &["tail", "news"],
        &["publish", "news", "1"],
        &["dead-letters", "list"],
        &["replay", "a/b", "--from", "1"],
        &["pause", "a/b"],
        &["migrate"],
    ];
    for command in commands {
        let error = operator.fails(&[&["--bus", "nope"], command].concat());
        assert!(error.contains("nope"), "{command:?}: {error}");
    }
    let error = operator.fails(&["--bus", "nope", "topics"]);
    assert!(error.contains("known are: default"), "{error}");
    let error = operator.fails(&["migrate"]);
    assert!(error.contains("embedded"), "{error}");

    let at = control_plane.operator.to_string();
    let by_environment = Command::new(program("duet"))
        .args(["events", "topics", "--json"])
        .env("DUET_OPERATOR", &operator.0)
        .output()
        .unwrap();
    assert!(by_environment.status.success(), "{by_environment:?}");
    drop(control_plane);
    let error = operator.fails(&["topics"]);
    assert!(error.contains(&at) && error.contains("--operator"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_is_forgotten_when_nobody_declares_or_consumes_it_any_more() {
    let resources =
        [SERVICES, &subscription("read", "reader", ""), &subscription("old", "absent", "")];
    let control_plane = ControlPlane::start(&[("news.yaml", &resources.concat())]).await;
    let app = willing().await;
    let options = Options::service("reader", app.port());
    let _reader = Sidecar::ready(&control_plane, options).await;
    let operator = Operator::of(&control_plane);
    operator.publish("e1", 1);
    arrives(&app, "/read", "e1").await;
    let error = operator.fails(&["forget", "default/old"]);
    assert!(error.contains("a Subscription resource declares it"), "{error}");
    let error = operator.fails(&["forget", "default/nope"]);
    assert!(error.contains("there is no subscription \"default/nope\""), "{error}");

    control_plane.write("news.yaml", &[SERVICES, &subscription("read", "reader", "")].concat());
    eventually("the resource is gone", SOON, || async {
        let output = operator.run(&["forget", "default/old"], "");
        let error = String::from_utf8(output.stderr).unwrap();
        (error.contains("1 events wait for it; say --skip-waiting")).then_some(())
    })
    .await;
    let said = operator.text(&["forget", "default/old", "--skip-waiting"]);
    assert_eq!(said, "default/old is forgotten; 1 events waited for it\n");
    assert_eq!(operator.status("default/old"), serde_json::Value::Null);
    operator.becomes("default/read", "consumers", json!(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_reaches_an_application_that_gets_each_event_once() {
    let once = "  delivery: {once: true, ordered: true}\n";
    let resources = [SERVICES, &subscription("read", "reader", once)];
    let mut control_plane = ControlPlane::start(&[("news.yaml", &resources.concat())]).await;
    let app = willing().await;
    let options = Options::service("reader", app.port());
    let _reader = Sidecar::ready(&control_plane, options).await;
    let operator = Operator::of(&control_plane);
    for number in 1..=2 {
        operator.text(&["publish", "news", "1", "--id", &format!("e{number}"), "--key", "k"]);
    }
    arrive(&app, "/read", 2).await;
    operator.becomes("default/read", "lag", json!(0)).await;
    operator.text(&["replay", "default/read", "--from", "earliest"]);
    arrive(&app, "/read", 4).await;
    // Which replay is which is known after a restart as well.
    operator.becomes("default/read", "lag", json!(0)).await;
    control_plane.restart().await;
    operator.becomes("default/read", "consumers", json!(1)).await;
    operator.text(&["replay", "default/read", "--from", "2"]);
    arrive(&app, "/read", 5).await;
    operator.becomes("default/read", "lag", json!(0)).await;
    assert_eq!(ids(&app, "/read"), ["e1", "e2", "e1", "e2", "e2"]);
}
