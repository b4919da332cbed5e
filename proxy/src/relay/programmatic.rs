//! What an application answers to `GET /dapr/subscribe`, in Dapr's shape, as subscriptions of the mesh. Pure.

use std::collections::BTreeMap;

use duet_api::DEFAULT_BUS;
use duet_api::proto;
use duet_events::AnyCase;
use serde::Deserialize;

use super::publish::options::flag;

/// Dapr has no limit by default; the mesh's defaults apply.
pub(super) const DEFAULT_ATTEMPTS: u32 = 10;
/// Dapr's defaults of a bulk subscription.
const BULK_EVENTS: u32 = 100;
const BULK_WAIT_MS: u32 = 1000;
/// Most events of one bulk, as the bus has it.
const MAX_BULK_EVENTS: u32 = 10_000;
/// Deliveries open at once, unless a bulk is larger.
const MAX_IN_FLIGHT: u32 = 64;

/// One entry of the answer: to be read as [`AnyCase`].
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Programmatic {
    pub(super) pubsubname: String,
    pub(super) topic: String,
    route: Option<String>,
    routes: Option<AnyCase<Routes>>,
    dead_letter_topic: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    bulk_subscribe: Option<AnyCase<Bulk>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bulk {
    enabled: Option<bool>,
    // Any number: what makes no sense means the default.
    max_messages_count: Option<i64>,
    max_await_duration_ms: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct Routes {
    default: Option<String>,
    rules: Option<Vec<AnyCase<Rule>>>,
}

#[derive(Debug, Deserialize)]
struct Rule {
    #[serde(rename = "match")]
    matches: Option<String>,
    path: String,
}

impl Programmatic {
    /// As the bus knows it, for a replica of `service`.
    pub(super) fn subscription(
        self,
        namespace: &str,
        service: &str,
    ) -> Result<proto::Subscription, &'static str> {
        let (default, rules) = self.routes.map_or((None, None), |AnyCase(r)| (r.default, r.rules));
        let rules = rules.unwrap_or_default();
        let given = |path: &String| !path.is_empty();
        let path = self.route.filter(given).or(default.filter(given));
        if path.is_none() && rules.is_empty() {
            return Err("it has no route");
        }
        let mut routes = Vec::with_capacity(rules.len());
        for AnyCase(rule) in rules {
            let matches = rule.matches.filter(|matches| !matches.is_empty());
            let matches = matches.ok_or("a rule of its routes has no match")?;
            routes.push(proto::EventRoute { r#match: matches, path: absolute(rule.path) });
        }
        let mut raw_payload = false;
        for (key, value) in self.metadata.iter().flatten() {
            match key.as_str() {
                "rawPayload" | "isRawPayload" => {
                    raw_payload = flag(value).map_err(|_reason| "its rawPayload is no boolean")?;
                }
                _ => {
                    tracing::info!(
                        topic = self.topic,
                        key,
                        "metadata of a subscription is ignored"
                    );
                }
            }
        }
        let bulk = self.bulk_subscribe.filter(|AnyCase(bulk)| bulk.enabled == Some(true));
        let (bulk_max, bulk_wait) = bulk.map_or((0, None), |AnyCase(bulk)| {
            let max = count(bulk.max_messages_count, BULK_EVENTS).min(MAX_BULK_EVENTS);
            (max, Some(wire(count(bulk.max_await_duration_ms, BULK_WAIT_MS))))
        });
        Ok(proto::Subscription {
            name: name(namespace, service, (&self.pubsubname, &self.topic)),
            bus: self.pubsubname,
            topic: self.topic,
            path: path.map(absolute).unwrap_or_default(),
            max_in_flight: MAX_IN_FLIGHT.max(bulk_max),
            max_attempts: DEFAULT_ATTEMPTS,
            dead_letter_topic: self.dead_letter_topic.unwrap_or_default(),
            raw_payload,
            routes,
            bulk_max,
            bulk_wait,
            ..proto::Subscription::default()
        })
    }
}

/// Name of an application's own subscription to a topic of a bus: there is one.
pub(super) fn name(namespace: &str, service: &str, (bus, topic): (&str, &str)) -> String {
    match bus {
        DEFAULT_BUS => format!("{namespace}/{service}.{topic}"),
        bus => format!("{namespace}/{service}.{bus}.{topic}"),
    }
}

fn absolute(path: String) -> String {
    if path.starts_with('/') { path } else { format!("/{path}") }
}

/// As Dapr has it: what is not above zero is the default.
fn count(given: Option<i64>, default: u32) -> u32 {
    let given = given.filter(|given| *given > 0);
    given.map_or(default, |given| u32::try_from(given).unwrap_or(u32::MAX))
}

fn wire(ms: u32) -> prost_types::Duration {
    let nanos = i32::try_from(ms % 1000).unwrap_or_default() * 1_000_000;
    prost_types::Duration { seconds: (ms / 1000).into(), nanos }
}

#[cfg(test)]
mod tests {
    use duet_events::bus::SubscriptionSpec;
    use serde_json::json;

    use super::*;

    fn read(entry: &serde_json::Value) -> Result<SubscriptionSpec, &'static str> {
        let AnyCase(entry) =
            serde_json::from_str::<AnyCase<Programmatic>>(&entry.to_string()).unwrap();
        entry.subscription("shop", "reader").map(|raw| raw.try_into().unwrap())
    }

    #[test]
    fn routes_bulk_and_metadata_are_taken_over() {
        let spec = read(&json!({
            "pubsubname": "default", "topic": "orders", "deadLetterTopic": "poison",
            "routes": {"rules": [{"match": "event.type == 'a'", "path": "a"}], "default": "/rest"},
            "bulkSubscribe": {"enabled": true, "maxMessagesCount": 500, "maxAwaitDurationMs": 40},
            "metadata": {"rawPayload": "true", "other": "x"},
        }))
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.path.as_str()), ("shop/reader.orders", "/rest"));
        assert_eq!(
            (spec.routes[0].path.as_str(), spec.dead_letter_topic.as_str()),
            ("/a", "poison")
        );
        let bulk = spec.bulk.unwrap();
        assert_eq!((bulk.max, bulk.wait.as_millis(), spec.max_in_flight), (500, 40, 500));
        assert!(spec.raw_payload);
    }

    #[test]
    fn dapr_defaults_hold_and_nonsense_is_refused() {
        let bulk = json!({"pubsubname": "other", "topic": "t", "route": "x", "bulkSubscribe": {"enabled": true}});
        let spec = read(&bulk).unwrap();
        assert_eq!((spec.name.as_str(), spec.path.as_str()), ("shop/reader.other.t", "/x"));
        let bulk = spec.bulk.unwrap();
        assert_eq!((bulk.max, bulk.wait.as_secs()), (100, 1));
        assert!(read(&json!({"pubsubname": "default", "topic": "t"})).is_err());
        let rule = json!({"rules": [{"path": "/a"}]});
        assert!(read(&json!({"pubsubname": "default", "topic": "t", "routes": rule})).is_err());
    }

    #[test]
    fn the_entries_of_every_sdk_are_read() {
        for (sdk, entry) in [
            (".NET", json!({"topic": "orders", "pubsubName": "pubsub", "route": "orders"})),
            (
                ".NET with rules",
                json!({"topic": "orders", "pubsubName": "pubsub", "routes": {"rules": [
                    {"match": "event.type == 'a'", "path": "a"}], "default": "orders"},
                    "metadata": {"k": "v"}, "deadLetterTopic": "dead",
                    "bulkSubscribe": {"enabled": false, "maxMessagesCount": 100, "maxAwaitDurationMs": 1000}}),
            ),
            (
                "Java",
                json!({"pubsubName": "pubsub", "topic": "orders", "route": "/orders", "deadLetterTopic": null,
                    "routes": null, "metadata": {}, "bulkSubscribe": null}),
            ),
            (
                "JavaScript",
                json!({"pubsubname": "pubsub", "topic": "orders", "metadata": null, "route": "",
                    "routes": {"default": "/orders", "rules": null}, "deadLetterTopic": ""}),
            ),
            (
                "Go, without tags",
                json!({"PubsubName": "pubsub", "Topic": "orders", "Routes": {"Default": "/orders",
                    "Rules": [{"Match": "true", "Path": "/x"}]}}),
            ),
        ] {
            let spec = read(&entry).unwrap();
            assert_eq!(
                (&*spec.bus, &*spec.topic, &*spec.path),
                ("pubsub", "orders", "/orders"),
                "{sdk}"
            );
        }
    }

    #[test]
    fn enabled_alone_decides_about_bulk() {
        for (count, max) in
            [(1, 1), (2, 2), (0, 100), (-7, 100), (10_001, 10_000), (i64::MAX, 10_000)]
        {
            let bulk =
                json!({"enabled": true, "maxMessagesCount": count, "maxAwaitDurationMs": -1});
            let spec = read(
                &json!({"pubsubname": "p", "topic": "t", "route": "x", "bulkSubscribe": bulk}),
            );
            let bulk = spec.unwrap().bulk.unwrap();
            assert_eq!((bulk.max, bulk.wait.as_secs()), (max, 1), "{count}");
        }
        let off = json!({"enabled": false, "maxMessagesCount": 10});
        let spec =
            read(&json!({"pubsubname": "p", "topic": "t", "route": "x", "BulkSubscribe": off}));
        assert_eq!(spec.unwrap().bulk, None);
    }
}
