//! What is sent comes back, and nothing that comes makes us panic.

use proptest::prelude::*;

use super::*;

fn text() -> impl Strategy<Value = String> {
    any::<String>().prop_map(|text| clean_text(&text))
}

fn data() -> impl Strategy<Value = (Option<&'static str>, Option<Vec<u8>>)> {
    let json = any::<(i64, String)>().prop_map(|value| serde_json::to_vec(&value).unwrap());
    prop_oneof![
        Just((None, None)),
        json.clone().prop_map(|data| (Some("application/json"), Some(data))),
        json.prop_map(|data| (None, Some(data))),
        any::<String>().prop_map(|text| (Some("text/plain"), Some(text.into_bytes()))),
        any::<Vec<u8>>().prop_map(|data| (Some("image/png"), Some(data))),
        any::<Vec<u8>>().prop_map(|data| (Some("application/json"), Some(data))),
        any::<String>().prop_map(|text| (Some("application/json"), Some(text.into_bytes()))),
        any::<String>().prop_map(|text| (Some("application/atom+xml"), Some(text.into_bytes()))),
        any::<Vec<u8>>().prop_map(|data| (Some("application/yaml"), Some(data))),
        any::<Vec<u8>>().prop_map(|data| (None, Some(data))),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let required = (text(), "[a-z:/._-]{1,30}", text());
    let extensions = prop::collection::btree_map("x[a-z0-9]{0,18}", text(), 0..6);
    let literals = "true|false|-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,4})?";
    let literals = prop::collection::btree_map("x[a-z0-9]{0,3}", literals, 0..4);
    let extensions = (extensions, literals);
    (required, extensions, data()).prop_map(|((id, source, kind), extensions, (kind_of, data))| {
        let mut event = Event::new(format!("i{id}"), source, format!("t{kind}")).unwrap();
        let (extensions, literals) = extensions;
        for (name, value) in literals {
            event = event.with_literal(&name, &value).unwrap();
        }
        for (name, value) in extensions {
            event = event.with_attribute(&name, &value).unwrap();
        }
        if let Some(content_type) = kind_of {
            event = event.with_attribute("datacontenttype", content_type).unwrap();
        }
        match data {
            Some(data) => event.with_data(data),
            None => event,
        }
    })
}

/// JSON's own white space and a null are the two things that the JSON format does not keep; and text that only calls itself
/// JSON comes back as a JSON string.
fn same_but_for_json_space(mut event: Event) -> Event {
    let is_json = event.data_content_type().is_none_or(is_json);
    if let (true, Some(data)) = (is_json, &event.data)
        && let Ok(text) = std::str::from_utf8(data)
    {
        if serde_json::from_str::<serde_json::Value>(text).is_ok() {
            event.data = Some(Bytes::copy_from_slice(text.trim_ascii().as_bytes()));
        } else if event.data_content_type().is_some() {
            event.data = Some(serde_json::to_vec(text).unwrap().into());
        }
    }
    event
}

proptest! {
    #[test]
    fn structured_mode_round_trips(event in event()) {
        let sent = encode_structured(&event, &[]);
        let content_type = headers(&[("content-type", STRUCTURED_CONTENT_TYPE)]);
        let back = decode(&content_type, sent, &wrap()).unwrap().remove(0);
        prop_assert_eq!(same_but_for_json_space(back), same_but_for_json_space(event));
    }

    #[test]
    fn batches_round_trip(events in prop::collection::vec(event(), 0..4)) {
        let content_type = headers(&[("content-type", BATCH_CONTENT_TYPE)]);
        let back = decode(&content_type, encode_batch(&events, &[]), &wrap()).unwrap();
        let clean = |events: Vec<Event>| -> Vec<_> {
            events.into_iter().map(same_but_for_json_space).collect()
        };
        prop_assert_eq!(clean(back), clean(events));
    }

    #[test]
    fn binary_mode_round_trips(event in event()) {
        let (headers, body) = encode_binary(&event);
        let back = decode(&headers, body, &wrap()).unwrap().remove(0);
        // An empty body and no body are one thing in HTTP.
        let data = event.data().filter(|data| !data.is_empty()).cloned();
        let typed = BTreeSet::new();
        prop_assert_eq!(back, Event { data, typed, ..event });
    }

    #[test]
    fn the_wire_form_round_trips(event in event()) {
        prop_assert_eq!(Event::try_from(proto::Event::from(event.clone())), Ok(event));
    }

    #[test]
    fn no_request_panics(
        pairs in prop::collection::btree_map(
            "(ce-[a-z_-]{0,8}|content-type|ce-id|ce-time|ce-source)", any::<Vec<u8>>(), 0..8),
        body: Vec<u8>,
        mode in 0_usize..4,
    ) {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            if let (Ok(name), Ok(value)) =
                (HeaderName::try_from(name), HeaderValue::from_bytes(&value))
            {
                map.insert(name, value);
            }
        }
        let content_type = [STRUCTURED_CONTENT_TYPE, BATCH_CONTENT_TYPE, "text/plain"];
        if let Some(content_type) = content_type.get(mode) {
            map.insert("content-type", HeaderValue::from_static(content_type));
        }
        drop(decode(&map, body.into(), &wrap()));
    }

    #[test]
    fn no_json_panics(body in r#"[\[{]?("(id|source|type|data|x)":("[^"]{0,4}"|1|null|\{\}),?){0,6}[}\]]?"#) {
        drop(structured(&body));
        drop(read(&[("content-type", BATCH_CONTENT_TYPE)], &body));
    }
}
