//! What a NATS server says of itself on its monitoring port. Imports nothing of the crate.

use std::time::Duration;

use duet_api::resource::NatsBackend;
use duet_events::nats::payload_warning;

/// Bound on one answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Largest answer that is read.
const MAX_BYTES: u64 = 1 << 20;

/// What is not as it should be: an acknowledged event must survive the loss of power. Blocks for some seconds at most.
#[must_use]
pub fn durability(nats: &NatsBackend) -> Vec<String> {
    if nats.monitor_urls.is_empty() {
        let text = "whether the servers flush before they acknowledge is not known: give monitorUrls; see docs/nats.md";
        return vec![text.to_owned()];
    }
    let judged = nats.monitor_urls.iter().map(|url| match flushes(url) {
        Ok(true) => None,
        Ok(false) => Some(format!(
            "{url}: the server acknowledges events that are not on disk yet, and loses them with its machine: set \
             `sync_interval: always` in its jetstream block; see docs/nats.md"
        )),
        Err(reason) => Some(format!("{url}: whether the server flushes before it acknowledges is not known: {reason}")),
    });
    judged.flatten().collect()
}

/// Which servers take less than sidecars do. A connection tells the same. Blocks for some seconds at most.
#[must_use]
pub fn payload(nats: &NatsBackend) -> Vec<String> {
    let judged = nats.monitor_urls.iter().filter_map(|url| {
        // One that does not answer is told of by `durability`.
        let warning = payload_warning(max_payload(&ask(url, "varz").ok()?)?)?;
        Some(format!("{url}: {warning}"))
    });
    judged.collect()
}

fn max_payload(text: &str) -> Option<u64> {
    let answer: serde_json::Value = serde_json::from_str(text).ok()?;
    answer.get("max_payload")?.as_u64()
}

/// Whether JetStream flushes each write before it acknowledges it.
fn flushes(url: &str) -> Result<bool, String> {
    judge(&ask(url, "jsz")?)
}

fn ask(url: &str, page: &str) -> Result<String, String> {
    let request = ureq::get(format!("{url}/{page}")).config().timeout_global(Some(TIMEOUT)).build();
    let mut answer = request.call().map_err(|error| error.to_string())?;
    let text = answer.body_mut().with_config().limit(MAX_BYTES).read_to_string();
    text.map_err(|error| error.to_string())
}

fn judge(text: &str) -> Result<bool, String> {
    let answer: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("the answer is no JSON: {error}"))?;
    match answer.get("config") {
        // Left out where it is false.
        Some(config) if config.get("store_dir").is_some() => {
            Ok(config.get("sync_always").and_then(serde_json::Value::as_bool) == Some(true))
        }
        _ => Err("it says nothing of JetStream's settings".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_is_judged() {
        // As nats-server 2.15.1 answers.
        let lazy = r#"{"config": {"store_dir": "/s", "sync_interval": 120000000000}}"#;
        let always = r#"{"config": {"store_dir": "/s", "sync_interval": 120000000000, "sync_always": true}}"#;
        assert_eq!((judge(lazy), judge(always)), (Ok(false), Ok(true)));
        let whole = r#"{"version": "2.15.1", "max_payload": 1048576}"#;
        assert_eq!((max_payload(whole), max_payload("<html>")), (Some(1 << 20), None));
        assert!(judge(r#"{"config": {}}"#).is_err() && judge("<html>").is_err());
    }
}
