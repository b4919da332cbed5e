//! `duet events publish`.

use std::io::Read as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::Session;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The topic.
    topic: String,
    /// The data; JSON stays JSON, anything else is text [default: standard input].
    data: Option<String>,
    /// What happened.
    #[arg(long = "type", default_value = "duet.event.published")]
    kind: String,
    /// Who says so.
    #[arg(long, default_value = "duet-cli")]
    source: String,
    /// Its id; the same source and id again is stored once [default: a new one].
    #[arg(long)]
    id: Option<String>,
    /// Partition key: events with the same one keep their order.
    #[arg(long)]
    key: Option<String>,
    /// Deliver after this time, such as 30s.
    #[arg(long, value_parser = duet_api::duration::parse)]
    after: Option<Duration>,
    /// Do not deliver after this time.
    #[arg(long, value_parser = duet_api::duration::parse)]
    ttl: Option<Duration>,
    /// More attributes, as `name=value` (repeatable).
    #[arg(long = "attribute", value_name = "NAME=VALUE")]
    attributes: Vec<String>,
}

pub(super) fn publish(session: &Session, args: &Args) -> anyhow::Result<()> {
    let event = event(args, Timestamp::now())?;
    let query = [("bus", session.bus.as_str()), ("topic", &args.topic)];
    let answer = session.client.publish(&query, &event)?;
    let stored = answer.pointer("/published/0").cloned().unwrap_or_default();
    let position = stored.get("position").cloned().unwrap_or_default();
    let id = event.get("id").and_then(Value::as_str).unwrap_or_default();
    let text = match stored.get("duplicate") == Some(&Value::Bool(true)) {
        true => format!("{id}: already there, at position {position} of {}", args.topic),
        false => format!("{id}: stored at position {position} of {}", args.topic),
    };
    session.say(&answer, &text)
}

fn event(args: &Args, now: Timestamp) -> anyhow::Result<Value> {
    let data = match &args.data {
        Some(data) => data.clone(),
        None => {
            let mut data = String::new();
            let read = std::io::stdin().lock().read_to_string(&mut data);
            read.context("the data on standard input is not text")?;
            data
        }
    };
    let id = args
        .id
        .clone()
        .unwrap_or_else(|| format!("cli-{}-{}", now.as_nanosecond(), std::process::id()));
    let mut event = Map::new();
    let required =
        [("specversion", "1.0"), ("id", &id), ("source", &args.source), ("type", &args.kind)];
    for (name, value) in required {
        event.insert(name.to_owned(), json!(value));
    }
    event.insert("time".to_owned(), json!(now.to_string()));
    if let Some(key) = &args.key {
        event.insert("partitionkey".to_owned(), json!(key));
    }
    for (name, after) in [("deliverat", args.after), ("expirytime", args.ttl)] {
        if let Some(after) = after {
            let at = now.checked_add(after).with_context(|| format!("{after:?} is too long"))?;
            event.insert(name.to_owned(), json!(at.to_string()));
        }
    }
    for attribute in &args.attributes {
        let Some((name, value)) = attribute.split_once('=') else {
            bail!("--attribute {attribute:?} is not name=value");
        };
        event.insert(name.to_owned(), json!(value));
    }
    let (content_type, data) = match serde_json::from_str::<Value>(&data) {
        Ok(json) => ("application/json", json),
        Err(_) => ("text/plain", json!(data)),
    };
    event.entry("datacontenttype").or_insert(json!(content_type));
    event.insert("data".to_owned(), data);
    Ok(Value::Object(event))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn made(arguments: &[&str]) -> anyhow::Result<Value> {
        let arguments = ["publish", "t"].iter().chain(arguments);
        event(&Command::parse_from(arguments).args, "1970-01-01T00:00:00Z".parse().unwrap())
    }

    #[test]
    fn flags_become_attributes() {
        let event = made(&[
            "{\"a\": 1}",
            "--id",
            "7",
            "--key",
            "k",
            "--after",
            "30s",
            "--ttl",
            "1m",
            "--attribute",
            "tenant=a=b",
        ]);
        let expected = json!({
            "specversion": "1.0", "id": "7", "source": "duet-cli", "type": "duet.event.published",
            "time": "1970-01-01T00:00:00Z", "partitionkey": "k", "deliverat": "1970-01-01T00:00:30Z",
            "expirytime": "1970-01-01T00:01:00Z", "tenant": "a=b", "datacontenttype": "application/json",
            "data": {"a": 1},
        });
        assert_eq!(event.unwrap(), expected);
    }

    #[test]
    fn text_stays_text_and_bad_attributes_are_named() {
        let event = made(&["hello"]).unwrap();
        assert_eq!(
            (&event["datacontenttype"], &event["data"]),
            (&json!("text/plain"), &json!("hello"))
        );
        let error = made(&["x", "--attribute", "tenant"]).unwrap_err();
        assert!(error.to_string().contains("\"tenant\" is not name=value"));
    }
}
