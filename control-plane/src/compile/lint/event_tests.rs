use super::tests::errors;

/// The one error of a subscription, without the file.
fn subscription(spec: &str) -> String {
    let yaml = format!(
        "apiVersion: duet.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: s}}\nspec:\n  topic: t\n  {spec}"
    );
    one(&yaml)
}

fn policy(spec: &str) -> String {
    let yaml = format!(
        "apiVersion: duet.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {spec}"
    );
    one(&yaml)
}

/// Of parsing or of the lint, whichever finds it.
fn one(yaml: &str) -> String {
    let parsed = duet_api::resource::parse("a.yaml", yaml);
    let mut found: Vec<String> = parsed.errors.iter().map(ToString::to_string).collect();
    if found.is_empty() {
        found = errors(yaml);
    }
    assert!(found.len() <= 1, "{found:?}");
    found.into_iter().next().unwrap_or_default()
}

#[test]
fn good_subscriptions_pass() {
    for good in [
        "subscriber: {service: a, path: /e}",
        "subscriber: {service: a}\n  routes: [{match: 'event.type == \"a\"', path: /a}]",
        "subscriber: {service: a, path: /e}\n  filter: 'has(event.data.x)'\n  bulk: {}\n  broadcast: true",
        "subscriber: {service: a, path: /e}\n  start: {time: '2026-01-31T12:00:00Z'}",
        "subscriber: {service: a, path: /e}\n  start: {position: 7}\n  delivery: {ordered: true, once: true}\n  bulk: {max: 10, wait: 5ms}",
    ] {
        assert_eq!(subscription(good), "", "{good}");
    }
}

#[test]
fn what_is_wrong_with_a_subscription_is_named() {
    let of = |more: &str| format!("subscriber: {{service: a, path: /e}}\n  {more}");
    let cases = [
        ("subscriber: {service: a}".to_owned(), "spec.subscriber.path: a path is needed"),
        (of("filter: 'event.type ='"), "a.yaml:7:11: spec.filter: \"event.type =\" is not CEL"),
        (of("filter: 'type == 1'"), ""),
        (of("filter: 'kind == 1'"), "spec.filter: \"kind == 1\" \"kind\" is not known here"),
        (
            "subscriber: {service: a}\n  routes:\n  - {match: 'true', path: /a}\n  - {match: 'no', path: /b}".to_owned(),
            "a.yaml:9:13: spec.routes[1].match: \"no\" \"no\" is not known here",
        ),
        ("subscriber: {service: a}\n  routes: [{match: 'true'}]".to_owned(), "missing field `path`"),
        (
            format!("subscriber: {{service: a}}\n  routes: [{}]", "{match: 'true', path: /a},".repeat(65)),
            "a.yaml:7:11: spec.routes: routes has 65 entries, more than 64",
        ),
        (
            of("filter: 'event.id.matches(event.type)'"),
            "spec.filter: \"event.id.matches(event.type)\" the pattern of matches must be written out",
        ),
        (of("start: soon"), "spec.start: invalid value: string \"soon\", expected latest, earliest, {time"),
        (of("start: {time: noon}"), "spec.start.time: \"noon\" is not an RFC 3339 time"),
        (of("start: {at: 1}"), "unknown field `at`"),
        (of("start: {}"), "a time or a position is missing"),
        (of("start: {position: 1, time: '2026-01-31T12:00:00Z'}"), "either a time or a position"),
        (of("bulk: {max: 1}"), "spec.bulk.max: max must be 2 to 10000, not 1"),
        (of("bulk: {wait: 5}"), "spec.bulk.wait"),
        (of("broadcast: true\n  start: earliest"), "spec.start: every replica of a broadcast starts"),
        (of("delivery: {orderd: true}"), "unknown field `orderd`"),
    ];
    for (spec, expected) in cases {
        let error = subscription(&spec);
        assert!(
            error.contains(expected) && error.is_empty() == expected.is_empty(),
            "{spec}: {error}"
        );
    }
}

