//! Resources of Dapr. They are not read, and whoever moves an application over must not have to find out by what does
//! not happen: each is named, with what to write instead.

use std::fmt::Write as _;

use serde_yaml::Value;

use super::{Field, Origin, ParseError};

/// API group of Dapr's kinds.
pub(super) const GROUP: &str = "dapr.io";
/// What stands for something that only the reader knows; no name and no path of ours, so that it cannot stay.
const SERVICE: &str = "SERVICE";

/// What to write instead of a document of Dapr.
pub(super) fn instead(origin: &Origin, kind: &str) -> ParseError {
    let document = serde_yaml::from_str(&origin.text).unwrap_or(Value::Null);
    let text = match kind {
        "Subscription" => subscription(&document),
        "Component" => component(&document),
        "Resiliency" => "timeouts, retries and circuit breakers of calls are a TrafficPolicy of the service \
                         that is called, those of events are delivery and retry of a Subscription: docs/resources.md"
            .to_owned(),
        "Configuration" => configuration(&document),
        "HTTPEndpoint" => {
            "an application calls what is outside the mesh itself, not through its sidecar".to_owned()
        }
        _ => "there is nothing of this kind here: docs/dapr.md".to_owned(),
    };
    let article = if kind.starts_with(['H', 'M']) { "an" } else { "a" };
    origin.error(&[Field::Name("kind")], format!("{article} {kind} of Dapr is not read; {text}"))
}

/// The same subscription in Duet's words, on one line, for the first application that has it.
fn subscription(document: &Value) -> String {
    let spec = |path: &[&str]| word(document, &[&["spec"], path].concat());
    let (routes, last) = routes(document);
    let default = spec(&["route"]).or_else(|| spec(&["routes", "default"])).or(last);
    let scopes: Vec<String> =
        list(document, &["scopes"]).iter().filter_map(|scope| word(scope, &[])).collect();
    let (first, others) =
        scopes.split_first().map_or((SERVICE, &[][..]), |(first, others)| (first, others));

    let mut metadata =
        format!("name: {}", scalar(&word(document, &["metadata", "name"]).unwrap_or_default()));
    let namespace = word(document, &["metadata", "namespace"]);
    add(&mut metadata, "namespace", namespace.as_deref().map(scalar));
    let mut subscriber = format!("service: {}", scalar(first));
    add(&mut subscriber, "path", default.as_deref().map(path));
    let mut fields = String::new();
    add(&mut fields, "bus", spec(&["pubsubname"]).as_deref().map(scalar));
    add(&mut fields, "topic", spec(&["topic"]).as_deref().map(scalar));
    add(&mut fields, "subscriber", Some(format!("{{{subscriber}}}")));
    add(&mut fields, "routes", Some(routes).filter(|routes| !routes.is_empty()));
    add(&mut fields, "deadLetterTopic", spec(&["deadLetterTopic"]).as_deref().map(scalar));
    add(&mut fields, "bulk", bulk(document));
    let raw = spec(&["metadata", "rawPayload"]).filter(|raw| raw.eq_ignore_ascii_case("true"));
    add(&mut fields, "rawPayload", raw.map(|_true| "true".to_owned()));

    let mut text = format!(
        "what an application subscribes to by itself needs nothing, and this one becomes \
         {{apiVersion: {}, kind: Subscription, metadata: {{{metadata}}}, spec: {{{fields}}}}}",
        crate::resource::API_VERSION
    );
    if scopes.is_empty() {
        text.push_str(", for each application that serves the path");
    } else if !others.is_empty() {
        // Writing to a string does not fail.
        let _infallible = write!(text, ", and the same under other names for {}", sequence(others));
    }
    text
}

/// Rules up to the first without a condition, which is Dapr's other way of saying the default.
fn routes(document: &Value) -> (String, Option<String>) {
    let mut routes = Vec::new();
    for rule in list(document, &["spec", "routes", "rules"]) {
        let to = word(rule, &["path"]).unwrap_or_default();
        let Some(condition) = word(rule, &["match"]) else {
            return (sequence(&routes), Some(to));
        };
        routes.push(format!("{{match: {}, path: {}}}", scalar(&condition), path(&to)));
    }
    (sequence(&routes), None)
}

fn sequence(items: &[String]) -> String {
    if items.is_empty() { String::new() } else { format!("[{}]", items.join(", ")) }
}

fn bulk(document: &Value) -> Option<String> {
    let said = |name| word(document, &["spec", "bulkSubscribe", name]);
    said("enabled").filter(|enabled| enabled == "true")?;
    let mut bulk = String::new();
    // Ours are two events at least.
    let several = |max: &String| max.parse::<u32>().is_ok_and(|max| max > 1);
    add(&mut bulk, "max", said("maxMessagesCount").filter(several));
    add(&mut bulk, "wait", said("maxAwaitDurationMs").map(|wait| format!("{wait}ms")));
    Some(format!("{{{bulk}}}"))
}

