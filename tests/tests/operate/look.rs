//! Looking: topics, subscriptions, and a topic's events as they come.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use duet_tests::app::{App, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::operator::{Operator, SERVICES, arrives, cells, subscription};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_and_subscriptions_say_what_waits() {
    let patient = "  retry: {backoff: 1h, maxBackoff: 1h}\n  delivery: {ackTimeout: 10m}\n";
    let resources = [
        SERVICES,
        &subscription("read", "reader", patient),
        &subscription("nobody", "absent", "  deadLetterTopic: poison\n"),
    ];
    let control_plane = ControlPlane::start(&[("news.yaml", &resources.concat())]).await;
    let app = App::replying(|asked| match asked.path.as_str() {
        "/dapr/subscribe" => Reply::new(404, ""),
        _ if asked.json()["id"] == "bad" => Reply::new(500, ""),
        _ if asked.json()["id"] == "slow" => Reply::new(200, "").after(Duration::from_secs(600)),
        _ => Reply::new(200, ""),
    })
    .await;
    let options = Options::service("reader", app.port());
    let _reader = Sidecar::ready(&control_plane, options).await;
    let operator = Operator::of(&control_plane);
    for (number, id) in ["fine", "bad", "slow"].into_iter().enumerate() {
        operator.publish(id, u32::try_from(number).unwrap());
    }
    arrives(&app, "/read", "slow").await;
    operator.becomes("default/read", "retrying", json!(1)).await;
    let read = operator.becomes("default/read", "lag", json!(2)).await;
    let stored = operator.json_lines(&["tail", "news", "--from", "earliest", "--no-follow"]);
    let expected = json!({
        "name": "default/read", "topic": "news", "deadLetterTopic": "news.dead-letter", "lag": 2,
        "scheduled": 0, "oldest": stored[1]["published"], "waitingSince": stored[1]["published"], "inFlight": 1, "retrying": 1, "attempts": 1, "consumers": 1,
        "paused": false, "declared": true,
    });
    assert_eq!(read, expected);
    let nobody = operator.status("default/nobody");
    assert_eq!((&nobody["lag"], &nobody["consumers"]), (&json!(3), &json!(0)));
    assert_eq!(
        (&nobody["oldest"], &nobody["deadLetterTopic"]),
        (&stored[0]["published"], &json!("poison"))
    );

    let table = operator.text(&["subscriptions"]);
    let head = [
        "SUBSCRIPTION",
        "TOPIC",
        "LAG",
        "LATER",
        "OLDEST",
        "AGE",
        "IN FLIGHT",
        "RETRYING",
        "ATTEMPTS",
    ];
    let titles = table.lines().next().unwrap();
    assert!(head.iter().all(|title| titles.contains(title)), "{titles}");
    let oldest = stored[1]["published"].as_str().unwrap();
    let mut row = cells(&table)[1].clone();
    let age = row.remove(5);
    assert!(duet_api::duration::parse(age).is_ok_and(|age| age < SOON), "{table}");
    assert_eq!(row, ["default/read", "news", "2", "0", oldest, "1", "1", "1", "1", "-"]);

    let topics = operator.json(&["topics"])["topics"].clone();
    let news = topics.as_array().unwrap().iter().find(|topic| topic["name"] == "news").unwrap();
    assert_eq!((&news["events"], &news["first"], &news["next"]), (&json!(3), &json!(1), &json!(4)));
    let table = operator.text(&["topics"]);
    let bytes = news["bytes"].to_string();
    assert!(cells(&table).contains(&vec!["news", "3", &bytes, "1", "4"]), "{table}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_backend_is_said_beside_the_tables() {
    let bus = "{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {name: other}, spec: {backend: BACKEND}}";
    let embedded = bus.replace("BACKEND", "{embedded: {}}");
    let control_plane = ControlPlane::start(&[("bus.yaml", &embedded)]).await;
    let operator = Operator::of(&control_plane);
    assert!(!operator.text(&["topics", "--bus", "other"]).is_empty());
    control_plane
        .write("bus.yaml", &bus.replace("BACKEND", "{nats: {servers: ['nats://127.0.0.1:1']}}"));
    eventually("the change is said", SOON, || async {
        let output = operator.run(&["topics", "--bus", "other"], "");
        let said = String::from_utf8(output.stderr).unwrap();
        let why = said.contains("another backend") && said.contains("cluster is away");
        (output.status.success() && why).then_some(())
    })
    .await;
    assert!(!operator.text(&["topics"]).is_empty(), "nothing of another bus");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tail_shows_what_is_asked_for() {
    let control_plane = ControlPlane::start(&[]).await;
    let operator = Operator::of(&control_plane);
    for number in 1..=5 {
        operator.publish(&format!("e{number}"), number);
    }
    let tail =
        |more: &[&str]| operator.json_lines(&[&["tail", "news", "--no-follow"], more].concat());
    let shown = |more: &[&str]| -> Vec<u64> {
        tail(more).iter().map(|stored| stored["position"].as_u64().unwrap()).collect()
    };
    let all = tail(&["--from", "earliest"]);
    assert_eq!(shown(&["--from", "earliest"]), [1, 2, 3, 4, 5]);
    let event = &all[2]["event"];
    assert_eq!(
        (&event["id"], &event["type"], &event["source"], &event["data"]),
        (&json!("e3"), &json!("story"), &json!("duet-cli"), &json!({"n": 3}))
    );
    assert_eq!(shown(&["--from", "4"]), [4, 5]);
    // Two of them may have the same millisecond.
    let time = all[2]["published"].as_str().unwrap();
    let published =
        |stored: &Value| -> Timestamp { stored["published"].as_str().unwrap().parse().unwrap() };
    let since = all.iter().filter(|stored| published(stored) >= published(&all[2]));
    assert_eq!(shown(&["--from", time]).len(), since.count());
    assert_eq!(shown(&["--from", "1h"]), [1, 2, 3, 4, 5]);
    assert_eq!(shown(&["--from", "2100-01-01T00:00:00Z"]), [0_u64; 0]);
    assert_eq!(shown(&[]), [0_u64; 0], "nothing is newer than the newest");
    let filter = "event.data.n > 1 && event.id != 'e4'";
    assert_eq!(shown(&["--from", "earliest", "--filter", filter]), [2, 3, 5]);
    assert_eq!(shown(&["--from", "earliest", "--filter", filter, "--limit", "2"]), [2, 3]);
    let text = operator.text(&["tail", "news", "--from", "3", "--limit", "1"]);
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["3", time, "story", "duet-cli", "e3", "{\"n\":3}"]
    );

    // Without --no-follow it goes on with what comes.
    let mut command = operator.command(&["tail", "news", "--from", "earliest", "--limit", "6"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for number in 1..=5 {
        assert!(lines.next().unwrap().unwrap().contains(&format!("e{number}")));
    }
    assert!(child.try_wait().unwrap().is_none(), "it waits for the sixth");
    operator.publish("e6", 6);
    assert!(lines.next().unwrap().unwrap().contains("e6"));
    assert!(child.wait().unwrap().success() && lines.next().is_none());
    // From what is newest when it starts, which is when exactly nobody knows.
    let mut child = operator.command(&["tail", "news", "--limit", "1"]);
    let child = child.stdout(Stdio::piped()).spawn().unwrap();
    let child = std::cell::RefCell::new(child);
    let number = std::cell::Cell::new(7);
    eventually("one newer event is shown", SOON, || async {
        operator.publish(&format!("e{}", number.get()), number.get());
        number.set(number.get() + 1);
        child.borrow_mut().try_wait().unwrap()
    })
    .await;
    let line = child.into_inner().wait_with_output().unwrap().stdout;
    let line = String::from_utf8(line).unwrap();
    let position: u32 = line.split_whitespace().next().unwrap().parse().unwrap();
    assert!(position >= 7, "{line}");

    let error = operator.fails(&["tail", "olds", "--no-follow"]);
    assert!(error.contains("there is no topic \"olds\""), "{error}");
    let error = operator.fails(&["tail", "news", "--from", "noon"]);
    assert!(error.contains("\"noon\""), "{error}");
    let error = operator.fails(&["tail", "news", "--filter", "event.data.n >"]);
    assert!(error.contains("filter"), "{error}");
}
