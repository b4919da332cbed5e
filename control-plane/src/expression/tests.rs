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
    Expression::compile(source).unwrap_err()
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
fn what_cannot_be_evaluated_does_not_match_and_says_why() {
    let cases = [
        ("event.data.missing > 1", "the event has no \"missing\" there"),
        ("event.nothing == 'a'", "the event has no \"nothing\" there"),
        ("event.data.total", "the result is a int, not a bool"),
        ("event.type > 1", "no matching overload"),
        ("1 / 0 == 1", "Division by zero"),
        ("event.subject.matches('(')", "matches"),
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
        assert_eq!(Expression::compile(source).unwrap().wants_data, wanted, "{source}");
    }
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
        (format!("event.type == '{}'", "x".repeat(MAX_BYTES)), "more than 2048"),
        (format!("{}1{} == 1", "(".repeat(500), ")".repeat(500)), "is not CEL"),
        (format!("0 == 1{}", " - 1".repeat(100)), "nested deeper"),
        (format!("{}true", "!".repeat(900)), ""),
        (format!("'a' == 'b'{}", " + 'b'".repeat(20)), "adds more than"),
        (format!("event{}", ".a".repeat(1000)), "nested deeper"),
        ("[".repeat(2000), "is not CEL"),
    ];
    for (source, expected) in cases {
        if expected.is_empty() {
            // Whatever it is taken for, nothing breaks.
            drop(Expression::compile(&source));
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
    let doubling = format!("size(['{}']{}) == 1", "x".repeat(100), ".map(x, x + x)".repeat(14));
    assert_eq!(choose(&doubling, &event()), (Choice::Deliver(None), None));
}

proptest! {
    #[test]
    fn no_text_breaks_the_compiler(source in "\\PC{0,60}") {
        drop(Expression::compile(&source));
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
