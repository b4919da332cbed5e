//! Attributes that are numbers or booleans stay that, wherever the event goes.

use std::collections::BTreeMap;

use duet_tests::{SOON, eventually, http};
use serde_json::{Value, json};

use super::answers::settled;
use super::case::Case;
use super::world::World;

/// An event of this id with attributes of all kinds.
fn event(id: &str) -> Value {
    json!({
        "specversion": "1.0", "id": id, "source": "/table", "type": "t",
        "priority": 5, "below": -7, "urgent": true, "final": false, "note": "5", "flag": "true",
        "rate": 1.25, "serial": 9_007_199_254_740_993_u64,
    })
}

fn assert_same(got: &Value, id: &str) {
    for (name, value) in event(id).as_object().unwrap() {
        assert_eq!(&got[name], value, "{name} of {got}");
    }
}

async fn publish(world: &World, topic: &str, content_type: &str, body: &Value) {
    let path = format!("/v1.0/publish/default/{topic}");
    let answer = world.post(&path, &[("content-type", content_type)], body.to_string()).await;
    assert_eq!(answer.status, 204, "{answer:?}");
}

const STRUCTURED: &str = "application/cloudevents+json";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("types", "stay in deliveries of structured events", |world, names| async move {
            publish(&world, &names.topic, STRUCTURED, &event("one")).await;
            let batch = json!([event("two")]);
            let kind = "application/cloudevents-batch+json";
            publish(&world, &names.topic, kind, &batch).await;
            let entry = json!([{"entryId": "1", "contentType": STRUCTURED, "event": event("three")}]);
            let path = format!("/v1.0/publish/bulk/default/{}", names.topic);
            let headers = [("content-type", "application/json")];
            assert_eq!(world.post(&path, &headers, entry.to_string()).await.status, 204);
            for id in ["one", "two", "three"] {
                world.wait_for(&names.path, id).await;
            }
            for delivered in world.delivered(&names.path) {
                let got = delivered.json();
                assert_same(&got, got["id"].as_str().unwrap());
                // As it was written: a value in memory would not tell.
                let body = String::from_utf8_lossy(&delivered.body).into_owned();
                assert!(body.contains("\"serial\":9007199254740993,"), "{body}");
            }
        }),
        Case::new("types", "are text in the headers of binary mode", |world, names| async move {
            let headers = [
                ("ce-specversion", "1.0"), ("ce-id", "b"), ("ce-source", "/s"), ("ce-type", "t"),
                ("ce-priority", "5"), ("ce-urgent", "true"),
            ];
            let path = format!("/v1.0/publish/default/{}", names.topic);
            assert_eq!(world.post(&path, &headers, "").await.status, 204);
            let event = world.wait(&names.path, 1).await[0].json();
            assert_eq!((&event["priority"], &event["urgent"]), (&json!("5"), &json!("true")));
        }),
        Case::new("types", "stay in bulk deliveries", |world, names| async move {
            publish(&world, &names.topic, STRUCTURED, &event("one")).await;
            let delivered = world.wait(&names.path, 1).await;
            assert_same(&delivered[0].json()["entries"][0]["event"], "one");
        })
        .with("bulk: {max: 4, wait: 20ms}"),
        Case::new("types", "stay in dead letters, redrives and replays", |world, names| async move {
            world.script(&names.path, &[(404, ""), (200, "")]);
            publish(&world, &names.topic, STRUCTURED, &event("one")).await;
            world.wait(&names.path, 1).await;
            settled(&world, &names).await;
            let dead = format!("{}.dead-letter", names.topic);
            let listed = world.events(&["dead-letters", "list", &dead]);
            let letter = &listed[0]["letter"]["event"];
            assert_same(letter, "one");
            assert_eq!(letter["deadletterattempts"], "1", "the bus's own are strings");
            let tail = ["tail", &names.topic, "--no-follow", "--from", "earliest", "--limit", "1"];
            assert_same(&world.events(&tail)["event"], "one");
            world.events(&["dead-letters", "redrive", &dead, "--all"]);
            assert_same(&world.wait(&names.path, 2).await[1].json(), "one");
            settled(&world, &names).await;
            let subscription = format!("default/{}", names.subscription);
            world.events(&["replay", &subscription, "--from", "earliest"]);
            assert_same(&world.wait(&names.path, 3).await[2].json(), "one");
        }),
        Case::new("types", "stay in streams for browsers", |world, names| async move {
            publish(&world, &names.topic, STRUCTURED, &event("one")).await;
            let api = world.writer.ports.api;
            let url = format!("http://{api}/v1.0/subscribe/default/{}", names.topic);
            let url = format!("{url}?start=earliest&filter=event.priority%20%3E%203");
            let mut answer = http::client().get(url).send().await.unwrap();
            let mut text = String::new();
            let read = async {
                while !text.contains("\ndata: ") || !text.ends_with("\n\n") {
                    text += &String::from_utf8_lossy(&answer.chunk().await.unwrap().unwrap());
                }
            };
            tokio::time::timeout(SOON, read).await.unwrap();
            let data = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
            assert_same(&serde_json::from_str(data).unwrap(), "one");
        })
        .alone(),
        Case::new("types", "count in filters and routes", |world, names| async move {
            let priorities =
                [("low", json!(1)), ("high", json!(5)), ("text", json!("5")), ("yes", json!(true))];
            for (id, priority) in priorities {
                world.publish(&names, json!({"id": id, "priority": priority})).await;
            }
            world.publish(&names, json!({"id": "end", "priority": 9})).await;
            let expected = BTreeMap::from([
                // Compared with a text, a number is one: so it was before there were types.
                (format!("{}/five", names.path), vec!["high".to_owned(), "text".to_owned()]),
                (format!("{}/more", names.path), vec!["end".to_owned()]),
            ]);
            let got = || {
                let paths = expected.keys();
                paths.map(|path| {
                    let mut ids = world.ids(path);
                    ids.sort();
                    (path.clone(), ids)
                })
                .collect::<BTreeMap<_, _>>()
            };
            eventually("each at its path", SOON, || async { (got() == expected).then_some(()) })
                .await;
            settled(&world, &names).await;
            assert_eq!(got(), expected);
            assert!(world.delivered(&names.path).is_empty(), "no route of theirs");
        })
        .with(
            "filter: \"event.priority != 1 && event.priority != 'true'\"\nroutes:\n- {match: \"event.priority == '5'\", path: PATH/five}\n- {match: \"event.priority > 5\", path: PATH/more}",
        ),
    ]
}