fn component(document: &Value) -> String {
    let kind = word(document, &["spec", "type"]).unwrap_or_default();
    if kind.starts_with("state.") {
        return "Duet keeps no state of applications; instead of the outbox of a state store see docs/outbox.md"
            .to_owned();
    }
    if !kind.starts_with("pubsub.") {
        return format!("there is nothing like {kind:?} here: docs/dapr.md");
    }
    let name = word(document, &["metadata", "name"]).unwrap_or_default();
    let mut text = format!(
        "a pub/sub component is an event bus of the same name: {{apiVersion: {}, kind: EventBus, \
         metadata: {{name: {}}}, spec: {{backend: {{embedded: {{}}}}}}}}, or one on NATS: docs/nats.md",
        crate::resource::API_VERSION,
        scalar(&name)
    );
    let scoping = ["allowedTopics", "protectedTopics", "publishingScopes", "subscriptionScopes"];
    let named =
        |item: &Value| word(item, &["name"]).is_some_and(|name| scoping.contains(&name.as_str()));
    let fields = list(document, &["spec", "metadata"]);
    if !list(document, &["scopes"]).is_empty() || fields.iter().any(named) {
        text.push_str(
            ". Its scopes do not count: who may use a topic is said by an AuthorizationPolicy",
        );
    }
    text
}

fn configuration(document: &Value) -> String {
    let mut text = "mutual TLS, metrics and the passing on of trace contexts need none".to_owned();
    if at(document, &["spec", "accessControl"]).is_some() {
        text.push_str(
            ". Its accessControl does not count: services are open to all callers in the mesh, and an \
             AuthorizationPolicy is for topics",
        );
    }
    text
}

fn at<'v>(value: &'v Value, path: &[&str]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, name| value.get(*name))
}

fn list<'v>(value: &'v Value, path: &[&str]) -> &'v [Value] {
    at(value, path).and_then(Value::as_sequence).map_or(&[], Vec::as_slice)
}

/// A scalar as text, however it is written; nothing for an empty one.
fn word(value: &Value, path: &[&str]) -> Option<String> {
    let text = match at(value, path)? {
        Value::String(text) => text.trim().to_owned(),
        Value::Number(number) => number.to_string(),
        Value::Bool(yes) => yes.to_string(),
        Value::Null | Value::Sequence(_) | Value::Mapping(_) | Value::Tagged(_) => return None,
    };
    Some(text).filter(|text| !text.is_empty())
}

/// Adds a field to the inside of a flow mapping.
fn add(mapping: &mut String, name: &str, value: Option<String>) {
    if let Some(value) = value {
        let comma = if mapping.is_empty() { "" } else { ", " };
        mapping.extend([comma, name, ": ", &value]);
    }
}

/// Dapr takes a path without the slash, too.
fn path(text: &str) -> String {
    scalar(&format!("/{}", text.trim_start_matches('/')))
}