#[test]
fn what_is_wrong_with_an_authorization_policy_is_named() {
    let of = |more: &str| format!("{{targetRefs: [{{kind: Topic, name: t}}], {more}}}");
    let cases = [
        (of("rules: [{}]"), ""),
        (
            of(
                "action: Audit, rules: [{from: [{namespaces: ['*'], identities: ['spiffe://a/ns/b/*']}], to: [{operations: [publish]}]}]",
            ),
            "",
        ),
        ("{rules: []}".to_owned(), "missing field `targetRefs`"),
        ("{targetRefs: []}".to_owned(), "spec.targetRefs: a policy without a target"),
        (
            "{targetRefs: [{kind: Service, name: a}]}".to_owned(),
            "spec.targetRefs[0].kind: an AuthorizationPolicy cannot protect a Service yet, only a Topic",
        ),
        ("{targetRefs: [{kind: Pod, name: a}]}".to_owned(), "protects a Topic, not \"Pod\""),
        ("{targetRefs: [{kind: Topic, name: 'a b'}]}".to_owned(), "spec.targetRefs[0].name"),
        ("{targetRefs: [{kind: Topic, name: 'a.*'}]}".to_owned(), "names each topic"),
        (
            "{targetRefs: [{kind: Topic, group: apps, name: a}]}".to_owned(),
            "spec.targetRefs[0].group",
        ),
        (of("action: allow"), "spec.action: unknown variant `allow`"),
        (of("rules: [{from: [{}]}]"), "spec.rules[0].from[0]: identities or namespaces"),
        (
            of("rules: [{from: [{identities: [orders]}]}]"),
            "rules[0].from[0].identities[0]: \"orders\" is not a SPIFFE id",
        ),
        (
            of("rules: [{from: [{namespaces: ['*a']}]}]"),
            "namespaces[0]: \"*a\": a '*' stands at the end only",
        ),
        (of("rules: [{to: [{operations: [read]}]}]"), "operations[0]: unknown variant `read`"),
        (of("rules: [{to: [{methods: [GET]}]}]"), "unknown field `methods`"),
    ];
    for (spec, expected) in cases {
        let error = policy(&spec);
        assert!(
            error.contains(expected) && error.is_empty() == expected.is_empty(),
            "{spec}: {error}"
        );
    }
}

/// The one error of an outbox source.
fn outbox_source(spec: &str) -> String {
    one(&format!(
        "apiVersion: duet.dev/v1alpha1\nkind: OutboxSource\nmetadata: {{name: o}}\nspec:\n  service: a\n  {spec}"
    ))
}

#[test]
fn good_outbox_sources_pass() {
    for good in [
        "database: {url: 'sqlite:///var/lib/a/a.db'}",
        "database: {url: 'postgres://app@db:5432/app?sslmode=verify-full'}\n  table: events.outbox",
        "database: {urlFrom: {env: DATABASE_URL}}\n  topic: orders.placed\n  type: placed",
        "database: {urlFrom: {file: /run/secrets/url}}\n  afterRelay: {mark: relayed_at}\n  poll: 1s",
        "database: {url: 'sqlite:a.db'}\n  afterRelay: delete\n  columns: {data: body, partitionKey: customer}",
    ] {
        assert_eq!(outbox_source(good), "", "{good}");
    }
}

#[test]
fn what_is_wrong_with_an_outbox_source_is_named() {
    let of = |more: &str| format!("database: {{urlFrom: {{env: URL}}}}\n  {more}");
    let cases = [
        ("table: outbox".to_owned(), "missing field `database`"),
        ("database: {}".to_owned(), "spec.database: one of url and urlFrom is needed"),
        ("database: {url: 'sqlite:a.db', urlFrom: {env: A}}".to_owned(), "one of url and urlFrom"),
        ("database: {urlFrom: {}}".to_owned(), "urlFrom needs one of env and file"),
        (
            "database: {url: 'mysql://db/app'}".to_owned(),
            "spec.database.url: the URL starts with sqlite:",
        ),
        (
            "database: {url: 'postgres://app:secret@db/app'}".to_owned(),
            "spec.database.url: a password does not belong into a resource",
        ),
        (
            "database: {url: 'postgres://app@db/app?password=secret'}".to_owned(),
            "a password does not belong into a resource",
        ),
        (of("table: a.b.c"), "spec.table: \"a.b.c\" is neither TABLE nor SCHEMA.TABLE"),
        (of("table: ''"), "spec.table: \"\" is not a name"),
        (of("poll: 1ms"), "spec.poll: poll must be 10ms to 1m, not 1ms"),
        (
            of("afterRelay: keep"),
            "spec.afterRelay: invalid value: string \"keep\", expected delete or {mark",
        ),
        (of("afterRelay: {}"), "the column to mark is missing"),
        (of("columns: {key: a}"), "spec.columns.key: unknown field `key`"),
        (of("topic: 'a b'"), "spec.topic: \"a b\" cannot be a topic's name"),
        (of("topic: a\n  columns: {topic: t}"), "spec.columns.topic: the topic is given already"),
        (of("source: 'a b'"), "spec.source: attribute source: is not a URI reference"),
        (of("dataContentType: json"), "spec.dataContentType: attribute datacontenttype"),
    ];
    for (spec, expected) in cases {
        let error = outbox_source(&spec);
        assert!(error.contains(expected), "{spec}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
}
