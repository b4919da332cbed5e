//! Publishing by hand.

use duet_tests::app::Asked;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::operator::{Operator, SERVICES, arrives, ids, subscription, willing};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publish_takes_data_and_attributes() {
    let strict = "\
---
apiVersion: duet.dev/v1alpha1
kind: EventBus
metadata: {name: strict}
spec: {backend: {embedded: {}}, declaredTopicsOnly: true}
---
apiVersion: duet.dev/v1alpha1
kind: Topic
metadata: {name: declared}
spec: {bus: strict}
";
    let resources = [SERVICES, &subscription("read", "reader", ""), strict];
    let control_plane = ControlPlane::start(&[("news.yaml", &resources.concat())]).await;
    let app = willing().await;
    let options = Options::service("reader", app.port());
    let _reader = Sidecar::ready(&control_plane, options).await;
    let operator = Operator::of(&control_plane);

    let all = [
        "publish",
        "news",
        "{\"total\": 12}",
        "--type",
        "order.placed",
        "--source",
        "/shop",
        "--id",
        "7",
        "--key",
        "customer-7",
        "--after",
        "1s",
        "--ttl",
        "2h",
        "--attribute",
        "tenant=blue",
        "--attribute",
        "note=a=b",
    ];
    assert_eq!(operator.text(&all), "7: stored at position 1 of news\n");
    assert_eq!(operator.text(&all), "7: already there, at position 1 of news\n");
    let duplicate = json!({"published": [{"position": 1, "duplicate": true}]});
    assert_eq!(operator.json(&all), duplicate);
    arrives(&app, "/read", "7").await;
    let arrived = Timestamp::now();
    let event = app.asked()[0].json();
    let expected = json!({
        "specversion": "1.0", "type": "order.placed", "source": "/shop", "id": "7", "partitionkey": "customer-7",
        "tenant": "blue", "note": "a=b", "datacontenttype": "application/json", "data": {"total": 12},
        "pubsubname": "default", "topic": "news",
        "time": event["time"], "deliverat": event["deliverat"], "expirytime": event["expirytime"],
    });
    assert_eq!(event, expected);
    let time = |name: &str| event[name].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(time("deliverat").duration_since(time("time")).as_secs(), 1);
    assert_eq!(time("expirytime").duration_since(time("time")).as_secs(), 7200);
    assert!(arrived >= time("deliverat"), "{arrived}: {event}");

    let said = operator.text_of(&["publish", "news"], "plain words");
    let id = said.split(':').next().unwrap();
    arrives(&app, "/read", id).await;
    operator.text_of(&["publish", "news", "--id", "json"], "[1, 2]");
    arrives(&app, "/read", "json").await;
    let by_id = |id: &str| -> Value {
        app.asked().iter().map(Asked::json).find(|event| event["id"] == id).unwrap()
    };
    let words = by_id(id);
    assert_eq!(
        (&words["data"], &words["datacontenttype"]),
        (&json!("plain words"), &json!("text/plain"))
    );
    assert_eq!(by_id("json")["data"], json!([1, 2]));

    // What has expired when its turn comes is not delivered.
    operator.text(&["pause", "default/read"]);
    operator.text(&["publish", "news", "old", "--id", "expires", "--ttl", "1s"]);
    let stored = operator.json_lines(&["tail", "news", "--from", "4", "--no-follow"]);
    let expiry: Timestamp = stored[0]["event"]["expirytime"].as_str().unwrap().parse().unwrap();
    eventually("its time is over", SOON, || async { (Timestamp::now() > expiry).then_some(()) })
        .await;
    operator.text(&["resume", "default/read"]);
    operator.publish("last", 9);
    arrives(&app, "/read", "last").await;
    operator.becomes("default/read", "lag", json!(0)).await;
    assert!(!ids(&app, "/read").contains(&"expires".to_owned()));

    let declared = operator.text(&["--bus", "strict", "publish", "declared", "1", "--id", "s"]);
    assert_eq!(declared, "s: stored at position 1 of declared\n");
    let error = operator.fails(&["--bus", "strict", "publish", "undeclared", "1"]);
    assert!(error.contains("\"undeclared\"") && error.contains("\"strict\""), "{error}");
    let error = operator.fails(&["publish", "news", "1", "--attribute", "tenant"]);
    assert!(error.contains("\"tenant\" is not name=value"), "{error}");
    let error = operator.fails(&["publish", "news", "1", "--attribute", "Tenant=1"]);
    assert!(error.contains("Tenant"), "{error}");
    let error = operator.fails(&["publish", "news", "1", "--ttl", "soon"]);
    assert!(error.contains("soon"), "{error}");
}
