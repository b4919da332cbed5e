//! What one subscription may be told.

use super::*;

#[tokio::test]
async fn only_a_subscription_that_would_not_come_back_is_forgotten() {
    let port = Port::new();
    let forget = async |name: &str| {
        port.post("/v1/forget", json!({"subscription": name, "skipWaiting": true})).await
    };
    let careful = port.post("/v1/forget", json!({"subscription": "shop/gone"})).await;
    assert_eq!(careful.0, 409);
    assert!(error(&careful).1.contains("3 events wait for it; say --skip-waiting"), "{careful:?}");
    assert!(port.bus.asked.lock().is_empty());
    let expected = json!({"forgotten": true, "lag": 3});
    assert_eq!(forget("shop/gone").await, (200, expected));
    assert_eq!(*port.bus.asked.lock(), ["forget shop/gone"]);
    for (name, status, part) in [
        ("shop/declared", 409, "a Subscription resource declares it"),
        ("shop/fulfil", 409, "an application consumes it"),
        ("shop/nope", 404, "there is no subscription \"shop/nope\""),
    ] {
        let answer = forget(name).await;
        let (was, text) = error(&answer);
        assert!(was == status && text.contains(part), "{answer:?}");
    }
    assert_eq!(port.bus.asked.lock().len(), 1, "nothing else was touched");
}

#[tokio::test]
async fn what_waits_is_skipped_only_when_somebody_says_so() {
    let port = Port::new();
    // The first that the subscription has yet to handle is at position 1, of 1.5 seconds. Whatever else is published in
    // the same millisecond, the place alone decides.
    let seek = async |start: &Value| {
        port.post("/v1/seek", json!({"subscription": "shop/fulfil", "start": start})).await
    };
    for skips in [
        json!("latest"),
        json!({"position": 2}),
        json!({"position": 3}),
        json!({"time": "1970-01-01T00:00:01.501Z"}),
    ] {
        let answer = seek(&skips).await;
        let (status, text) = error(&answer);
        let expected = "3 events wait, the oldest since 1970-01-01T00:00:01.5Z";
        assert!(status == 409 && text.contains(expected), "{skips}: {answer:?}");
        assert!(text.contains("--skip-waiting"), "{answer:?}");
    }
    assert!(port.bus.asked.lock().is_empty());
    for skips_none in
        [json!("earliest"), json!({"position": 1}), json!({"time": "1970-01-01T00:00:01.5Z"})]
    {
        assert_eq!(seek(&skips_none).await.0, 200, "{skips_none}");
    }
    let answer = port.post("/v1/seek", json!({"subscription": "a/b", "start": "latest"})).await;
    assert_eq!(error(&answer), (404, "there is no subscription \"a/b\""));
}
