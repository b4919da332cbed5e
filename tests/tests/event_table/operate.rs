//! What an operator does: looks, moves dead letters back, replays, pauses.

use std::collections::BTreeSet;

use serde_json::json;

use super::answers::settled;
use super::case::{Case, Names};
use super::world::World;

/// Publishes these ids, each of which becomes a dead letter at its first delivery.
async fn kill(world: &World, names: &Names, ids: &[&str]) {
    world.script(&names.path, &vec![(404, ""); ids.len()]);
    for id in ids {
        world.publish(names, json!({"id": id, "data": {"n": 1}})).await;
    }
    world.wait(&names.path, ids.len()).await;
    settled(world, names).await;
}

fn dead(names: &Names) -> String {
    format!("{}.dead-letter", names.topic)
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("operate", "dead letters are listed", |world, names| async move {
            kill(&world, &names, &["d1", "d2"]).await;
            let listed = world.events(&["dead-letters", "list", &dead(&names)]);
            // Nothing orders what two deliveries at once come to.
            let ids: BTreeSet<String> = listed
                .as_array()
                .unwrap()
                .iter()
                .map(|listed| listed["letter"]["event"]["id"].to_string())
                .collect();
            assert_eq!(ids, BTreeSet::from(["\"d1\"".to_owned(), "\"d2\"".to_owned()]), "{listed}");
        }),
        Case::new("operate", "dead letters of a topic by name are found", |world, names| async move {
            kill(&world, &names, &["d1"]).await;
            let subscription = format!("default/{}", names.subscription);
            let listed =
                world.events(&["dead-letters", "list", "--subscription", &subscription]);
            assert_eq!(listed[0]["topic"], json!(format!("{}.poison", names.topic)), "{listed}");
            assert_eq!(listed[0]["letter"]["event"]["id"], "d1");
            world.script(&names.path, &[(200, "")]);
            let one = ["dead-letters", "redrive", "--subscription", &subscription];
            assert_eq!(world.events(&one)["redriven"], 1);
            world.wait(&names.path, 2).await;
        })
        .with("deadLetterTopic: TOPIC.poison"),
        Case::new("operate", "one is redriven, with its id", |world, names| async move {
            kill(&world, &names, &["d1", "d2"]).await;
            world.script(&names.path, &[(200, "")]);
            world.events(&["dead-letters", "redrive", &dead(&names), "--id", "d1"]);
            let delivered = world.wait(&names.path, 3).await;
            let event = delivered[2].json();
            assert_eq!((&event["id"], &event["data"]["n"]), (&json!("d1"), &json!(1)));
            assert_eq!(delivered[2].header("duet-delivery-attempt"), "1", "attempts start anew");
            assert!(event.get("deadletterreason").is_none() && event.get("redriveto").is_none());
            let left = world.events(&["dead-letters", "list", &dead(&names)]);
            assert_eq!(left.as_array().unwrap().len(), 1, "{left}");
        }),
        Case::new("operate", "a redrive is for the one that gave up", |world, names| async move {
            kill(&world, &names, &["d1"]).await;
            let other = format!("{}/other", names.path);
            world.wait(&other, 1).await;
            world.script(&names.path, &[(200, "")]);
            world.events(&["dead-letters", "redrive", &dead(&names), "--all"]);
            world.wait(&names.path, 2).await;
            world.publish(&names, json!({"id": "end"})).await;
            world.wait_for(&other, "end").await;
            assert_eq!(world.ids(&other).iter().filter(|id| *id == "d1").count(), 1);
        })
        .resources(
            "apiVersion: duet.dev/v1alpha1\nkind: Subscription\nmetadata: {name: NAME-other}\nspec:\n  topic: TOPIC\n  subscriber: {service: reader, path: PATH/other}\n",
        ),
        Case::new("operate", "one is dropped", |world, names| async move {
            kill(&world, &names, &["d1", "d2"]).await;
            world.events(&["dead-letters", "drop", &dead(&names), "--id", "d2"]);
            let left = world.events(&["dead-letters", "list", &dead(&names)]);
            assert_eq!(left[0]["letter"]["event"]["id"], "d1");
            assert_eq!(left.as_array().unwrap().len(), 1, "{left}");
        }),
        Case::new("replay", "from the beginning", |world, names| async move {
            for id in ["a", "b", "c"] {
                world.publish(&names, json!({"id": id})).await;
            }
            world.wait(&names.path, 3).await;
            settled(&world, &names).await;
            let subscription = format!("default/{}", names.subscription);
            world.events(&["replay", &subscription, "--from", "earliest"]);
            world.wait(&names.path, 6).await;
            let mut ids = world.ids(&names.path);
            ids.sort();
            assert_eq!(ids, ["a", "a", "b", "b", "c", "c"]);
        }),
        Case::new("replay", "from a position", |world, names| async move {
            for id in ["a", "b", "c"] {
                world.publish(&names, json!({"id": id})).await;
            }
            world.wait(&names.path, 3).await;
            settled(&world, &names).await;
            let subscription = format!("default/{}", names.subscription);
            world.events(&["replay", &subscription, "--from", "3"]);
            world.wait(&names.path, 4).await;
            world.sentinel(&names, json!({})).await;
            assert_eq!(world.ids(&names.path)[3], "c");
            assert_eq!(world.delivered(&names.path).len(), 5);
        }),
        Case::new("operate", "a paused subscription gets nothing until it goes on", |world, names| async move {
            let subscription = format!("default/{}", names.subscription);
            world.sentinel(&names, json!({})).await;
            settled(&world, &names).await;
            world.events(&["pause", &subscription]);
            world.publish(&names, json!({"id": "waits"})).await;
            let status = world.status(&subscription);
            assert_eq!(status["paused"], json!(true), "{status}");
            assert_eq!(status["lag"], json!(1), "{status}");
            assert!(!world.ids(&names.path).contains(&"waits".to_owned()));
            world.events(&["resume", &subscription]);
            world.wait_for(&names.path, "waits").await;
        }),
        Case::new("operate", "topics and subscriptions are listed", |world, names| async move {
            world.sentinel(&names, json!({})).await;
            let topics = world.events(&["topics"]);
            let topic = topics.as_array().unwrap().iter().find(|t| t["name"] == json!(names.topic));
            assert_eq!(topic.unwrap()["events"], json!(1), "{topics}");
            let status = world.status(&format!("default/{}", names.subscription));
            assert_eq!(status["topic"], json!(names.topic));
            assert_eq!(status["consumers"], json!(2), "{status}");
        }),
        Case::new("operate", "an event published by hand arrives", |world, names| async move {
            world.events(&["publish", &names.topic, "{\"n\":5}", "--type", "by.hand"]);
            let event = world.wait(&names.path, 1).await[0].json();
            assert_eq!((&event["type"], &event["data"]["n"]), (&json!("by.hand"), &json!(5)));
        }),
    ]
}