/// A string as YAML takes it between braces, on one line.
fn scalar(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
    let first = |c: char| c.is_ascii_alphanumeric() || c == '/';
    let reads_the_same = || serde_yaml::from_str(text).is_ok_and(|value: Value| value == *text);
    if text.starts_with(first) && text.chars().all(plain) && reads_the_same() {
        return text.to_owned();
    }
    if text.chars().any(char::is_control) {
        // Double quotes take line breaks as JSON writes them. Without them, a comment would have no end.
        return serde_json::Value::from(text).to_string();
    }
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use crate::resource::{Parsed, Resource, Subscription, parse};

    fn finding(text: &str) -> String {
        let parsed = parse("mesh/dapr.yaml", text);
        assert_eq!((parsed.resources.len(), parsed.errors), (0, vec![]));
        assert_eq!(parsed.warnings.len(), 1);
        parsed.warnings[0].to_string()
    }

    /// What stands between the outermost braces, as a document of its own.
    fn document(finding: &str) -> String {
        let (start, end) = (finding.find('{').unwrap(), finding.rfind('}').unwrap());
        finding[start..=end].to_owned()
    }

    fn subscription(text: &str) -> Subscription {
        let Parsed { mut resources, errors, .. } = parse("new.yaml", text);
        assert_eq!(errors, [], "{text}");
        let Some(Resource::Subscription(subscription)) = resources.pop().map(|at| at.resource)
        else {
            panic!("{text}");
        };
        subscription
    }

    const WHOLE: &str = r#"# of the old mesh
---
apiVersion: dapr.io/v2alpha1
kind: Subscription
metadata:
  name: order
  namespace: shop
spec:
  pubsubname: pubsub
  topic: orders
  routes:
    rules:
      - match: |
          event.type == "widget" && // and "this"
          event.data.note == 'it''s, {new}'
        path: widgets
    default: /orders
  deadLetterTopic: poison
  bulkSubscribe: {enabled: true, maxMessagesCount: 50, maxAwaitDurationMs: 40}
  metadata: {rawPayload: "true"}
scopes: [checkout, audit]
"#;

    #[test]
    fn a_subscription_is_told_in_duets_words() {
        let found = finding(WHOLE);
        assert!(
            found.starts_with("mesh/dapr.yaml:4:7: kind: a Subscription of Dapr is not read; "),
            "{found}"
        );
        assert!(found.ends_with("}, and the same under other names for [audit]"), "{found}");
        assert!(!found.contains('\n'), "{found}");
        let same = r#"apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: order, namespace: shop}
spec:
  bus: pubsub
  topic: orders
  subscriber: {service: checkout, path: /orders}
  routes:
  - match: |-
      event.type == "widget" && // and "this"
      event.data.note == 'it''s, {new}'
    path: /widgets
  deadLetterTopic: poison
  bulk: {max: 50, wait: 40ms}
  rawPayload: true
"#;
        assert_eq!(subscription(&document(&found)), subscription(same));
    }

    #[test]
    fn the_older_version_and_a_rule_without_a_condition_say_the_path_in_other_ways() {
        let old = "apiVersion: dapr.io/v1alpha1\nkind: Subscription\nmetadata: {name: order}\n\
                   spec: {pubsubname: pubsub, topic: '7', route: /orders}\nscopes: [checkout]\n";
        let now = subscription(&document(&finding(old)));
        assert_eq!((now.spec.topic.as_str(), now.spec.subscriber.path.as_str()), ("7", "/orders"));
        assert!(now.spec.bulk.is_none() && !now.spec.raw_payload && now.spec.routes.is_empty());
        let open = old.replace(
            "route: /orders",
            "routes: {rules: [{match: 'true', path: /a}, {path: /b}, {match: 'true', path: /c}]}",
        );
        let now = subscription(&document(&finding(&open)));
        assert_eq!((now.spec.subscriber.path.as_str(), now.spec.routes.len()), ("/b", 1));
        assert_eq!(now.spec.routes[0].matches, "true");
    }

    #[test]
    fn what_only_the_reader_knows_does_not_pass_for_a_name() {
        let nobody = WHOLE.replace("scopes: [checkout, audit]\n", "");
        let found = finding(&nobody);
        assert!(found.ends_with("}, for each application that serves the path"), "{found}");
        let parsed = parse("new.yaml", &document(&found));
        assert!(parsed.errors[0].to_string().contains("SERVICE"), "{:?}", parsed.errors);
        // Whatever it is, it is named.
        for rest in
            ["", "spec: 1\nscopes: x\n", "metadata: [a]\nspec: {routes: {rules: [1, {}]}}\n"]
        {
            finding(&format!("apiVersion: dapr.io/v2alpha1\nkind: Subscription\n{rest}"));
        }
    }

    #[test]
    fn a_pub_sub_component_is_a_bus_and_other_kinds_say_where_to_look() {
        let of = |kind: &str, rest: &str| {
            finding(&format!(
                "apiVersion: dapr.io/v1alpha1\nkind: {kind}\nmetadata: {{name: pubsub}}\n{rest}"
            ))
        };
        let found = of("Component", "spec: {type: pubsub.redis, version: v1}\n");
        assert!(
            found.starts_with("mesh/dapr.yaml:2:7: kind: a Component of Dapr is not read; "),
            "{found}"
        );
        assert!(!found.contains("AuthorizationPolicy"), "{found}");
        let parsed = parse("new.yaml", &document(&found));
        assert_eq!(parsed.errors, []);
        assert!(
            matches!(&parsed.resources[0].resource, Resource::EventBus(bus) if bus.metadata.name == "pubsub")
        );
        // What kept others out says that it no longer does.
        let scoped =
            "spec: {type: pubsub.redis, metadata: [{name: publishingScopes, value: a=b}]}\n";
        for rest in [scoped, "spec: {type: pubsub.redis}\nscopes: [a]\n"] {
            assert!(of("Component", rest).contains("AuthorizationPolicy"), "{rest}");
        }
        assert!(of("Component", "spec: {type: state.redis}\n").contains("docs/outbox.md"));
        assert!(
            of("Component", "spec: {type: bindings.cron}\n")
                .contains("nothing like \"bindings.cron\"")
        );
        assert!(of("Resiliency", "").contains("TrafficPolicy"));
        let tracing = of("Configuration", "spec: {tracing: {samplingRate: '1'}}\n");
        assert!(!tracing.contains("accessControl"), "{tracing}");
        assert!(
            of("Configuration", "spec: {accessControl: {}}\n")
                .contains("accessControl does not count")
        );
        assert!(of("HTTPEndpoint", "").contains("an HTTPEndpoint of Dapr is not read"));
        assert!(of("MCPServer", "").contains("docs/dapr.md"));
    }
}
