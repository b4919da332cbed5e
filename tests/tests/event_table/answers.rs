//! What the application's answers mean: done, again, or to the dead letters; and how often.

use std::time::Duration;

use duet_tests::{SOON, eventually};
use serde_json::json;

use super::case::{Case, Names};
use super::world::{World, text};

/// Answers in turn, deliveries that they make, and the dead letter's reason, if it becomes one.
struct Kind(&'static str, &'static [(u16, &'static str)], usize, Option<&'static str>);

const KINDS: &[Kind] = &[
    Kind("200 is done", &[(200, "")], 1, None),
    Kind("204 is done", &[(204, "")], 1, None),
    Kind("201 with any text is done", &[(201, "fine")], 1, None),
    Kind("SUCCESS is done", &[(200, r#"{"status":"SUCCESS"}"#)], 1, None),
    Kind("an empty object is done", &[(200, "{}")], 1, None),
    Kind("RETRY comes again", &[(200, r#"{"status":"RETRY"}"#), (200, "")], 2, None),
    Kind("an unknown word comes again", &[(200, r#"{"status":"PERHAPS"}"#), (200, "")], 2, None),
    Kind("500 comes again", &[(500, ""), (503, ""), (200, "")], 3, None),
    Kind("429 comes again", &[(429, ""), (200, "")], 2, None),
    Kind("302 comes again", &[(302, ""), (200, "")], 2, None),
    Kind("DROP is a dead letter", &[(200, r#"{"status":"DROP"}"#)], 1, Some("DROP")),
    Kind("404 is a dead letter", &[(404, "")], 1, Some("404")),
    Kind("attempts end in a dead letter", &[(500, "")], 3, Some("all 3 attempts used")),
];

/// A subscription to the dead letters of the case, delivered to its own path.
const DEAD: &str = "\
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: NAME-dead}
spec:
  topic: TOPIC.dead-letter
  subscriber: {service: reader, path: PATH/dead}
";

pub(crate) fn cases() -> Vec<Case> {
    let kinds = KINDS.iter().map(|Kind(name, answers, count, dead)| {
        Case::new("answer", name, move |world, names| async move {
            world.script(&names.path, answers);
            let id = world.id();
            world.publish(&names, json!({"id": id, "data": {"n": 1}})).await;
            let delivered = world.wait(&names.path, *count).await;
            for (attempt, asked) in delivered.iter().enumerate() {
                assert_eq!(asked.header("duet-delivery-attempt"), (attempt + 1).to_string());
                assert_eq!(asked.json()["id"], json!(id), "redelivered as it was");
            }
            if let Some(reason) = dead {
                dead_letter(&world, &names, &id, reason, *count).await;
            }
            settled(&world, &names).await;
            assert_eq!(world.delivered(&names.path).len(), *count, "and no more");
        })
        .resources(DEAD)
    });
    let mut cases: Vec<Case> = kinds.collect();
    cases.push(
        Case::new("answer", "one that does not come in time spends an attempt", |world, names| async move {
            world.hold(&names.path, Duration::from_secs(2));
            world.publish(&names, json!({"id": "slow"})).await;
            dead_letter(&world, &names, "slow", "no answer within", 2).await;
        })
        .with("delivery: {ackTimeout: 200ms}\nretry: {maxAttempts: 2, backoff: 20ms, maxBackoff: 50ms}")
        .resources(DEAD),
    );
    cases.push(
        Case::new("answer", "a dead-letter topic by name", |world, names| async move {
            world.script(&names.path, &[(404, "")]);
            world.publish(&names, json!({"id": "named"})).await;
            let dead = world.wait(&format!("{}/dead", names.path), 1).await;
            assert_eq!(dead[0].json()["deadlettertopic"], json!(names.topic));
        })
        .with("deadLetterTopic: TOPIC.graveyard")
        .resources(&DEAD.replace("TOPIC.dead-letter", "TOPIC.graveyard")),
    );
    cases.push(
        Case::new("answer", "no bound on attempts", |world, names| async move {
            let mut script = vec![(500, ""); 14];
            script.push((200, ""));
            world.script(&names.path, &script);
            world.publish(&names, json!({"id": "stubborn"})).await;
            world.wait(&names.path, 15).await;
            settled(&world, &names).await;
        })
        .with("retry: {maxAttempts: 0, backoff: 5ms, maxBackoff: 20ms}"),
    );
    cases.push(Case::new(
        "answer",
        "a failing event does not hold up others",
        |world, names| async move {
            world.script(&names.path, &[(500, ""), (200, "")]);
            world.publish(&names, json!({"id": "first"})).await;
            world.wait(&names.path, 1).await;
            for id in ["second", "third"] {
                world.publish(&names, json!({"id": id})).await;
            }
            world.wait(&names.path, 4).await;
            settled(&world, &names).await;
        },
    ));
    cases
}

async fn dead_letter(world: &World, names: &Names, id: &str, reason: &str, attempts: usize) {
    let dead = world.wait(&format!("{}/dead", names.path), 1).await[0].json();
    assert_eq!(dead["id"], json!(id), "its own id");
    assert!(text(&dead["deadletterreason"]).contains(reason), "{dead}");
    assert_eq!(dead["deadletterattempts"], json!(attempts.to_string()), "{dead}");
    assert_eq!(dead["deadlettersub"], json!(format!("default/{}", names.subscription)));
    assert_eq!(dead["deadlettertopic"], json!(names.topic));
}

/// Waits until nothing is in flight or waits for its next attempt.
pub(super) async fn settled(world: &World, names: &Names) {
    let subscription = format!("default/{}", names.subscription);
    eventually("the subscription has handled everything", SOON, || async {
        (world.status(&subscription)["lag"] == json!(0)).then_some(())
    })
    .await;
}
