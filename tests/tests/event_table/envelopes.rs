//! What may be published, what arrives of it, and what is refused.

use serde_json::{Value, json};

use super::case::Case;
use super::world::World;

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

/// A publish that is taken: content type, `ce-` headers, body, and members of the event that arrives.
struct Taken(
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
    &'static str,
    &'static str,
);

/// A publish that is refused: the attribute that the answer names, or empty.
struct Refused(
    &'static str,
    u16,
    &'static str,
    &'static [(&'static str, &'static str)],
    &'static str,
    &'static str,
);

const CE: [(&str, &str); 4] =
    [("ce-specversion", "1.0"), ("ce-id", "i1"), ("ce-source", "/s"), ("ce-type", "t")];

const TAKEN: &[Taken] = &[
    Taken(
        "plain text is wrapped",
        "text/plain",
        &[],
        "hello",
        r#"{"data":"hello","type":"com.dapr.event.sent","source":"writer"}"#,
    ),
    Taken(
        "plain JSON is wrapped",
        "application/json",
        &[],
        r#"{"n":1}"#,
        r#"{"data":{"n":1},"datacontenttype":"application/json"}"#,
    ),
    Taken(
        "bytes are wrapped",
        "application/octet-stream",
        &[],
        "\u{1}ab",
        r#"{"data_base64":"AWFi"}"#,
    ),
    Taken("no content type is text", "", &[], "x", r#"{"data":"x"}"#),
    Taken(
        "binary mode",
        "application/json",
        &CE,
        r#"{"n":2}"#,
        r#"{"id":"i1","source":"/s","type":"t","data":{"n":2}}"#,
    ),
    Taken("binary mode without data", "", &CE, "", r#"{"id":"i1","type":"t"}"#),
    Taken(
        "binary extension",
        "text/plain",
        &[CE[0], CE[1], CE[2], CE[3], ("ce-mynote", "a")],
        "x",
        r#"{"mynote":"a"}"#,
    ),
    Taken(
        "percent-decoded header",
        "text/plain",
        &[CE[0], CE[1], CE[2], CE[3], ("ce-mynote", "a%20%C3%A4")],
        "x",
        r#"{"mynote":"a ä"}"#,
    ),
    Taken(
        "quoted header",
        "text/plain",
        &[CE[0], CE[1], CE[2], CE[3], ("ce-mynote", "\"a b\"")],
        "x",
        r#"{"mynote":"a b"}"#,
    ),
    Taken(
        "binary subject and time",
        "text/plain",
        &[CE[0], CE[1], CE[2], CE[3], ("ce-subject", "o1"), ("ce-time", "2026-01-02T03:04:05Z")],
        "x",
        r#"{"subject":"o1","time":"2026-01-02T03:04:05Z"}"#,
    ),
    Taken(
        "structured mode",
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"s1","source":"/s","type":"t","data":{"n":3}}"#,
        r#"{"id":"s1","data":{"n":3}}"#,
    ),
    Taken(
        "structured with charset",
        "application/cloudevents+json; charset=utf-8",
        &[],
        r#"{"specversion":"1.0","id":"s2","source":"/s","type":"t"}"#,
        r#"{"id":"s2"}"#,
    ),
    Taken(
        "structured in capitals",
        "Application/CloudEvents+JSON",
        &[],
        r#"{"specversion":"1.0","id":"s3","source":"/s","type":"t"}"#,
        r#"{"id":"s3"}"#,
    ),
    Taken(
        "structured text data",
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"s4","source":"/s","type":"t","datacontenttype":"text/plain","data":"hi"}"#,
        r#"{"data":"hi"}"#,
    ),
    Taken(
        "structured base64",
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"s5","source":"/s","type":"t","data_base64":"AQI="}"#,
        r#"{"data_base64":"AQI="}"#,
    ),
    Taken(
        "structured integers and booleans",
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"s6","source":"/s","type":"t","count":7,"flag":true}"#,
        r#"{"id":"s6","count":7,"flag":true}"#,
    ),
    Taken(
        "batch of one",
        BATCH,
        &[],
        r#"[{"specversion":"1.0","id":"b1","source":"/s","type":"t"}]"#,
        r#"{"id":"b1"}"#,
    ),
    Taken(
        "trace context travels",
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"tr","source":"/s","type":"t","traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}"#,
        r#"{"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}"#,
    ),
    Taken("empty text", "text/plain", &[], "", r#"{"type":"com.dapr.event.sent"}"#),
];

