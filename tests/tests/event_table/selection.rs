//! Who gets which events, and in which form: filters, routes, bulk, broadcast, raw payloads, authorization.

use std::collections::BTreeSet;

use duet_tests::{SOON, eventually};
use serde_json::{Value, json};

use super::case::Case;
use super::world::text;

/// A filter, an event, and whether it passes.
struct Filter(&'static str, &'static str, &'static str, bool);

const FILTERS: &[Filter] = &[
    Filter("type equal", "event.type == 'wanted'", r#"{"type":"wanted"}"#, true),
    Filter("type not equal", "event.type == 'wanted'", r#"{"type":"other"}"#, false),
    Filter("data member", "event.data.total > 100", r#"{"data":{"total":150}}"#, true),
    Filter("data member below", "event.data.total > 100", r#"{"data":{"total":50}}"#, false),
    Filter("data member that is missing", "event.data.total > 100", r#"{"data":{"n":1}}"#, false),
    Filter(
        "data that is text",
        "event.data.total > 100",
        r#"{"datacontenttype":"text/plain","data":"x"}"#,
        false,
    ),
    Filter(
        "both",
        "event.data.total > 100 && event.type.startsWith('shop.')",
        r#"{"type":"shop.order","data":{"total":101}}"#,
        true,
    ),
    Filter("an extension", "event.region == 'eu'", r#"{"region":"eu"}"#, true),
    Filter("an extension that is missing", "event.region == 'eu'", r"{}", false),
    Filter("has", "has(event.data.coupon)", r#"{"data":{"coupon":"x"}}"#, true),
    Filter("has not", "has(event.data.coupon)", r#"{"data":{"n":1}}"#, false),
    Filter(
        "source and subject",
        "event.source == '/table' && event.subject == 's'",
        r#"{"subject":"s"}"#,
        true,
    ),
];

pub(crate) fn cases() -> Vec<Case> {
    let filters = FILTERS.iter().map(|Filter(name, filter, event, passes)| {
        Case::new("filter", name, move |world, names| async move {
            let mut event: Value = serde_json::from_str(event).unwrap();
            event["id"] = json!("probe");
            world.publish(&names, event).await;
            // It passes every filter above.
            let sentinel = json!({
                "type": "wanted", "region": "eu", "subject": "s", "data": {"total": 1000, "coupon": "c"},
            });
            let sentinel = match filter.contains("shop.") {
                true => json!({"type": "shop.end", "data": {"total": 1000}}),
                false => sentinel,
            };
            world.sentinel(&names, sentinel).await;
            let seen = world.ids(&names.path).iter().any(|id| id == "probe");
            if *passes {
                world.wait_for(&names.path, "probe").await;
            } else {
                assert!(!seen);
            }
        })
        .with(&format!("filter: \"{filter}\""))
    });
    let mut cases: Vec<Case> = filters.collect();
    cases.extend(forms());
    cases.extend(authorization());
    cases
}

fn forms() -> Vec<Case> {
    vec![
        Case::new("routes", "the first that matches, else the path", |world, names| async move {
            for (id, kind) in [("1", "red"), ("2", "blue"), ("3", "green")] {
                world.publish(&names, json!({"id": id, "type": kind})).await;
            }
            for (suffix, id) in [("/red", "1"), ("/blue", "2"), ("", "3")] {
                let path = format!("{}{suffix}", names.path);
                world.wait(&path, 1).await;
                assert_eq!(world.ids(&path), [id]);
            }
        })
        .with(
            "routes:\n- {match: \"event.type == 'red'\", path: PATH/red}\n- {match: \"event.type in ['blue', 'red']\", path: PATH/blue}",
        ),
        Case::new("bulk", "several in one request", |world, names| async move {
            for number in 0..6 {
                world.publish(&names, json!({"id": number.to_string()})).await;
            }
            let ids = || -> BTreeSet<String> {
                let delivered = world.delivered(&names.path);
                let bodies: Vec<Value> = delivered.iter().map(duet_tests::app::Asked::json).collect();
                let entries = bodies.iter().filter_map(|body| body["entries"].as_array()).flatten();
                entries.map(|entry| text(&entry["event"]["id"])).collect()
            };
            eventually("all six came", SOON, || async { (ids().len() == 6).then_some(()) }).await;
        })
        .with("bulk: {max: 4, wait: 200ms}"),
        Case::new("bulk", "an event that fails alone comes again", |world, names| async move {
            world.script(&names.path, &[(500, ""), (200, "")]);
            world.publish(&names, json!({"id": "again"})).await;
            world.wait(&names.path, 2).await;
            super::answers::settled(&world, &names).await;
        })
        .with("bulk: {max: 4, wait: 20ms}"),
        Case::new("broadcast", "every replica gets every event", |world, names| async move {
            // The replicas' own subscriptions start when they first consume.
            let (world, names) = (&world, &names);
            eventually("both replicas consume", SOON, || async move {
                let id = world.id();
                world.publish(names, json!({"id": id})).await;
                let copies = || world.ids(&names.path).iter().filter(|seen| **seen == id).count();
                for _ in 0..50 {
                    if copies() == 2 {
                        return Some(());
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
                None
            })
            .await;
        })
        .with("broadcast: true"),
        Case::new("competing", "two replicas share", |world, names| async move {
            for number in 0..20 {
                world.publish(&names, json!({"id": number.to_string()})).await;
            }
            world.wait(&names.path, 20).await;
            super::answers::settled(&world, &names).await;
            assert_eq!(world.delivered(&names.path).len(), 20, "each once");
        }),
        Case::new("bulk publish", "every entry is stored", |world, names| async move {
            let entries = json!([
                {"entryId": "1", "event": "one", "contentType": "text/plain"},
                {"entryId": "2", "event": {"n": 2}, "contentType": "application/json"},
            ]);
            let path = format!("/v1.0-alpha1/publish/bulk/default/{}", names.topic);
            let headers = [("content-type", "application/json")];
            let answer = world.post(&path, &headers, entries.to_string()).await;
            assert_eq!(answer.status, 204, "{answer:?}");
            let delivered = world.wait(&names.path, 2).await;
            let data: BTreeSet<String> =
                delivered.iter().map(|asked| asked.json()["data"].to_string()).collect();
            assert_eq!(data, BTreeSet::from(["\"one\"".to_owned(), "{\"n\":2}".to_owned()]));
        }),
        Case::new("bulk publish", "entries of the same id are refused", |world, names| async move {
            let entries = json!([
                {"entryId": "1", "event": "one", "contentType": "text/plain"},
                {"entryId": "1", "event": "two", "contentType": "text/plain"},
            ]);
            let path = format!("/v1.0-alpha1/publish/bulk/default/{}", names.topic);
            let headers = [("content-type", "application/json")];
            let answer = world.post(&path, &headers, entries.to_string()).await;
            assert_eq!(answer.status, 400, "{answer:?}");
            world.sentinel(&names, json!({})).await;
            assert_eq!(world.delivered(&names.path).len(), 1);
        }),
        Case::new("raw", "an envelope published raw is data", |world, names| async move {
            let body = r#"{"specversion":"1.0","id":"inner","source":"/s","type":"t"}"#;
            let path = format!("/v1.0/publish/default/{}?metadata.rawPayload=true", names.topic);
            let headers = [("content-type", "application/cloudevents+json")];
            assert_eq!(world.post(&path, &headers, body).await.status, 204);
            let event = world.wait(&names.path, 1).await[0].json();
            assert_ne!(event["id"], "inner", "{event}");
        }),
        Case::new("raw", "a subscription gets the data alone", |world, names| async move {
            world.publish(&names, json!({"id": "own", "data": {"n": 1}})).await;
            let event = world.wait(&names.path, 1).await[0].json();
            // `{"n":1}`, in base64.
            assert_eq!((&event["id"], &event["data_base64"]), (&json!("own"), &json!("eyJuIjoxfQ==")));
            assert_eq!((event.get("data"), &event["type"]), (None, &json!("com.dapr.event.sent")));
        })
        .with("rawPayload: true"),
    ]
}

/// A policy on the case's topic.
fn policy(action: &str, rule: &str) -> String {
    format!(
        "apiVersion: duet.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: NAME}}\nspec:\n  targetRefs: [{{kind: Topic, name: TOPIC}}]\n  action: {action}\n  rules:\n  - {rule}\n"
    )
}

const WRITER: &str = "spiffe://duet.local/ns/default/sa/writer";

fn authorization() -> Vec<Case> {
    let rows: [(&str, String, u16, u16); 4] = [
        (
            "only the one allowed",
            policy(
                "Allow",
                &format!("from: [{{identities: [\"{WRITER}\"]}}, {{namespaces: [default]}}]"),
            ),
            204,
            403,
        ),
        ("a namespace is denied", policy("Deny", "from: [{namespaces: [other]}]"), 204, 403),
        (
            "an identity is denied",
            policy(
                "Deny",
                &format!(
                    "from: [{{identities: [\"{WRITER}\"]}}]\n    to: [{{operations: [publish]}}]"
                ),
            ),
            403,
            204,
        ),
        ("an audit denies nobody", policy("Audit", "from: [{namespaces: [other]}]"), 204, 204),
    ];
    let cases = rows.into_iter().map(|(name, yaml, writer, stranger)| {
        Case::new("authorization", name, move |world, names| async move {
            let path = format!("/v1.0/publish/default/{}", names.topic);
            for (sidecar, status) in [(&world.writer, writer), (&world.stranger, stranger)] {
                let answer =
                    world.post_by(sidecar, &path, &[("content-type", "text/plain")], "x").await;
                assert_eq!(answer.status, status, "{answer:?}");
                if status == 403 {
                    assert_eq!(answer.body["errorCode"], "ERR_PUBSUB_FORBIDDEN", "{answer:?}");
                }
            }
        })
        .resources(&yaml)
    });
    let mut cases: Vec<Case> = cases.collect();
    cases.push(
        Case::new("authorization", "who may not subscribe gets nothing", |world, names| async move {
            world.publish(&names, json!({"id": "secret"})).await;
            eventually("the subscription is refused", SOON, || async {
                let logs = world.readers.iter().map(|reader| reader.process.log());
                let subscription = format!("default/{}", names.subscription);
                logs.into_iter()
                    .any(|log| log.lines().any(|l| l.contains(&subscription) && l.contains("refuses")))
                    .then_some(())
            })
            .await;
            assert!(world.delivered(&names.path).is_empty());
        })
        .resources(&policy("Deny", "from: [{identities: [\"spiffe://duet.local/ns/default/sa/reader\"]}]\n    to: [{operations: [subscribe]}]")),
    );
    cases
}
