//! What an application answers to `GET /dapr/subscribe`, in Dapr's shape, as subscriptions of the mesh. Pure.

use std::collections::BTreeMap;

use duet_api::DEFAULT_BUS;
use duet_api::proto;
use serde::Deserialize;

use super::publish::options::flag;

/// Dapr has no limit by default; the mesh's defaults apply.
pub(super) const DEFAULT_ATTEMPTS: u32 = 10;
/// Dapr's defaults of a bulk subscription.
const BULK_EVENTS: u32 = 100;
const BULK_WAIT_MS: u32 = 1000;
/// Deliveries open at once, unless a bulk is larger.
const MAX_IN_FLIGHT: u32 = 64;

/// One entry of the answer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Programmatic {
    pub(super) pubsubname: String,
    pub(super) topic: String,
    route: Option<String>,
    routes: Option<Routes>,
    dead_letter_topic: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    bulk_subscribe: Option<Bulk>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bulk {
    #[serde(default)]
    enabled: bool,
    max_messages_count: Option<u32>,
    max_await_duration_ms: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct Routes {
    default: Option<String>,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
struct Rule {
    #[serde(rename = "match", default)]
    matches: String,
    path: String,
}

impl Programmatic {
    /// As the bus knows it, for a replica of `service`.
    pub(super) fn subscription(
        self,
        namespace: &str,
        service: &str,
    ) -> Result<proto::Subscription, &'static str> {
        let (default, rules) =
            self.routes.map_or((None, Vec::new()), |routes| (routes.default, routes.rules));
        let path = self.route.or(default).filter(|path| !path.is_empty());
        if path.is_none() && rules.is_empty() {
            return Err("it has no route");
        }
        let mut routes = Vec::with_capacity(rules.len());
        for rule in rules {
            if rule.matches.is_empty() {
                return Err("a rule of its routes has no match");
            }
            let path = absolute(rule.path);
            routes.push(proto::EventRoute { r#match: rule.matches, path });
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
        let bulk = self.bulk_subscribe.filter(|bulk| bulk.enabled);
        let (bulk_max, bulk_wait) = bulk.map_or((0, None), |bulk| {
            let max = bulk.max_messages_count.filter(|max| *max > 0).unwrap_or(BULK_EVENTS);
            (max, Some(wire(bulk.max_await_duration_ms.unwrap_or(BULK_WAIT_MS))))
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

fn wire(ms: u32) -> prost_types::Duration {
    let nanos = i32::try_from(ms % 1000).unwrap_or_default() * 1_000_000;
    prost_types::Duration { seconds: (ms / 1000).into(), nanos }
}

#[cfg(test)]
mod tests {
    use duet_events::bus::SubscriptionSpec;
    use serde_json::json;

    use super::*;

    fn read(entry: serde_json::Value) -> Result<SubscriptionSpec, &'static str> {
        let entry: Programmatic = serde_json::from_value(entry).unwrap();
        entry.subscription("shop", "reader").map(|raw| raw.try_into().unwrap())
    }

    #[test]
    fn routes_bulk_and_metadata_are_taken_over() {
        let spec = read(json!({
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
        let spec = read(bulk).unwrap();
        assert_eq!((spec.name.as_str(), spec.path.as_str()), ("shop/reader.other.t", "/x"));
        let bulk = spec.bulk.unwrap();
        assert_eq!((bulk.max, bulk.wait.as_secs()), (100, 1));
        assert!(read(json!({"pubsubname": "default", "topic": "t"})).is_err());
        let rule = json!({"rules": [{"path": "/a"}]});
        assert!(read(json!({"pubsubname": "default", "topic": "t", "routes": rule})).is_err());
    }
}
