use std::sync::Arc;

use axum::body::Bytes;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;

mod memory;
mod steer;

use memory::{Memory, One};

struct Port {
    bus: Arc<Memory>,
    router: Router,
}

impl Port {
    fn new() -> Self {
        let bus = Arc::new(Memory::default());
        let router = Operate::new(Arc::new(One(Arc::clone(&bus))), true).router();
        Self { bus, router }
    }

    async fn send(&self, request: Request<Body>) -> (u16, Value) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.send(request("GET", path, "application/json", Body::empty())).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(request("POST", path, "application/json", Body::from(body.to_string()))).await
    }
}

fn request(method: &str, path: &str, content_type: &str, body: Body) -> Request<Body> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "127.0.0.1:15016")
        .header("duet-operator", "1")
        .header("content-type", content_type)
        .body(body)
        .unwrap()
}

fn error((status, body): &(u16, Value)) -> (u16, &str) {
    (*status, body["error"].as_str().unwrap_or_default())
}

#[tokio::test]
async fn what_is_published_can_be_read() {
    let port = Port::new();
    for id in ["1", "2", "3"] {
        let event =
            json!({"specversion": "1.0", "id": id, "source": "/s", "type": "a", "data": {"n": id}});
        let body = Body::from(event.to_string());
        let request = request("POST", "/v1/publish?topic=t", "application/cloudevents+json", body);
        let (status, answer) = port.send(request).await;
        assert_eq!((status, &answer["published"][0]["duplicate"]), (200, &json!(false)));
    }
    let (_, answer) = port.get("/v1/events?topic=t&from=2&limit=1").await;
    assert_eq!(answer["next"], 3);
    let event = &answer["events"][0];
    assert_eq!((&event["position"], &event["event"]["data"]), (&json!(2), &json!({"n": "2"})));
    assert_eq!(event["published"], "1970-01-01T00:00:02Z");
    let (_, answer) = port.get("/v1/events?topic=t&filter=event.data.n%3D%3D%273%27").await;
    assert_eq!((&answer["next"], &answer["events"][0]["position"]), (&json!(4), &json!(3)));
    let (_, answer) = port.get("/v1/topics").await;
    assert_eq!(
        answer["topics"][0],
        json!({"name": "t", "first": 1, "next": 4, "events": 3, "bytes": 99, "declared": true})
    );
    let (_, answer) = port.get("/v1/subscriptions?bus=default").await;
    let subscription = &answer["subscriptions"][0];
    assert_eq!(subscription["deadLetterTopic"], "poison");
    assert_eq!(subscription["attempts"], 4);
    assert_eq!((&subscription["lag"], &subscription["scheduled"]), (&json!(2), &json!(1)));
    assert_eq!(
        (&subscription["oldest"], &subscription["waitingSince"]),
        (&json!("1970-01-01T00:00:01.5Z"), &json!("1970-01-01T00:00:01.7Z"))
    );
    assert_eq!(
        port.get("/v1/buses").await.1,
        json!({"buses": ["default"], "notMoved": {"default": "default stays"}})
    );
}

#[tokio::test]
async fn data_that_only_the_publisher_can_read_hides_nothing() {
    let port = Port::new();
    let deep = format!("{}{}", "[".repeat(120), "]".repeat(120));
    for data in [r#""\ud83d""#, "1e999", &deep, "{}"] {
        let event =
            format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"a","data":{data}}}"#);
        let body = Body::from(event);
        let request = request("POST", "/v1/publish?topic=t", "application/cloudevents+json", body);
        assert_eq!(port.send(request).await.0, 200, "{data}");
    }
    let (status, answer) = port.get("/v1/events?topic=t").await;
    assert_eq!(status, 200);
    let shown = answer["events"].as_array().unwrap().iter().map(|stored| &stored["event"]);
    let shown: Vec<_> = shown.map(|event| event.get("data_base64").is_some()).collect();
    assert_eq!(shown, [true, true, true, false]);
}

