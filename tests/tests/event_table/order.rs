//! Order by key, and the same event published twice.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use super::answers::settled;
use super::case::{Case, Names};
use super::world::{World, text};

const ORDERED: &str = "delivery: {ordered: true}";
/// The reader of an ordered subscription that fails twice has time to.
const ORDERED_RETRY: &str =
    "delivery: {ordered: true}\nretry: {maxAttempts: 3, backoff: 20ms, maxBackoff: 50ms}";

/// Publishes `rounds` events of each key, in turn; ids are `<key>-<number>`.
async fn publish(world: &World, names: &Names, keys: &[&str], rounds: usize) {
    for number in 0..rounds {
        for key in keys {
            let id = format!("{key}-{number:03}");
            world.publish(names, json!({"id": id, "partitionkey": key})).await;
        }
    }
}

/// First deliveries of each key, in the order of arrival.
fn by_key(world: &World, names: &Names) -> BTreeMap<String, Vec<String>> {
    let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for asked in world.delivered(&names.path) {
        let event = asked.json();
        let ids = seen.entry(text(&event["partitionkey"])).or_default();
        let id = text(&event["id"]);
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    seen
}

fn assert_in_order(world: &World, names: &Names, keys: &[&str], rounds: usize) {
    let seen = by_key(world, names);
    for key in keys {
        let expected: Vec<String> = (0..rounds).map(|n| format!("{key}-{n:03}")).collect();
        assert_eq!(seen[*key], expected, "key {key}");
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("order", "events of a key arrive in order", |world, names| async move {
            publish(&world, &names, &["a", "b", "c"], 12).await;
            world.wait(&names.path, 36).await;
            assert_in_order(&world, &names, &["a", "b", "c"], 12);
        })
        .with(ORDERED),
        Case::new("order", "one of a key is in flight at a time", |world, names| async move {
            world.hold(&names.path, Duration::from_millis(30));
            publish(&world, &names, &["k"], 10).await;
            world.wait(&names.path, 10).await;
            settled(&world, &names).await;
            assert_in_order(&world, &names, &["k"], 10);
        })
        .with(ORDERED),
        Case::new("order", "a failing event holds its key back", |world, names| async move {
            world.script(&names.path, &[(500, ""), (500, ""), (200, "")]);
            publish(&world, &names, &["k"], 6).await;
            world.wait(&names.path, 8).await;
            let ids = world.ids(&names.path);
            assert_eq!(ids[..3], ["k-000", "k-000", "k-000"], "{ids:?}");
            assert_in_order(&world, &names, &["k"], 6);
        })
        .with(ORDERED_RETRY),
        Case::new("order", "a dead letter lets its key go on", |world, names| async move {
            world.script(&names.path, &[(404, ""), (200, "")]);
            publish(&world, &names, &["k"], 4).await;
            world.wait(&names.path, 4).await;
            assert_in_order(&world, &names, &["k"], 4);
        })
        .with(ORDERED_RETRY),
        Case::new("order", "events without a key go as they come", |world, names| async move {
            for number in 0..10 {
                world.publish(&names, json!({"id": number.to_string()})).await;
            }
            world.wait(&names.path, 10).await;
            settled(&world, &names).await;
        })
        .with(ORDERED),
        Case::new("order", "by another attribute of the topic", |world, names| async move {
            for number in 0..10 {
                let id = format!("s-{number:03}");
                world.publish(&names, json!({"id": id, "subject": "s"})).await;
            }
            world.wait(&names.path, 10).await;
            let ids = world.ids(&names.path);
            assert!(ids.is_sorted(), "{ids:?}");
        })
        .with(ORDERED)
        .resources(
            "apiVersion: duet.dev/v1alpha1\nkind: Topic\nmetadata: {name: TOPIC}\nspec: {orderBy: subject}\n",
        ),
        required_attribute("source"),
        required_attribute("type"),
        Case::new("order", "the key of the publish query", |world, names| async move {
            for number in 0..6 {
                let id = format!("k-{number:03}");
                world.publish_with(&names, "?metadata.partitionKey=k", json!({"id": id})).await;
            }
            let delivered = world.wait(&names.path, 6).await;
            assert_eq!(delivered[0].json()["partitionkey"], "k");
            assert_in_order(&world, &names, &["k"], 6);
        })
        .with(ORDERED),
    ];
    cases.extend(deduplication());
    cases
}

/// Events that have no key besides an attribute that every event has.
fn required_attribute(name: &str) -> Case {
    Case::new("order", &format!("by the required attribute {name}"), |world, names| async move {
        world.script(&names.path, &[(500, ""), (500, ""), (200, "")]);
        for number in 0..6 {
            world.publish(&names, json!({"id": format!("r-{number}")})).await;
        }
        world.wait(&names.path, 8).await;
        let ids = world.ids(&names.path);
        assert_eq!(ids[..4], ["r-0", "r-0", "r-0", "r-1"], "{ids:?}");
        assert!(ids.is_sorted(), "{ids:?}");
    })
    .with(ORDERED_RETRY)
    .resources(&format!(
        "apiVersion: duet.dev/v1alpha1\nkind: Topic\nmetadata: {{name: TOPIC}}\nspec: {{orderBy: {name}}}\n"
    ))
}

fn deduplication() -> Vec<Case> {
    vec![
        Case::new("dedup", "the same source and id once", |world, names| async move {
            for _ in 0..5 {
                world.publish(&names, json!({"id": "same"})).await;
            }
            world.sentinel(&names, json!({})).await;
            assert_eq!(world.ids(&names.path).iter().filter(|id| *id == "same").count(), 1);
        }),
        Case::new("dedup", "another source is another event", |world, names| async move {
            for source in ["/a", "/b", "/a"] {
                world.publish(&names, json!({"id": "same", "source": source})).await;
            }
            world.sentinel(&names, json!({})).await;
            assert_eq!(world.ids(&names.path).iter().filter(|id| *id == "same").count(), 2);
        }),
        Case::new("dedup", "source and id are not run together", |world, names| async move {
            world.publish(&names, json!({"id": "c", "source": "/ab"})).await;
            world.publish(&names, json!({"id": "bc", "source": "/a"})).await;
            world.wait(&names.path, 2).await;
        }),
        Case::new("dedup", "a window of zero keeps all", |world, names| async move {
            for _ in 0..3 {
                world.publish(&names, json!({"id": "same"})).await;
            }
            world.wait(&names.path, 3).await;
        })
        .resources(
            "apiVersion: duet.dev/v1alpha1\nkind: Topic\nmetadata: {name: TOPIC}\nspec: {dedupWindow: 0s}\n",
        ),
        Case::new("dedup", "within a batch", |world, names| async move {
            let event = json!({"specversion": "1.0", "id": "twin", "source": "/s", "type": "t"});
            let batch = json!([event, event]).to_string();
            let path = format!("/v1.0/publish/default/{}", names.topic);
            let headers = [("content-type", "application/cloudevents-batch+json")];
            assert_eq!(world.post(&path, &headers, batch).await.status, 204);
            world.sentinel(&names, json!({})).await;
            assert_eq!(world.delivered(&names.path).len(), 2, "the twin and the last one");
        }),
    ]
}
