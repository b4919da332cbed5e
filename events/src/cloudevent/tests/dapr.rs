//! What is done as Dapr does it: bodies are wrapped, and envelopes say `data` or `data_base64`.

use super::*;

#[test]
fn a_plain_body_is_wrapped_as_dapr_does() {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let event = read(&[("traceparent", parent)], "hello").unwrap().remove(0);
    assert_eq!(uuid::Uuid::parse_str(event.id()).unwrap().get_version_num(), 4);
    assert_eq!((event.source(), event.event_type()), ("checkout", "com.dapr.event.sent"));
    let expected = [
        ("datacontenttype", "text/plain"),
        ("pubsubname", "default"),
        ("time", "2026-01-31T12:00:00Z"),
        ("topic", "orders"),
        ("traceparent", parent),
    ];
    let attributes: Vec<_> = event.attributes().iter().map(|(k, v)| (&**k, &**v)).collect();
    assert_eq!(attributes, expected);
    assert_eq!(event.data().unwrap(), "hello");
    let sent = json(&encode_structured(&event, &[]));
    assert_eq!((&sent["data"], &sent["specversion"]), (&"hello".into(), &"1.0".into()));
}

#[test]
fn a_plain_json_body_is_json_in_its_envelope() {
    let event = read(&[("content-type", "application/json; charset=utf-8")], r#"{"a":1}"#);
    let sent = json(&encode_structured(&event.unwrap()[0], &[]));
    assert_eq!(sent["data"]["a"], 1);
}

#[test]
fn a_payload_is_a_string_where_its_type_is_text() {
    let member = |content_type: &str, body: &[u8]| {
        let headers = headers(&[("content-type", content_type)]);
        let event = decode(&headers, Bytes::copy_from_slice(body), &wrap()).unwrap().remove(0);
        let sent = json(&encode_structured(&event, &[]));
        let (data, base64) = (sent.get("data").cloned(), sent.get("data_base64").cloned());
        data.map(|data| ("data", data)).or(base64.map(|data| ("data_base64", data))).unwrap()
    };
    for text in [
        "text/plain",
        "text/csv; charset=utf-8",
        "application/xml",
        "Application/Atom+XML",
        "image/svg+xml",
        "application/x-www-form-urlencoded",
        "application/yaml",
        "application/x-yaml",
        "application/openapi+yaml",
        "application/javascript",
        "application/graphql",
        "application/sql",
        "application/toml",
        "application/x-ndjson",
    ] {
        assert_eq!(member(text, "<ä/>".as_bytes()), ("data", "<ä/>".into()), "{text}");
        assert_eq!(member(text, b"\xff"), ("data_base64", "/w==".into()), "{text}");
    }
    for binary in ["application/octet-stream", "image/png", "application/zip", "application/xmlx"] {
        assert_eq!(member(binary, b"text"), ("data_base64", "dGV4dA==".into()), "{binary}");
    }
    // As in Dapr: what is no JSON is at least text.
    for (body, data) in [("{\"a\":", "{\"a\":"), ("", ""), ("plain", "plain")] {
        for kind in ["application/json", "application/problem+json; charset=utf-8", "text/json"] {
            assert_eq!(member(kind, body.as_bytes()), ("data", data.into()), "{kind}");
        }
    }
    assert_eq!(member("application/json", b"\xff"), ("data_base64", "/w==".into()));
    assert_eq!(member("application/json", b"null"), ("data_base64", "bnVsbA==".into()));
}

#[test]
fn an_envelope_as_data_is_kept_byte_for_byte() {
    let event = Event::new("1", "/s", "t").unwrap().with_data("{");
    let event = event.with_attribute("datacontenttype", STRUCTURED_CONTENT_TYPE).unwrap();
    let sent = encode_structured(&event, &[]);
    assert_eq!(structured(std::str::from_utf8(&sent).unwrap()), Ok(event));
}

#[test]
fn a_trace_context_that_is_too_long_is_not_taken_over() {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let taken = |parent: &str, state: &str| {
        let event = read(&[("traceparent", parent), ("tracestate", state)], "x").unwrap().remove(0);
        let size = |name| event.attribute(name).map(str::len);
        (size("traceparent"), size("tracestate"))
    };
    let (longest, longer) = ("s".repeat(512), "s".repeat(513));
    assert_eq!(taken(parent, &longest), (Some(55), Some(512)));
    assert_eq!(taken(parent, &longer), (Some(55), None));
    assert_eq!(taken(&"0".repeat(64), "a=b"), (Some(64), Some(3)));
    assert_eq!(taken(&"0".repeat(65), "a=b"), (None, None));
}

#[test]
fn what_an_envelope_lacks_can_be_filled_in() {
    let fill = |body: &str| {
        let headers = headers(&[("content-type", STRUCTURED_CONTENT_TYPE)]);
        decode_filling(&headers, Bytes::copy_from_slice(body.as_bytes()), &wrap())
    };
    // The CloudEvent<T> of Dapr's SDK for .NET.
    let net = r#"{"data":{"orderId":7},"source":"urn:shop","type":"order.placed","datacontenttype":"application/json","subject":null}"#;
    let event = fill(net).unwrap().remove(0);
    assert_eq!(uuid::Uuid::parse_str(event.id()).unwrap().get_version_num(), 4);
    assert_eq!((event.source(), event.event_type()), ("urn:shop", "order.placed"));
    assert_eq!(
        (event.attribute("subject"), event.data().unwrap()),
        (None, &r#"{"orderId":7}"#.into())
    );
    let bare = r#"{"specversion":null,"id":null,"source":null,"type":null,"data":1}"#;
    for body in ["{}", bare] {
        let event = fill(body).unwrap().remove(0);
        assert_eq!((event.source(), event.event_type()), ("checkout", "com.dapr.event.sent"));
    }
    let own = fill(&envelope("")).unwrap().remove(0);
    assert_eq!((own.id(), own.source(), own.event_type()), ("1", "/s", "t"));
    for (body, attribute) in [
        (r#"{"specversion":"0.3"}"#, "specversion"),
        (r#"{"specversion":""}"#, "specversion"),
        (r#"{"id":""}"#, "id"),
        (r#"{"id":7}"#, "id"),
        (r#"{"source":"a b"}"#, "source"),
        (r#"{"type":""}"#, "type"),
        (r#"{"subject":""}"#, "subject"),
    ] {
        assert_eq!(fill(body).unwrap_err().attribute(), Some(attribute), "{body}");
    }
    let batch = headers(&[("content-type", BATCH_CONTENT_TYPE)]);
    assert!(decode_filling(&batch, Bytes::from_static(b"[{}]"), &wrap()).is_err());
    assert_eq!(structured(net).unwrap_err(), EnvelopeError::Missing { attribute: "specversion" });
}