#[tokio::test]
async fn what_is_asked_arrives_at_the_bus() {
    let port = Port::new();
    let positions = json!({"topic": "t.dead-letter", "positions": [1, 2]});
    assert_eq!(port.post("/v1/redrive", positions.clone()).await, (200, json!({"redriven": 2})));
    assert_eq!(port.post("/v1/remove", positions).await, (200, json!({"removed": 2})));
    for start in
        [json!("earliest"), json!({"position": 5}), json!({"time": "1970-01-01T00:00:01Z"})]
    {
        let body = json!({"subscription": "shop/fulfil", "start": start, "skipWaiting": true});
        assert_eq!(port.post("/v1/seek", body).await.0, 200);
    }
    let paused =
        port.post("/v1/pause", json!({"subscription": "shop/fulfil", "paused": true})).await;
    assert_eq!(error(&paused), (409, "not now"));
    let expected = [
        "redrive t.dead-letter [1, 2]",
        "remove t.dead-letter [1, 2]",
        "seek shop/fulfil Earliest",
        "seek shop/fulfil Position(5)",
        "seek shop/fulfil Time(1000)",
        "pause shop/fulfil true",
    ];
    assert_eq!(*port.bus.asked.lock(), expected);
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() {
    let port = Port::new();
    let cases = [
        (port.get("/v1/events?topic=other").await, 404, "there is no topic \"other\""),
        (
            port.get("/v1/topics?bus=other").await,
            404,
            "there is no bus \"other\"; known are: default",
        ),
        (
            port.get("/v1/events?topic=t&filter=nope").await,
            400,
            "filter: \"nope\" \"nope\" is not known",
        ),
        (port.get("/v1/events").await, 400, "missing field `topic`"),
        (port.get("/v1/topics?buss=a").await, 400, "unknown field `buss`"),
        (
            port.post("/v1/seek", json!({"subscription": "a", "start": {"time": "noon"}})).await,
            400,
            "\"noon\" is not an RFC 3339 time",
        ),
        (
            port.post("/v1/seek", json!({"subscription": "a", "start": "soon"})).await,
            400,
            "unknown variant `soon`",
        ),
        (
            port.post("/v1/remove", json!({"topic": "t", "positions": vec![1; 10_001]})).await,
            400,
            "more than 10000",
        ),
        (port.post("/v1/publish?topic=t", json!({"specversion": "1.0"})).await, 200, ""),
        (
            port.post("/v1/publish?topic=undeclared", json!({})).await,
            404,
            "default does not take undeclared",
        ),
    ];
    for (answer, status, expected) in &cases {
        let (was, text) = error(answer);
        assert!(was == *status && text.contains(expected), "{answer:?}");
    }
    let body = Body::from("{\"specversion\": \"1.0\", \"id\": \"1\"}");
    let bad = port
        .send(request("POST", "/v1/publish?topic=t", "application/cloudevents+json", body))
        .await;
    assert_eq!(error(&bad), (400, "attribute source is missing"));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_never_ends_and_one_without_bounds_are_refused() {
    let port = Port::new();
    let silent = Body::from_stream(futures::stream::pending::<Result<Bytes, axum::Error>>());
    let answer = port.send(request("POST", "/v1/seek", "application/json", silent)).await;
    assert_eq!(error(&answer), (408, "the request did not arrive in time"));
    let large = Body::from(vec![b' '; MAX_BODY_BYTES + 1]);
    let answer = port.send(request("POST", "/v1/seek", "application/json", large)).await;
    assert_eq!(error(&answer).0, 413);
    assert!(error(&answer).1.contains("larger than 8388608 bytes"), "{answer:?}");
}

#[tokio::test]
async fn web_pages_are_kept_out() {
    let port = Port::new();
    let with = |change: fn(&mut Request<Body>)| {
        let mut request = request("GET", "/v1/buses", "text/plain", Body::empty());
        change(&mut request);
        request
    };
    type Spoil = fn(&mut Request<Body>);
    let cases: [(Spoil, &str); 4] = [
        (|r| drop(r.headers_mut().remove("duet-operator")), "duet-operator is missing"),
        (
            |r| drop(r.headers_mut().insert("host", "evil.example:15016".parse().unwrap())),
            "must be a loopback",
        ),
        (|r| drop(r.headers_mut().remove("host")), "must be a loopback"),
        (
            |r| drop(r.headers_mut().insert("origin", "http://localhost".parse().unwrap())),
            "web pages",
        ),
    ];
    for (change, expected) in cases {
        let answer = port.send(with(change)).await;
        let (status, text) = error(&answer);
        assert!(status == 403 && text.contains(expected), "{answer:?}");
    }
    assert_eq!(port.send(with(|_| ())).await.0, 200);
}

#[tokio::test]
async fn other_machines_are_let_in_only_where_somebody_said_so() {
    let anywhere = "0.0.0.0:0".parse().unwrap();
    let error = bind(anywhere, false).await.unwrap_err();
    assert!(error.to_string().contains("--operator-anywhere"), "{error}");
    bind(anywhere, true).await.unwrap();
    bind("127.0.0.1:0".parse().unwrap(), false).await.unwrap();
}

#[tokio::test]
async fn a_migration_is_asked_for_with_its_bounds() {
    let port = Port::new();
    let asked = port.post("/v1/migrate", json!({"skip": ["a/b"], "limit": 1_000_000})).await;
    assert_eq!(error(&asked), (409, r#"default {"a/b"} false 10000"#));
    let asked = port.post("/v1/migrate", json!({"bus": "other", "leaveBehind": true})).await;
    assert_eq!(error(&asked), (409, "other {} true 2000"));
    let asked = port.post("/v1/migrate", json!({"to": "x"})).await;
    assert_eq!(asked.0, 400);
}
