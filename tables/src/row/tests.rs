use duet_api::proto;
use duet_events::cloudevent::AttributeValue;

use super::*;

fn spec() -> SourceSpec {
    let raw = proto::OutboxSource {
        name: "shop/orders".to_owned(),
        database: Some(proto::outbox_source::Database::Url("sqlite:a".to_owned())),
        table: "outbox".to_owned(),
        bus: "default".to_owned(),
        source: "/shop/orders".to_owned(),
        data_content_type: "application/json".to_owned(),
        ..proto::OutboxSource::default()
    };
    raw.try_into().unwrap()
}

fn row() -> Row {
    let text = |text: &str| Some(text.to_owned());
    Row {
        sequence: 1,
        id: text("7"),
        topic: text("orders"),
        event_type: text("placed"),
        ..Row::default()
    }
}

#[test]
fn a_row_becomes_an_event() {
    let row = Row {
        key: Some("c1".to_owned()),
        time: Some("2026-01-31 12:00:00".to_owned()),
        attributes: Some(r#"{"tenant": "4", "tries": 3, "gone": null, "last": true}"#.to_owned()),
        traceparent: Some("00-1-2-01".to_owned()),
        data: Some(b"{}".to_vec()),
        ..row()
    };
    let (topic, event) = row.event(&spec()).unwrap();
    assert_eq!(topic, "orders");
    assert_eq!((event.id(), event.source(), event.event_type()), ("7", "/shop/orders", "placed"));
    let attributes: Vec<String> =
        event.attributes().iter().map(|(name, value)| format!("{name}={value}")).collect();
    let expected = "datacontenttype=application/json last=true partitionkey=c1 tenant=4 \
                    time=2026-01-31T12:00:00Z traceparent=00-1-2-01 tries=3";
    assert_eq!(attributes.join(" "), expected);
    let typed: Vec<_> =
        event.values().filter(|(_, value)| !matches!(value, AttributeValue::String(_))).collect();
    let expected =
        [("last", AttributeValue::Boolean(true)), ("tries", AttributeValue::Number("3"))];
    assert_eq!(typed, expected);
    assert_eq!(event.data().unwrap(), &b"{}"[..]);
}

#[test]
fn the_resource_fills_what_the_row_leaves_open() {
    let mut spec = spec();
    spec.topic = Some("all".to_owned());
    spec.event_type = Some("changed".to_owned());
    let bare = Row { topic: None, event_type: None, ..row() };
    let (topic, event) = bare.event(&spec).unwrap();
    assert_eq!((topic.as_str(), event.event_type()), ("all", "changed"));
    assert_eq!(event.data_content_type(), None, "no data, no type of data");
}

#[test]
fn what_is_wrong_with_a_row_is_named() {
    let text = |text: &str| Some(text.to_owned());
    let cases = [
        (Row { id: None, ..row() }, "its id is NULL"),
        (Row { id: text(""), ..row() }, "attribute id: is empty"),
        (Row { topic: None, ..row() }, "\"\" is not a topic"),
        (Row { topic: text("a b"), ..row() }, "\"a b\" is not a topic"),
        (Row { event_type: None, ..row() }, "its type is NULL"),
        (Row { source: text("a b"), ..row() }, "attribute source: is not a URI reference"),
        (Row { time: text("noon"), ..row() }, "attribute time: is not an RFC 3339 time"),
        (Row { attributes: text("[]"), ..row() }, "not a JSON object"),
        (Row { attributes: text(r#"{"a": {}}"#), ..row() }, "not a JSON object"),
        (Row { attributes: text(r#"{"Tenant": "a"}"#), ..row() }, "attribute Tenant"),
        (Row { attributes: text(r#"{"deliverat": "soon"}"#), ..row() }, "attribute deliverat"),
        (Row { data: Some(vec![0; 5 << 20]), ..row() }, "over 4194304"),
        (Row { cut: true, bytes: 5 << 20, ..row() }, "5242880 bytes, over 4194304"),
        (Row { cut: true, bytes: 70_000, ..row() }, "a text has over 65536 bytes"),
        (Row { unreadable: true, ..row() }, "a column is not UTF-8"),
    ];
    for (row, expected) in cases {
        let error = row.event(&spec()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} is not {expected}");
    }
}

#[test]
fn times_of_databases_are_utc() {
    for (text, expected) in [
        ("2026-01-31 12:00:00", "2026-01-31T12:00:00Z"),
        ("2026-01-31 12:00:00.5+02:00", "2026-01-31T12:00:00.5+02:00"),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
    ] {
        assert_eq!(rfc3339(text), expected);
    }
    // As people write it for ever.
    let forever = Row { time: Some("9999-12-31 23:59:59".to_owned()), ..row() };
    let (_, event) = forever.event(&spec()).unwrap();
    assert_eq!(event.attribute("time"), Some("9999-12-31T23:59:59Z"));
}

#[test]
fn a_read_says_whether_there_may_be_more() {
    let rows = |bytes: &[usize]| -> Vec<Row> {
        bytes.iter().map(|bytes| Row { bytes: *bytes, ..row() }).collect()
    };
    assert!(!Read::new(rows(&[1, 2]), 3).more);
    assert!(Read::new(rows(&[1, 2, 3]), 3).more);
    assert!(Read::new(rows(&[1, READ_BYTES]), 3).more);
}
