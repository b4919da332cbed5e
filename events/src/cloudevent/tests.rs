//! The HTTP binding: refusals as a table, and round trips as laws (`laws`).

mod dapr;
mod laws;

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::*;

fn wrap() -> WrapContext<'static> {
    WrapContext {
        source: "checkout",
        bus: "default",
        topic: "orders",
        now: "2026-01-31T12:00:00Z".parse().unwrap(),
    }
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        let name = HeaderName::try_from(*name).unwrap();
        headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    headers
}

fn read(pairs: &[(&str, &str)], body: &str) -> Result<Vec<Event>, EnvelopeError> {
    decode(&headers(pairs), Bytes::copy_from_slice(body.as_bytes()), &wrap())
}

fn structured(body: &str) -> Result<Event, EnvelopeError> {
    read(&[("content-type", STRUCTURED_CONTENT_TYPE)], body).map(|mut events| events.remove(0))
}

const BINARY: [(&str, &str); 4] =
    [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")];

fn binary(extra: &[(&str, &str)]) -> Result<Event, EnvelopeError> {
    let mut pairs: Vec<_> = BINARY.to_vec();
    for (name, value) in extra {
        pairs.retain(|(known, _)| known != name);
        pairs.push((*name, *value));
    }
    read(&pairs, "body").map(|mut events| events.remove(0))
}

fn json(value: &Bytes) -> serde_json::Value {
    serde_json::from_slice(value).unwrap()
}

#[test]
fn the_content_type_decides_the_mode() {
    let body = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t"}"#;
    for content_type in [
        "application/cloudevents+json",
        "Application/CloudEvents+JSON; charset=UTF-8",
        "application/cloudevents",
    ] {
        assert_eq!(read(&[("content-type", content_type)], body).unwrap()[0].id(), "1");
    }
    let batch = format!("[{body},{body}]");
    assert_eq!(read(&[("content-type", BATCH_CONTENT_TYPE)], &batch).unwrap().len(), 2);
    assert_eq!(read(&[("content-type", BATCH_CONTENT_TYPE)], "[]").unwrap(), []);
    // A structured event wins over headers, which a proxy may have added.
    let both = [("content-type", STRUCTURED_CONTENT_TYPE), ("ce-id", "2")];
    assert_eq!(read(&both, body).unwrap()[0].id(), "1");
}

#[test]
fn binary_mode_keeps_the_body_and_its_type() {
    let event = binary(&[
        ("content-type", "application/json"),
        ("ce-subject", "Euro %E2%82%AC%20%f0%9f%98%80"),
        ("ce-quoted", r#""a \"b\" \\ c%20d""#),
        ("ce-time", "2026-01-31T12:00:00.5+01:00"),
    ])
    .unwrap();
    assert_eq!(event.attribute("subject"), Some("Euro € 😀"));
    assert_eq!(event.attribute("quoted"), Some(r#"a "b" \ c d"#));
    assert_eq!(event.data_content_type(), Some("application/json"));
    assert_eq!(event.data().unwrap(), "body");
}

#[test]
fn header_values_are_escaped_as_the_binding_says() {
    let event = Event::new("a b\"c%d€", "/s", "t").unwrap();
    let (headers, body) = encode_binary(&event);
    assert_eq!(headers["ce-id"], "a%20b%22c%25d%E2%82%AC");
    assert!(body.is_empty() && !headers.contains_key("content-type"));
}

/// Attribute that the error names, header, value.
const BAD_HEADERS: [(&str, &str, &str); 37] = [
    ("specversion", "ce-specversion", "0.3"),
    ("specversion", "ce-specversion", "1.1"),
    ("specversion", "ce-specversion", ""),
    ("id", "ce-id", ""),
    ("source", "ce-source", ""),
    ("source", "ce-source", "a%20b"),
    ("source", "ce-source", "a%25zz"),
    ("source", "ce-source", "<x>"),
    ("type", "ce-type", ""),
    ("type", "ce-type", "a%0Ab"),
    ("type", "ce-type", "a%EF%BF%BFb"),
    ("subject", "ce-subject", ""),
    ("subject", "ce-subject", "%ff"),
    ("subject", "ce-subject", "%c0%80"),
    ("subject", "ce-subject", "%ed%a0%80"),
    ("subject", "ce-subject", "100%"),
    ("subject", "ce-subject", "%2"),
    ("subject", "ce-subject", "%zz"),
    ("subject", "ce-subject", r#""open"#),
    ("subject", "ce-subject", r#""shut"x"#),
    ("subject", "ce-subject", r#""escape\"#),
    ("time", "ce-time", "yesterday"),
    ("time", "ce-time", "2026-01-31"),
    ("time", "ce-time", "2026-01-31T12:00:00"),
    ("time", "ce-time", "2026-02-30T12:00:00Z"),
    ("time", "ce-time", "2026-01-31%2012:00:00Z"),
    ("time", "ce-time", "2026-01-31T12:00:00Z[UTC]"),
    ("dataschema", "ce-dataschema", "relative/path"),
    ("dataschema", "ce-dataschema", "1a:b"),
    ("datacontenttype", "ce-datacontenttype", "text/plain"),
    ("datacontenttype", "content-type", "nonsense"),
    ("datacontenttype", "content-type", "text/"),
    ("data", "ce-data", "x"),
    ("data_base64", "ce-data_base64", "x"),
    ("under_score", "ce-under_score", "x"),
    ("da-sh", "ce-da-sh", "x"),
    ("", "ce-", "x"),
];

#[test]
fn bad_binary_envelopes_name_the_attribute() {
    for (attribute, name, value) in BAD_HEADERS {
        let error = binary(&[(name, value)]).expect_err(value);
        assert_eq!(error.attribute(), Some(attribute), "{name}: {value}: {error}");
    }
    let long = "x".repeat(65);
    let error = binary(&[(&format!("ce-{long}"), "x")]).unwrap_err();
    assert_eq!(error.attribute(), Some(&long[..64]));
}

#[test]
fn missing_and_repeated_headers_are_named() {
    for missing in ["specversion", "id", "source", "type"] {
        let rest = BINARY.iter().filter(|(name, _)| name[3..] != *missing);
        let error = read(&rest.copied().collect::<Vec<_>>(), "").unwrap_err();
        assert_eq!(error, EnvelopeError::Missing { attribute: missing });
    }
    let twice = [&BINARY[..], &[("ce-id", "2")]].concat();
    assert_eq!(read(&twice, "").unwrap_err().attribute(), Some("id"));
    let types = [&BINARY[..], &[("content-type", "a/b"), ("content-type", "a/b")]].concat();
    assert_eq!(read(&types, "").unwrap_err().attribute(), Some("datacontenttype"));
}

#[test]
fn raw_bytes_in_headers_must_be_utf8() {
    let mut map = headers(&BINARY);
    map.insert("ce-subject", HeaderValue::from_bytes("ü".as_bytes()).unwrap());
    let event = decode(&map, Bytes::new(), &wrap()).unwrap().remove(0);
    assert_eq!(event.attribute("subject"), Some("ü"));
    map.insert("ce-subject", HeaderValue::from_bytes(&[0xff]).unwrap());
    assert_eq!(decode(&map, Bytes::new(), &wrap()).unwrap_err().attribute(), Some("subject"));
}

fn envelope(extra: &str) -> String {
    format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"t"{extra}}}"#)
}

#[test]
fn structured_members_become_attributes_and_data() {
    let event = structured(&envelope(
        r#","n":-7,"b":true,"none":null,"datacontenttype":"text/plain","data":"hi \u20ac""#,
    ))
    .unwrap();
    assert_eq!((event.attribute("n"), event.attribute("b")), (Some("-7"), Some("true")));
    assert_eq!(event.attribute("none"), None);
    let values: Vec<_> = event.values().collect();
    let expected = [
        ("b", AttributeValue::Boolean(true)),
        ("datacontenttype", AttributeValue::String("text/plain")),
        ("n", AttributeValue::Number("-7")),
    ];
    assert_eq!(values, expected);
    assert_eq!(event.data().unwrap(), "hi €");
    let cases = [
        (r#","data":{"a": [1, 2]}"#, Some(r#"{"a": [1, 2]}"#)),
        (r#","data":"text""#, Some(r#""text""#)),
        (r#","data_base64":"AP8=""#, None),
        (r#","data":null"#, None),
        (r#","data":null,"data_base64":"eA==""#, Some("x")),
        (r#","datacontenttype":"text/xml","data":"<a/>""#, Some("<a/>")),
        (r#","datacontenttype":"a/b+json","data":"x""#, Some(r#""x""#)),
    ];
    for (extra, expected) in cases {
        let data = structured(&envelope(extra)).unwrap().data().cloned();
        match expected {
            Some(text) => assert_eq!(data.unwrap(), text, "{extra}"),
            None => assert_ne!(data.as_deref(), Some(&b"null"[..]), "{extra}"),
        }
    }
}

#[test]
fn numbers_and_booleans_are_sent_as_they_were_written() {
    let body = envelope(
        r#","big":18446744073709551616,"huge":1e999,"no":false,"note":"5","rate":1.50,"yes":true,"zero":-0"#,
    );
    let event = structured(&body).unwrap();
    assert_eq!(encode_structured(&event, &[]), body);
    assert_eq!(encode_batch(std::slice::from_ref(&event), &[]), format!("[{body}]"));
    let batch = [("content-type", BATCH_CONTENT_TYPE)];
    assert_eq!(read(&batch, &format!("[{body}]")), Ok(vec![event.clone()]));
    // A header says only text.
    let (headers, data) = encode_binary(&event);
    assert_eq!(
        (&headers["ce-rate"], &headers["ce-yes"]),
        (&HeaderValue::from_static("1.50"), &HeaderValue::from_static("true"))
    );
    let binary = decode(&headers, data, &wrap()).unwrap().remove(0);
    assert_eq!(binary.attributes(), event.attributes());
    assert!(binary.values().all(|(_, value)| matches!(value, AttributeValue::String(_))));
}

#[test]
fn bad_structured_envelopes_name_the_attribute() {
    let cases = [
        (r#","data":1,"data_base64":"eA==""#, "data_base64"),
        (r#","data_base64":"*""#, "data_base64"),
        (r#","data_base64":7"#, "data_base64"),
        (r#","x":{}"#, "x"),
        (r#","x":[]"#, "x"),
        (r#","X":"1""#, "X"),
        (r#","x":"\ud800""#, "x"),
        (r#","datacontenttype":true"#, "datacontenttype"),
        (r#","time":7"#, "time"),
        (r#","time":"x""#, "time"),
        (r#","subject":true"#, "subject"),
        (r#","subject":"""#, "subject"),
        (r#","dataschema":"x""#, "dataschema"),
        (r#","datacontenttype":"x""#, "datacontenttype"),
        (r#","datacontenttype":"text/plain","data":"\ud800""#, "data"),
    ];
    for (extra, attribute) in cases {
        let error = structured(&envelope(extra)).expect_err(extra);
        assert_eq!(error.attribute(), Some(attribute), "{extra}: {error}");
    }
    for attribute in ["specversion", "id", "source", "type"] {
        let mut value: serde_json::Value = serde_json::from_str(&envelope("")).unwrap();
        for bad in [serde_json::Value::Null, "".into(), 7.into()] {
            value[attribute] = bad.clone();
            let error = structured(&value.to_string()).unwrap_err();
            assert_eq!(error.attribute(), Some(attribute), "{bad}: {error}");
        }
    }
}

#[test]
fn bodies_that_are_no_envelope_are_refused() {
    for body in ["", "{", "[]", "7", "null", "\"x\"", r#"{"id":"1","id":"2"}"#, "{}x"] {
        let error = structured(body).unwrap_err();
        assert_eq!((error.attribute(), error.is_unsupported_format()), (None, false), "{body}");
    }
    let content_type = [("content-type", STRUCTURED_CONTENT_TYPE)];
    let error = decode(&headers(&content_type), Bytes::from_static(b"\xff"), &wrap()).unwrap_err();
    assert!(matches!(error, EnvelopeError::Body { .. }));
    for format in [
        "application/cloudevents+avro",
        "application/cloudevents-batch+protobuf",
        "application/cloudevents+json; charset=utf-16",
        "application/cloudeventsx",
    ] {
        assert!(read(&[("content-type", format)], "{}").unwrap_err().is_unsupported_format());
    }
}

#[test]
fn an_error_in_a_batch_says_where() {
    let body = format!(r#"[{},{{"specversion":"1.0"}}]"#, envelope(""));
    let error = read(&[("content-type", BATCH_CONTENT_TYPE)], &body).unwrap_err();
    assert_eq!(error.to_string(), "event 1 of the batch: attribute id is missing");
    assert_eq!(error.attribute(), Some("id"));
}

#[test]
fn a_batch_takes_no_more_memory_than_its_events_do() {
    let braces = format!("[{}{{}}]", "{},".repeat(100_000));
    let error = read(&[("content-type", BATCH_CONTENT_TYPE)], &braces).unwrap_err();
    assert_eq!(error.to_string(), "event 0 of the batch: attribute specversion is missing");
    for broken in
        [format!("[{},7]", envelope("")), format!("[{},{{\"id\":1,\"id\":2}}]", envelope(""))]
    {
        let error = read(&[("content-type", BATCH_CONTENT_TYPE)], &broken).unwrap_err();
        assert!(error.to_string().starts_with("event 1 of the batch: body: "), "{error}");
    }
    for broken in ["", "{}", "[", "[] x"] {
        let error = read(&[("content-type", BATCH_CONTENT_TYPE)], broken).unwrap_err();
        assert!(error.to_string().contains("body: is not the expected JSON"), "{error}");
    }
}

#[test]
fn an_event_has_a_bounded_number_of_attributes() {
    let many =
        |count: usize| -> String { (0..count).map(|at| format!(r#","x{at}":"1""#)).collect() };
    let kind = [("content-type", STRUCTURED_CONTENT_TYPE)];
    assert!(read(&kind, &envelope(&many(200))).is_ok());
    let error = read(&kind, &envelope(&many(25_000))).unwrap_err();
    assert!(error.to_string().contains("256 at most"), "{error}");
    let names: Vec<String> = (0..300).map(|at| format!("ce-x{at}")).collect();
    let mut headers =
        vec![("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t"), ("ce-specversion", "1.0")];
    headers.extend(names.iter().map(|name| (name.as_str(), "1")));
    assert!(read(&headers, "").is_err());
}

#[test]
fn extra_attributes_count_instead_of_the_events_own() {
    let event = Event::new("1", "/s", "t").unwrap().with_attribute("topic", "mine").unwrap();
    let extra = [("topic", "theirs"), ("pubsubname", "default")];
    let sent = json(&encode_structured(&event, &extra));
    assert_eq!((&sent["topic"], &sent["pubsubname"]), (&"theirs".into(), &"default".into()));
    assert_eq!(json(&encode_batch(&[event], &extra))[0]["topic"], "theirs");
}

#[test]
fn the_wire_form_is_checked_like_any_other() {
    let fine = proto::Event {
        id: "1".into(),
        source: "/s".into(),
        spec_version: "1.0".into(),
        r#type: "t".into(),
        ..proto::Event::default()
    };
    assert!(Event::try_from(fine.clone()).is_ok());
    let cases = [
        ("specversion", proto::Event { spec_version: String::new(), ..fine.clone() }),
        ("id", proto::Event { id: String::new(), ..fine.clone() }),
        ("source", proto::Event { source: " ".into(), ..fine.clone() }),
        ("type", proto::Event { r#type: "\n".into(), ..fine.clone() }),
        ("Bad", proto::Event { attributes: [("Bad".into(), "x".into())].into(), ..fine.clone() }),
        ("id", proto::Event { attributes: [("id".into(), "x".into())].into(), ..fine }),
    ];
    for (attribute, raw) in cases {
        assert_eq!(Event::try_from(raw).unwrap_err().attribute(), Some(attribute));
    }
}

#[test]
fn names_in_errors_are_short_and_printable() {
    let error = structured(&envelope(&format!(r#","{}\u0007":1"#, "é".repeat(40)))).unwrap_err();
    assert!(error.attribute().unwrap().chars().all(|c| !c.is_control()));
}

#[test]
fn an_event_knows_about_its_size() {
    let small = Event::new("1", "/s", "t").unwrap();
    let large = small.clone().with_data(vec![0; 1000]);
    assert_eq!(large.size() - small.size(), 1000);
    let attributes: BTreeMap<_, _> = small.attributes().clone();
    assert!(attributes.is_empty());
}