const REFUSED: &[Refused] = &[
    Refused("no type", 400, "text/plain", &[CE[0], CE[1], CE[2]], "x", "type"),
    Refused("no id", 400, "text/plain", &[CE[0], CE[2], CE[3]], "x", "id"),
    Refused("no source", 400, "text/plain", &[CE[0], CE[1], CE[3]], "x", "source"),
    Refused("no specversion", 400, "text/plain", &[CE[1], CE[2], CE[3]], "x", "specversion"),
    Refused(
        "old specversion",
        400,
        "text/plain",
        &[("ce-specversion", "0.3"), CE[1], CE[2], CE[3]],
        "x",
        "specversion",
    ),
    Refused("empty id", 400, "text/plain", &[CE[0], ("ce-id", ""), CE[2], CE[3]], "x", "id"),
    Refused("broken UTF-8", 400, "text/plain", &[CE[0], ("ce-id", "%FF"), CE[2], CE[3]], "x", "id"),
    Refused(
        "overlong UTF-8",
        400,
        "text/plain",
        &[CE[0], ("ce-id", "%C0%AF"), CE[2], CE[3]],
        "x",
        "id",
    ),
    Refused(
        "bad time",
        400,
        "text/plain",
        &[CE[0], CE[1], CE[2], CE[3], ("ce-time", "yesterday")],
        "x",
        "time",
    ),
    Refused(
        "datacontenttype as header",
        400,
        "text/plain",
        &[CE[0], CE[1], CE[2], CE[3], ("ce-datacontenttype", "text/plain")],
        "x",
        "datacontenttype",
    ),
    Refused(
        "bad extension name",
        400,
        "text/plain",
        &[CE[0], CE[1], CE[2], CE[3], ("ce-my_note", "x")],
        "x",
        "my_note",
    ),
    Refused(
        "data twice",
        400,
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":1,"data_base64":"AQ=="}"#,
        "data_base64",
    ),
    Refused(
        "id is a number",
        400,
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":1,"source":"/s","type":"t"}"#,
        "id",
    ),
    Refused(
        "bad base64",
        400,
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data_base64":"?"}"#,
        "data_base64",
    ),
    Refused("not JSON", 400, STRUCTURED, &[], "{", ""),
    Refused(
        "nested extension",
        400,
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","deep":{"a":1}}"#,
        "deep",
    ),
    Refused(
        "bad event in a batch",
        400,
        BATCH,
        &[],
        r#"[{"specversion":"1.0","id":"1","source":"/s","type":"t"},{"specversion":"1.0","id":"2","source":"/s"}]"#,
        "type",
    ),
    Refused("unknown format", 415, "application/cloudevents+avro", &[], "x", ""),
    Refused(
        "bad expirytime",
        400,
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","expirytime":"soon"}"#,
        "expirytime",
    ),
    Refused(
        "bad deliverat",
        400,
        STRUCTURED,
        &[],
        r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","deliverat":"later"}"#,
        "deliverat",
    ),
];

pub(crate) fn cases() -> Vec<Case> {
    let taken = TAKEN.iter().map(|Taken(name, content_type, headers, body, expected)| {
        Case::new("envelope", name, move |world, names| async move {
            let answer = send(&world, &names.topic, content_type, headers, body).await;
            assert_eq!(answer.0, 204, "{}", answer.1);
            let delivered = world.wait(&names.path, 1).await;
            assert_eq!(delivered[0].header("content-type"), STRUCTURED);
            assert_eq!(delivered[0].header("duet-delivery-attempt"), "1");
            let event = delivered[0].json();
            let expected: Value = serde_json::from_str(expected).unwrap();
            for (member, value) in expected.as_object().unwrap() {
                assert_eq!(&event[member], value, "{member} of {event}");
            }
            assert_eq!(event["specversion"], "1.0");
            assert_eq!(
                (&event["topic"], &event["pubsubname"]),
                (&json!(names.topic), &json!("default"))
            );
        })
    });
    let refused =
        REFUSED.iter().map(|Refused(name, status, content_type, headers, body, attribute)| {
            Case::new("refused", name, move |world, names| async move {
                let answer = send(&world, &names.topic, content_type, headers, body).await;
                assert_eq!(answer.0, *status, "{}", answer.1);
                if !attribute.is_empty() {
                    assert_eq!(answer.1["attribute"], *attribute, "{}", answer.1);
                }
                // Nothing of it was stored: the next event is the first that arrives.
                world.sentinel(&names, json!({})).await;
                assert_eq!(world.delivered(&names.path).len(), 1);
            })
        });
    let mut cases: Vec<Case> = taken.chain(refused).collect();
    cases.push(Case::new("envelope", "a batch of three arrives whole", |world, names| async move {
        let event = |id: u32| json!({"specversion": "1.0", "id": id.to_string(), "source": "/b", "type": "t"});
        let batch = json!([event(1), event(2), event(3)]).to_string();
        assert_eq!(send(&world, &names.topic, BATCH, &[], &batch).await.0, 204);
        world.wait(&names.path, 3).await;
        let mut ids = world.ids(&names.path);
        ids.sort();
        assert_eq!(ids, ["1", "2", "3"]);
    }));
    cases.push(Case::new("refused", "a bus that is not there", |world, names| async move {
        let answer = world.post(&format!("/v1.0/publish/nobus/{}", names.topic), &[], "x").await;
        assert_eq!(answer.status, 404);
        assert_eq!(answer.body["errorCode"], "ERR_PUBSUB_NOT_FOUND", "{answer:?}");
    }));
    cases.push(Case::new("refused", "a body that is too large", |world, names| async move {
        let path = format!("/v1.0/publish/default/{}", names.topic);
        let answer =
            world.post(&path, &[("content-type", "text/plain")], "x".repeat(5 << 20)).await;
        assert_eq!(answer.status, 413, "{answer:?}");
    }));
    cases
}

async fn send(
    world: &World,
    topic: &str,
    content_type: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> (u16, Value) {
    let mut headers = headers.to_vec();
    if !content_type.is_empty() {
        headers.push(("content-type", content_type));
    }
    let answer =
        world.post(&format!("/v1.0/publish/default/{topic}"), &headers, body.to_owned()).await;
    (answer.status, answer.body)
}
