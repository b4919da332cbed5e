use super::*;

fn raw() -> proto::Subscription {
    proto::Subscription { name: "shop/a".into(), topic: "t".into(), ..Default::default() }
}

fn routes(matches: &str, path: &str) -> Vec<proto::EventRoute> {
    vec![proto::EventRoute { r#match: matches.to_owned(), path: path.to_owned() }]
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[test]
fn absent_fields_get_the_documented_defaults() {
    let spec = SubscriptionSpec::new("shop/a", "default", "t").unwrap();
    assert_eq!((spec.max_in_flight, spec.max_attempts), (64, NonZeroU32::new(10)));
    assert_eq!(spec.ack_timeout, Duration::from_secs(30));
    assert_eq!(spec.backoff, Duration::from_secs(1));
    assert_eq!(spec.max_backoff, Duration::from_secs(300));
    assert_eq!(spec.dead_letter_topic, "t.dead-letter");
    assert_eq!(spec.start, Start::Latest);
    assert_eq!(SubscriptionSpec::try_from(raw()).unwrap().max_attempts, None, "0: no bound");
}

#[test]
fn the_wire_form_round_trips() {
    let spec = SubscriptionSpec {
        start: Start::Time(1_700_000_000_123),
        raw_payload: true,
        ordered: true,
        filter: Some("event.type == 'a'".into()),
        routes: vec![Route { matches: "true".into(), path: "/a".into() }],
        broadcast: true,
        once: true,
        bulk: Some(Bulk { max: 10, wait: Duration::from_millis(5) }),
        idle_expiry: Some(Duration::from_secs(60)),
        max_in_flight: 3,
        backoff: Duration::from_millis(1),
        ..SubscriptionSpec::new("shop/a", "default", "t").unwrap()
    };
    assert_eq!(SubscriptionSpec::try_from(proto::Subscription::from(spec.clone())), Ok(spec));
}

#[test]
fn a_bulk_of_one_is_a_bulk() {
    let bulk = |bulk_max| {
        let raw = proto::Subscription { bulk_max, ..raw() };
        SubscriptionSpec::try_from(raw).unwrap().bulk.map(|bulk| bulk.max)
    };
    assert_eq!((bulk(0), bulk(1), bulk(10_000)), (None, Some(1), Some(10_000)));
}

#[test]
fn bad_fields_are_named() {
    type Spoil = fn(&mut proto::Subscription);
    let cases: [(&str, Spoil); 17] = [
        ("name", |raw| raw.name.clear()),
        ("name", |raw| raw.name.push('\n')),
        ("topic", |raw| raw.topic.clear()),
        ("topic", |raw| raw.topic = "x".repeat(256)),
        ("deadLetterTopic", |raw| raw.dead_letter_topic = "t".into()),
        ("delivery.maxInFlight", |raw| raw.max_in_flight = 10_001),
        ("delivery.ackTimeout", |raw| raw.ack_timeout = seconds(-1)),
        ("retry.backoff", |raw| raw.backoff = seconds(i64::MIN)),
        ("retry.maxBackoff", |raw| raw.backoff = seconds(301)),
        ("start", |raw| raw.start = proto::Start::Time.into()),
        ("bulk.max", |raw| raw.bulk_max = 10_001),
        ("idleExpiry", |raw| raw.idle_expiry = seconds(-1)),
        ("subscriber.path", |raw| raw.path = "/".repeat(2049)),
        ("filter", |raw| raw.filter = " ".repeat(2049)),
        ("routes", |raw| raw.routes = vec![proto::EventRoute::default(); 65]),
        ("routes", |raw| raw.routes = routes(&"x".repeat(2049), "/a")),
        ("routes", |raw| raw.routes = routes("true", &"/".repeat(2049))),
    ];
    for (field, spoil) in cases {
        let mut raw = raw();
        spoil(&mut raw);
        assert_eq!(SubscriptionSpec::try_from(raw).unwrap_err().field, field);
    }
}
