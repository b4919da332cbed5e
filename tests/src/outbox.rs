//! Applications with an outbox table, and what a bus holds in the end.

use serde_json::Value;

use crate::http;
use crate::mesh::ControlPlane;

/// The service `orders` and its outbox source; `spec` is YAML in braces, without them.
#[must_use]
pub fn resources(spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: orders}}\nspec: {{ports: [{{port: 80, targetPort: http}}]}}\n---\n\
         apiVersion: duet.dev/v1alpha1\nkind: OutboxSource\nmetadata: {{name: orders}}\nspec: {{service: orders, {spec}}}\n"
    )
}

/// Ids and keys of the events of a topic, in the order of their positions.
pub async fn stored(control_plane: &ControlPlane, topic: &str) -> Vec<(String, String)> {
    let client = http::client();
    let (mut found, mut from) = (Vec::new(), 0);
    loop {
        let url = format!(
            "http://{}/v1/events?bus=default&topic={topic}&from={from}&limit=500",
            control_plane.operator
        );
        let answer = client.get(url).header("duet-operator", "test").send().await.unwrap();
        if answer.status() == 404 {
            return found;
        }
        let answer: Value = answer.error_for_status().unwrap().json().await.unwrap();
        let next = answer["next"].as_u64().unwrap();
        let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let events = answer["events"].as_array().unwrap().iter().map(|stored| &stored["event"]);
        found.extend(events.map(|event| (text(event, "id"), text(event, "partitionkey"))));
        if next == from {
            return found;
        }
        from = next;
    }
}

/// Fails where an id is there twice, and where ids (numbers) of one key are not in order.
pub fn check_order(stored: &[(String, String)]) {
    let mut last = std::collections::HashMap::new();
    for (id, key) in stored {
        let id: u64 = id.parse().unwrap_or_else(|_| panic!("{id} was never committed"));
        let before = last.insert(key, id).unwrap_or(0);
        assert!(before < id, "{id} of {key} follows {before}");
    }
}
