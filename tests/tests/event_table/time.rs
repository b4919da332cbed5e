//! Later, too late, and from where on.

use std::time::SystemTime;

use serde_json::json;

use super::case::Case;
use super::world::text;

/// RFC 3339, so many milliseconds from now.
fn at(from_now_ms: i64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let ms = i64::try_from(now.as_millis()).unwrap() + from_now_ms;
    jiff::Timestamp::from_millisecond(ms).unwrap().to_string()
}

fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

/// Waits for the first delivery and checks that it came no earlier than `ms` after `from`.
macro_rules! assert_waited {
    ($world:expr, $names:expr, $from:expr, $ms:expr) => {
        $world.wait(&$names.path, 1).await;
        let waited = now().duration_since($from);
        assert!(waited.as_millis() >= $ms, "after {waited}");
    };
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("delay", "deliverAfter", |world, names| async move {
            let from = now();
            world.publish_with(&names, "?metadata.deliverAfter=800ms", json!({})).await;
            assert_waited!(world, names, from, 800);
        }),
        Case::new("delay", "deliverAt", |world, names| async move {
            let (from, when) = (now(), at(900).replace('+', "%2B"));
            world.publish_with(&names, &format!("?metadata.deliverAt={when}"), json!({})).await;
            assert_waited!(world, names, from, 880);
        }),
        Case::new("delay", "the attribute deliverat", |world, names| async move {
            let from = now();
            world.publish(&names, json!({"deliverat": at(700)})).await;
            assert_waited!(world, names, from, 680);
        }),
        Case::new("delay", "a time that has passed is now", |world, names| async move {
            world.publish(&names, json!({"deliverat": at(-10_000)})).await;
            world.wait(&names.path, 1).await;
        }),
        Case::new("delay", "others do not wait", |world, names| async move {
            world.publish(&names, json!({"id": "later", "deliverat": at(1500)})).await;
            world.publish(&names, json!({"id": "now"})).await;
            world.wait(&names.path, 2).await;
            assert_eq!(world.ids(&names.path), ["now", "later"]);
        }),
        Case::new("delay", "it ends before the event does", |world, names| async move {
            let event = json!({"id": "never", "deliverat": at(1200), "expirytime": at(300)});
            world.publish(&names, event).await;
            world.publish(&names, json!({"id": "after", "deliverat": at(1600)})).await;
            world.wait_for(&names.path, "after").await;
            assert_eq!(world.ids(&names.path), ["after"]);
        }),
        Case::new("ttl", "an expired event is not delivered", |world, names| async move {
            world.publish(&names, json!({"id": "old", "expirytime": at(-1000)})).await;
            world.sentinel(&names, json!({})).await;
            assert_eq!(world.delivered(&names.path).len(), 1);
        }),
        Case::new("ttl", "one that is fresh is", |world, names| async move {
            world.publish_with(&names, "?metadata.ttlInSeconds=60", json!({"id": "fresh"})).await;
            let event = world.wait(&names.path, 1).await[0].json();
            assert!(!text(&event["expirytime"]).is_empty(), "{event}");
        }),
        Case::new("ttl", "it ends between two attempts", |world, names| async move {
            world.script(&names.path, &[(500, "")]);
            world.publish(&names, json!({"id": "brief", "expirytime": at(600)})).await;
            super::answers::settled(&world, &names).await;
            assert!(!world.delivered(&names.path).is_empty());
            assert!(world.delivered(&format!("{}/dead", names.path)).is_empty());
        })
        .with("retry: {maxAttempts: 100, backoff: 50ms, maxBackoff: 100ms}"),
        Case::new("ttl", "a number that is none is refused", |world, names| async move {
            let path = format!("/v1.0/publish/default/{}?metadata.ttlInSeconds=-5", names.topic);
            let answer = world.post(&path, &[("content-type", "text/plain")], "x").await;
            assert_eq!(answer.status, 400, "{answer:?}");
        }),
    ];
    cases.extend(starts());
    cases
}

/// Publishes `old-1..=3`, then declares the subscription, then publishes `new`.
fn start(name: &'static str, start: &'static str, expected: &'static [&'static str]) -> Case {
    Case::new("start", name, move |world, names| async move {
        for number in 1..=3 {
            world.publish(&names, json!({"id": format!("old-{number}")})).await;
        }
        let published = at(0);
        while at(0) == published {
            tokio::task::yield_now().await;
        }
        let middle = at(0);
        world.publish(&names, json!({"id": "mid"})).await;
        let start = start.replace("MIDDLE", &middle);
        let yaml =
            Case::new("start", name, |_, _| async {}).with(&format!("start: {start}")).yaml();
        world.control_plane.write(&format!("{}.yaml", names.subscription), &yaml);
        world.declared(&names.subscription).await;
        world.publish(&names, json!({"id": "new"})).await;
        world.wait_for(&names.path, "new").await;
        world.wait(&names.path, expected.len()).await;
        let mut ids = world.ids(&names.path);
        ids.sort();
        assert_eq!(ids, expected);
    })
    .alone()
}

fn starts() -> Vec<Case> {
    vec![
        start("latest", "latest", &["new"]),
        start("earliest", "earliest", &["mid", "new", "old-1", "old-2", "old-3"]),
        start("at a position", "{position: 3}", &["mid", "new", "old-3"]),
        start("at a time", "{time: \"MIDDLE\"}", &["mid", "new"]),
        start("at a position beyond the end", "{position: 1000000}", &["new"]),
    ]
}
