use duet_events::bus::Route;
use proptest::prelude::*;

use super::*;

fn event() -> Event {
    Event::new("1", "/orders", "withdraw.v3")
        .unwrap()
        .with_attribute("subject", "mug")
        .unwrap()
        .with_attribute("tenant", "acme")
        .unwrap()
        .with_attribute("time", "2026-01-31T12:00:00Z")
        .unwrap()
        .with_attribute("datacontenttype", "application/json; charset=utf-8")
        .unwrap()
        .with_data(
            r#"{"total": 120, "rate": 0.5, "items": [{"sku": "a"}, {"sku": "b"}], "vip": true}"#,
        )
}

fn spec(filter: &str) -> SubscriptionSpec {
    let filter = Some(filter.to_owned());
    SubscriptionSpec {
        filter,
        path: "/own".into(),
        ..SubscriptionSpec::new("a/s", "default", "t").unwrap()
    }
}

fn choose(filter: &str, event: &Event) -> (Choice, Option<String>) {
    Selector::of(&spec(filter)).unwrap().unwrap().choose(event)
}

fn refusal(source: &str) -> String {
    Selector::filter(source).unwrap_err().reason
}

#[test]
fn expressions_see_attributes_and_data() {
    let cases = [
        (r#"event.type == "withdraw.v3""#, true),
        (r#"event.type == "deposit""#, false),
        (r#"event.type.startsWith("withdraw.") && event.source == "/orders""#, true),
        ("event.id == '1' && event.specversion == '1.0'", true),
        ("event.data.total > 100", true),
        ("event.data.total > 100.5", true),
        ("event.data.total == 120.0", true),
        ("event.data.rate < 1", true),
        ("event.data['total'] >= 121", false),
        ("event.data.vip", true),
        ("has(event.data.x)", false),
        ("has(event.data.total) && has(event.subject)", true),
        ("has(event.dataschema)", false),
        ("event.tenant in ['acme', 'other']", true),
        ("event.data.items.exists(i, i.sku == 'b')", true),
        ("event.data.items.all(i, i.sku == 'b')", false),
        ("size(event.data.items.map(i, i.sku)) == 2", true),
        ("event.subject.matches('^m.g$')", true),
        ("timestamp(event.time) > timestamp('2026-01-01T00:00:00Z')", true),
        ("event.datacontenttype.contains('json')", true),
        ("type(event.data.total) == int", true),
        ("true", true),
    ];
    for (filter, expected) in cases {
        let expected = if expected { Choice::Deliver(None) } else { Choice::Skip };
        assert_eq!(choose(filter, &event()), (expected, None), "{filter}");
    }
}

#[test]
fn an_attribute_is_a_number_or_a_boolean_where_its_publisher_says_so() {
    let typed = event().with_literal("priority", "5").unwrap();
    let typed = typed.with_literal("urgent", "true").unwrap();
    let typed = typed.with_literal("rate", "0.5").unwrap().with_literal("huge", "1e999").unwrap();
    let texts = event().with_attribute("priority", "5").unwrap();
    let texts = texts.with_attribute("urgent", "true").unwrap();
    // Expression, of a number and a boolean, of texts.
    let cases = [
        ("event.priority > 3", true, false),
        ("event.priority == 5 && event.urgent", true, false),
        ("type(event.priority) == int && event.urgent == true", true, false),
        ("event.rate < 1", true, false),
        ("event.huge == '1e999'", true, false),
        ("int(event.priority) > 3", true, true),
        ("string(event.priority) == '5' && string(event.urgent) == 'true'", true, true),
        // As before attributes had types.
        ("event.priority == '5'", true, true),
        ("'5' == event['priority']", true, true),
        ("event.priority == '6' || event.urgent == 'false'", false, false),
        ("event.priority == '05'", false, false),
        ("event.urgent == 'true' && event.urgent != 'false'", true, true),
        ("event.priority != '5'", false, false),
        ("event.priority != '6'", true, true),
        ("event.priority in ['4', '5']", true, true),
        ("event['urgent'] in ['true']", true, true),
        ("event.priority in ['4', '6']", false, false),
        ("event.priority.startsWith('5')", false, true),
        ("event.data.items.exists(i, event.priority == '5')", true, true),
        // Of nothing else.
        ("event.data.total == '120'", false, false),
        ("event.missing == '5' || true", true, true),
        ("event.missing != '5'", false, false),
    ];
    for (filter, of_typed, of_texts) in cases {
        let passes = |event| choose(filter, event).0 == Choice::Deliver(None);
        assert_eq!((passes(&typed), passes(&texts)), (of_typed, of_texts), "{filter}");
    }
}

#[test]
fn what_cannot_be_evaluated_does_not_match_and_says_why() {
    let cases = [
        ("event.data.missing > 1", "the event has no \"missing\" there"),
        ("event.nothing == 'a'", "the event has no \"nothing\" there"),
        ("event.data.total", "the result is a int, not a bool"),
        ("event.type > 1", "no matching overload"),
        ("1 / 0 == 1", "Division by zero"),
        ("event.data.total.matches('1')", "matches: is of strings"),
    ];
    for (filter, expected) in cases {
        let (choice, problem) = choose(filter, &event());
        assert_eq!(choice, Choice::Skip, "{filter}");
        let problem = problem.unwrap_or_default();
        assert!(problem.contains(expected), "{filter}: {problem}");
        assert!(!problem.contains("withdraw"), "values stay out of it: {problem}");
    }
}

#[test]
fn data_is_what_its_content_type_says() {
    let with = |kind: Option<&str>, data: &[u8]| {
        let event = Event::new("1", "/s", "t").unwrap().with_data(data.to_vec());
        match kind {
            Some(kind) => event.with_attribute("datacontenttype", kind).unwrap(),
            None => event,
        }
    };
    let cases = [
        (with(None, b"{\"a\": 1}"), "event.data.a == 1"),
        (with(Some("application/vnd.order+json"), b"{\"a\": 1}"), "event.data.a == 1"),
        (with(Some("text/plain"), b"{\"a\": 1}"), "event.data == '{\"a\": 1}'"),
        (with(Some("application/json"), b"not json"), "event.data == 'not json'"),
        (with(Some("application/octet-stream"), b"\xff\x00"), "event.data == b'\\xff\\x00'"),
        (with(None, b"18446744073709551615"), "event.data > 5"),
        (with(None, b"null"), "event.data == null"),
        (with(None, br#"{"a": 1, "a": "x\n"}"#), "event.data == {'a': 'x\\n'}"),
        (with(None, b"[1.5, -3, true, [], {}] "), "event.data == [1.5, -3, true, [], {}]"),
        (with(None, b"[1] 2"), "event.data == '[1] 2'"),
        (Event::new("1", "/s", "t").unwrap(), "!has(event.data)"),
    ];
    for (event, filter) in cases {
        assert_eq!(choose(filter, &event), (Choice::Deliver(None), None), "{filter}");
    }
}

#[test]
fn data_is_parsed_only_where_an_expression_looks_at_it() {
    for (source, wanted) in [
        ("event.type == 'data'", false),
        ("has(event.subject)", false),
        ("event.data.a == 1", true),
        ("has(event.data)", true),
        ("event['data'] == 1", true),
        ("size(event) > 5", true),
    ] {
        let filter = Selector::filter(source).unwrap().filter.unwrap();
        assert_eq!(filter.wants_data, wanted, "{source}");
    }
    let many = event().with_data(format!("[{}0]", "0,".repeat(60_000)));
    assert_eq!(choose("has(event.data)", &many), (Choice::Skip, None));
    let large = event().with_data(vec![b' '; (1 << 20) + 1]);
    assert_eq!(choose("event.type == 'withdraw.v3'", &large).0, Choice::Deliver(None));
    assert_eq!(choose("event.data == ''", &large).0, Choice::Skip);
}

#[test]
fn the_first_route_that_matches_says_the_path() {
    let route = |matches: &str, path: &str| Route { matches: matches.into(), path: path.into() };
    let mut spec = spec("event.data.total < 1000");
    spec.routes = vec![
        route("event.data.missing == 1", "/never"),
        route("event.data.total > 500", "/large"),
        route("event.data.total > 100", "/medium"),
        route("true", "/small"),
    ];
    let choose = |spec: &SubscriptionSpec| Selector::of(spec).unwrap().unwrap().choose(&event());
    let (choice, problem) = choose(&spec);
    assert_eq!(choice, Choice::Deliver(Some("/medium".into())));
    assert!(problem.unwrap().contains("missing"));
    spec.routes.truncate(2);
    assert_eq!(choose(&spec).0, Choice::Deliver(None), "to the subscription's own path");
    spec.path.clear();
    assert_eq!(choose(&spec).0, Choice::Skip, "there is none");
    assert!(
        Selector::of(&SubscriptionSpec { filter: None, routes: vec![], ..spec }).unwrap().is_none()
    );
}

#[test]
fn bad_expressions_are_refused_with_a_reason() {
    let cases = [
        (String::new(), "is empty"),
        ("event.type ==".to_owned(), "is not CEL"),
        ("event.type = 'a'".to_owned(), "is not CEL"),
        ("evnt.type == 'a'".to_owned(), "\"evnt\" is not known here"),
        ("event.data.exists(i, j == 1)".to_owned(), "\"j\" is not known here"),
        ("event.type.frobnicate() == 1".to_owned(), "there is no function \"frobnicate\""),
        ("frobnicate(event.type)".to_owned(), "there is no function \"frobnicate\""),
        (format!("event.type == '{}'", "x".repeat(MAX_EXPRESSION_BYTES)), "more than 2048"),
        (format!("{}1{} == 1", "(".repeat(500), ")".repeat(500)), "is not CEL"),
        (format!("0 == 1{}", " - 1".repeat(100)), "nested deeper"),
        (format!("{}true", "!".repeat(900)), ""),
        ("event.subject.matches('(')".to_owned(), "\"(\" is not a pattern: unclosed group"),
        ("event.subject.matches(event.type)".to_owned(), "must be written out"),
        ("event.subject.matches('a' + 'b')".to_owned(), "must be written out"),
        ("matches(event.subject)".to_owned(), "matches has one pattern"),
        (r"event.subject.matches('\\w{100}')".to_owned(), "takes more than 256 KiB"),
        (
            format!("{}true", r"event.id.matches('\\w{4}') || ".repeat(5)),
            "more than 1024 KiB together",
        ),
        ("event.?data.total == 1".to_owned(), "is not CEL"),
        ("optional.of(event) == event".to_owned(), "\"optional\" is not known here"),
        (format!("event{}", ".a".repeat(1000)), "nested deeper"),
        ("[".repeat(2000), "is not CEL"),
    ];
    for (source, expected) in cases {
        if expected.is_empty() {
            // Whatever it is taken for, nothing breaks.
            drop(Selector::filter(&source));
            continue;
        }
        let refusal = refusal(&source);
        assert!(refusal.contains(expected), "{source}: {refusal}");
    }
    let mut spec = spec("true");
    spec.routes = vec![Route { matches: "true".into(), path: "/a".into() }];
    spec.routes.push(Route { matches: "nope".into(), path: "/b".into() });
    let error = Selector::of(&spec).unwrap_err();
    assert_eq!((error.field.as_str(), error.route), ("routes[1].match", Some(1)));
    assert!(error.to_string().starts_with("routes[1].match: \"nope\" \"nope\" is not known"));
}

#[test]
fn the_deepest_expression_fits_a_workers_stack() {
    let deep = format!("-60 == 0{}", " - 1".repeat(60));
    let worker = std::thread::Builder::new().stack_size(1 << 20);
    let chosen = worker.spawn(move || choose(&deep, &event())).unwrap().join().unwrap();
    assert_eq!(chosen, (Choice::Deliver(None), None));
}

#[test]
fn loops_that_look_at_too_much_end_soon() {
    let items: Vec<u32> = (0..5000).collect();
    let large = event().with_data(serde_json::json!({"items": items}).to_string());
    let once = "event.data.items.exists(a, a == 4999)";
    assert_eq!(choose(once, &large), (Choice::Deliver(None), None));
    let nested =
        "event.data.items.all(a, event.data.items.all(b, event.data.items.all(c, a + b + c >= 0)))";
    let started = tokio::time::Instant::now();
    let (choice, problem) = choose(nested, &large);
    assert_eq!(choice, Choice::Skip);
    assert!(problem.unwrap().contains("too much data"));
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}

/// Each of them took the more time the more there was to look at, and nothing kept count of it.
#[test]
fn whatever_looks_at_much_is_paid_for() {
    let event = |items: usize, text: usize| {
        let items: Vec<_> =
            (0..items).map(|n| serde_json::json!({"n": n, "l": [n, [n]]})).collect();
        let data = serde_json::json!({"items": items, "text": "x1".repeat(text)});
        event().with_data(data.to_string())
    };
    let (small, large) = (event(3, 3), event(1500, 40_000));
    for what in [
        "event.data.items == event.data.items",
        "event.data.items != event.data.items",
        "event == event",
        "[event.data.items] == []",
        "{'a': event.data.items} == {}",
        "{event.data.text: 1} == {}",
        "event.data.items + [a] == []",
        "event.data.text + 'x' == ''",
        "event.data.text < event.data.text",
        "{'a': 1} in event.data.items",
        "event.data.text in {'a': 1}",
        "size(event.data.text) == 1",
        "event.data.text.size() == 1",
        "event.data.text.contains('y')",
        "event.data.text.endsWith(event.data.text)",
        "bytes(event.data.text) == b''",
        "event.data.text.matches('y')",
        "matches(event.data.text, 'y')",
        "event.data.items.map(b, b) == []",
        "event.data.items.exists_one(b, b == 1)",
        "event.data.items.filter(b, true) == []",
        "event.data.items.exists(b, b.n == -1)",
        "event.data.items.map(b, b.n < 0, event.data.text) == []",
    ] {
        let filter = format!("event.data.items.all(a, {what} || true)");
        assert_eq!(choose(&filter, &small), (Choice::Deliver(None), None), "{filter}");
        let (choice, problem) = choose(&filter, &large);
        let problem = problem.unwrap_or_default();
        assert_eq!(choice, Choice::Skip, "{filter}");
        assert!(problem.contains("too much data"), "{filter}: {problem}");
    }
    // So are steps that look at nothing.
    let steps = format!("event.data.items.exists(a, {}a == 1)", "1 == 2 || ".repeat(60));
    assert!(choose(&steps, &large).1.unwrap().contains("too much data"));
    let doubling = format!("size(['{}']{}) == 1", "x".repeat(100), ".map(x, x + x)".repeat(18));
    assert!(choose(&doubling, &small).1.unwrap().contains("too much data"));
    let doubling = doubling.replacen(".map(x, x + x)", "", 8);
    assert_eq!(choose(&doubling, &small), (Choice::Deliver(None), None));
}

#[test]
fn what_a_search_may_cost_is_known_before() {
    let text = |bytes: usize| {
        let event = event().with_data("1".repeat(bytes));
        event.with_attribute("datacontenttype", "text/plain").unwrap()
    };
    for (pattern, fits, too_much) in [
        ("^order.(placed|paid)$", 5_000, 50_000),
        (r"\\d{3}x", 300, 5_000),
        // Slow, if it were to look at much.
        ("([01]?){500}x", 100, 1_000),
    ] {
        let filter = format!("event.data.matches('{pattern}') || true");
        assert_eq!(choose(&filter, &text(fits)), (Choice::Deliver(None), None), "{pattern}");
        let filter = format!("event.data.matches('{pattern}')");
        let problem = choose(&filter, &text(too_much)).1.unwrap();
        assert!(problem.contains("too much data"), "{pattern}: {problem}");
    }
}

#[test]
fn all_expressions_of_a_subscription_pay_from_one_account() {
    let items: Vec<u32> = (0..1000).collect();
    let large = event().with_data(serde_json::json!({"items": items}).to_string());
    let matches = "event.data.items.exists(a, a == -1)";
    let mut spec = SubscriptionSpec { filter: None, ..spec("true") };
    for (routes, enough) in [(3, true), (64, false)] {
        spec.routes = vec![Route { matches: matches.into(), path: "/a".into() }; routes];
        let problem = Selector::of(&spec).unwrap().unwrap().choose(&large).1;
        assert_eq!(problem.is_none(), enough, "{problem:?}");
    }
    spec.routes =
        vec![Route { matches: format!("true{}", " ".repeat(300)), path: "/a".into() }; 64];
    let error = Selector::of(&spec).unwrap_err();
    assert_eq!(error.route, Some(53));
    assert!(error.reason.contains("longer than 16384 bytes together"), "{error}");
}

proptest! {
    #[test]
    fn no_text_breaks_the_compiler(source in "\\PC{0,60}") {
        drop(Selector::filter(&source));
    }

    #[test]
    fn nothing_that_compiles_breaks_on_an_event(
        source in prop::sample::select(vec!["event", "event.data", "event.data.total", "event.time", "'x'", "1", "[1]", "{'a': 1}", "null"]),
        operator in prop::sample::select(vec!["==", "<", "+", "-", "*", "/", "%", "in", "&&", "||"]),
        other in prop::sample::select(vec!["event", "event.data.items", "event.id", "0", "-1", "''", "b'x'", "9223372036854775807"]),
    ) {
        if let Ok(Some(selector)) = Selector::of(&spec(&format!("({source} {operator} {other}) == true"))) {
            drop(selector.choose(&event()));
        }
    }
}
