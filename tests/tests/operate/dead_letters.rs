//! Dead letters: which, whole, back, and away.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use duet_tests::app::{App, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually};
use serde_json::{Value, json};

use super::operator::{Operator, SERVICES, TWICE, arrive, cells, ids, subscription};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_found_moved_back_and_dropped() {
    let read = subscription("read", "reader", TWICE);
    let picky = subscription("picky", "reader", "  deadLetterTopic: poison\n");
    let resources = [SERVICES, &read, &picky].concat();
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let healthy = Arc::new(AtomicBool::new(false));
    let app = App::replying({
        let healthy = Arc::clone(&healthy);
        move |asked| match asked.path.as_str() {
            "/dapr/subscribe" => Reply::new(404, ""),
            _ if healthy.load(Ordering::Relaxed) => Reply::new(200, ""),
            "/picky" => Reply::new(200, "{\"status\": \"DROP\"}"),
            _ if asked.json()["id"] == "a" => Reply::new(404, ""),
            _ => Reply::new(500, ""),
        }
    })
    .await;
    let options = Options::service("reader", app.port());
    let reader = Sidecar::ready(&control_plane, options).await;
    let operator = Operator::of(&control_plane);
    operator.publish("a", 1);
    operator.publish("b", 2);
    eventually("all are dead letters", SOON, || async {
        let listed = operator.json(&["dead-letters", "list"]);
        (listed.as_array().unwrap().len() == 4).then_some(())
    })
    .await;
    // The second failure of `b`, right after the first, is in the metrics only.
    let log = reader.process.log();
    let failed = log.lines().filter(|line| line.contains("delivery failed")).collect::<Vec<_>>();
    assert_eq!(failed.len(), 1, "{log}");
    assert!(failed[0].contains("default/read") && failed[0].contains("answer=500"), "{log}");
    // Published to such a topic by hand: no dead letter.
    operator.text(&["publish", "poison", "1", "--id", "stranger"]);

    let list = |more: &[&str]| -> BTreeSet<(String, String, String)> {
        let listed = operator.json(&[&["dead-letters", "list"], more].concat());
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let listed = listed.as_array().unwrap().iter().map(|listed| {
            let event = &listed["letter"]["event"];
            (text(&listed["topic"]), text(&event["deadlettersub"]), text(&event["id"]))
        });
        listed.collect()
    };
    let of = |letters: &[(&str, &str)]| -> BTreeSet<(String, String, String)> {
        let letters = letters.iter().map(|(name, id)| {
            let topic = if *name == "read" { "news.dead-letter" } else { "poison" };
            (topic.to_owned(), format!("default/{name}"), (*id).to_owned())
        });
        letters.collect()
    };
    let all = of(&[("read", "a"), ("read", "b"), ("picky", "a"), ("picky", "b")]);
    assert_eq!(list(&[]), all);
    assert_eq!(list(&["--subscription", "default/picky"]), of(&[("picky", "a"), ("picky", "b")]));
    assert_eq!(list(&["poison"]), of(&[("picky", "a"), ("picky", "b")]));
    assert_eq!(list(&["--reason", "answered 404"]), of(&[("read", "a")]));
    assert_eq!(list(&["--id", "b"]), of(&[("read", "b"), ("picky", "b")]));
    assert_eq!(list(&["--since", "1h"]), all);
    assert_eq!(list(&["--since", "2100-01-01T00:00:00Z"]), of(&[]));
    assert_eq!(list(&["--since", "1h", "--id", "b", "--reason", "DROP"]), of(&[("picky", "b")]));
    assert_eq!(list(&["--limit", "0"]), of(&[]));
    assert_eq!(list(&["--limit", "3"]).len(), 3);
    assert_eq!(list(&["--limit", "1", "--subscription", "default/picky"]).len(), 1);
    let table =
        operator.text(&["dead-letters", "list", "--subscription", "default/read", "--id", "b"]);
    let reason = "all 2 attempts used; the last: 500";
    let letter = operator.json(&["dead-letters", "list", "--id", "b"])[0]["letter"].clone();
    let (position, since) = (letter["position"].to_string(), letter["published"].as_str().unwrap());
    let mut row = vec!["news.dead-letter", &position, "b", "default/read", "2", "500", since];
    row.extend(reason.split(' '));
    assert_eq!(cells(&table), [row], "{table}");

    // Whole, for people and for tools.
    let one = ["dead-letters", "show", "--subscription", "default/read", "--id", "b"];
    let shown = operator.text(&one);
    assert!(
        shown.starts_with(&format!("news.dead-letter at position {position}, since ")),
        "{shown}"
    );
    assert!(serde_json::from_str::<Value>(&shown).is_err(), "{shown}");
    for (name, value) in
        [("deadletterreason", reason), ("deadletterattempts", "2"), ("data", "{\"n\":2}")]
    {
        let line = shown.lines().find(|line| line.trim_start().starts_with(&format!("{name} ")));
        assert!(line.is_some_and(|line| line.ends_with(value)), "{name}: {shown}");
    }
    let shown = operator.json(&one);
    let event = &shown[0]["letter"]["event"];
    assert_eq!(
        (&shown[0]["topic"], &event["data"]),
        (&json!("news.dead-letter"), &json!({"n": 2}))
    );
    assert_eq!(
        (&event["deadlettertopic"], &event["deadletterstatus"]),
        (&json!("news"), &json!("500"))
    );

    for action in ["redrive", "drop"] {
        let error = operator.fails(&["dead-letters", action]);
        assert!(error.contains("--all"), "{error}");
        // How many is not which.
        let error = operator.fails(&["dead-letters", action, "--limit", "1"]);
        assert!(error.contains("--all"), "{error}");
    }
    assert_eq!(list(&[]), all, "refused, so nothing has changed");

    healthy.store(true, Ordering::Relaxed);
    let before = (ids(&app, "/read").len(), ids(&app, "/picky").len());
    let one = ["dead-letters", "redrive", "--subscription", "default/picky", "--id", "a"];
    assert_eq!(operator.json(&one), json!({"matched": 1, "redriven": 1}));
    arrive(&app, "/picky", before.1 + 1).await;
    let again = app.asked().into_iter().rfind(|asked| asked.path == "/picky").unwrap();
    let event = again.json();
    assert_eq!((&event["id"], again.header("duet-delivery-attempt")), (&json!("a"), "1"));
    let added = event.as_object().unwrap().keys().find(|name| name.starts_with("deadletter"));
    assert_eq!((added, event.get("redriveto")), (None, None));
    // One first, as one does to see whether the repair works.
    let redrive = ["dead-letters", "redrive", "--subscription", "default/read"];
    let said = operator.text(&[&redrive[..], &["--limit", "1"]].concat());
    assert_eq!(said, "1 of 1 dead letters redriven\n");
    arrive(&app, "/read", before.0 + 1).await;
    assert_eq!(operator.text(&redrive), "1 of 1 dead letters redriven\n");
    arrive(&app, "/read", before.0 + 2).await;
    let mut redriven = ids(&app, "/read").split_off(before.0);
    redriven.sort();
    assert_eq!(redriven, ["a", "b"], "with their ids, and not what the other one gave up");
    assert_eq!(ids(&app, "/picky").len(), before.1 + 1, "nor the other way round");

    let said = operator.json(&["dead-letters", "drop", "--reason", "DROP"]);
    assert_eq!(said, json!({"matched": 1, "removed": 1}));
    assert_eq!(list(&[]), of(&[]));
    let said = operator.text(&["dead-letters", "drop", "--all"]);
    assert_eq!(said, "0 of 0 dead letters removed\n");
    let left = operator.json_lines(&["tail", "poison", "--from", "earliest", "--no-follow"]);
    assert_eq!((left.len(), &left[0]["event"]["id"]), (1, &json!("stranger")));
    // Nor is an ordinary topic emptied by a slip.
    assert_eq!(operator.json(&["dead-letters", "drop", "news", "--all"])["matched"], 0);

    // A topic that no subscription names any more is found by its own name.
    healthy.store(false, Ordering::Relaxed);
    operator.publish("c", 3);
    eventually("it is a dead letter of both", SOON, || async {
        (list(&[]).len() == 2).then_some(())
    })
    .await;
    let moved = picky.replace("poison", "toxic");
    control_plane.write("news.yaml", &[SERVICES, &read, &moved].concat());
    operator.becomes("default/picky", "deadLetterTopic", json!("toxic")).await;
    assert_eq!(list(&[]), of(&[("read", "c")]));
    assert_eq!(list(&["poison"]), of(&[("picky", "c")]));
    let said = operator.text(&["dead-letters", "drop", "poison", "--all"]);
    assert_eq!(said, "1 of 1 dead letters removed\n");

    let error = operator.fails(&["dead-letters", "list", "olds.dead-letter"]);
    assert!(error.contains("there is no topic \"olds.dead-letter\""), "{error}");
    let error = operator.fails(&["dead-letters", "list", "--since", "yesterday"]);
    assert!(error.contains("yesterday"), "{error}");
}
