//! `duet events dead-letters`.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Session;
use super::moment;
use super::show::table;
use super::tail::{after, page, plain};
use crate::output::{self, Format};

/// End of the name of a topic that keeps dead letters, unless a subscription names another one.
const SUFFIX: &str = ".dead-letter";
/// Positions of one request.
const BATCH: usize = 1000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List them.
    List(Which),
    /// Show them whole.
    Show(Which),
    /// Move them back, each to the one subscription that gave it up, with its id.
    Redrive(Which),
    /// Remove them for good.
    Drop(Which),
}

/// Those to which all of it applies.
#[derive(Debug, clap::Args)]
struct Which {
    /// The dead-letter topic [default: those of all subscriptions, and every topic whose name ends in .dead-letter].
    topic: Option<String>,
    /// Given up by this subscription.
    #[arg(long)]
    subscription: Option<String>,
    /// With this in the reason.
    #[arg(long)]
    reason: Option<String>,
    /// With this id.
    #[arg(long)]
    id: Option<String>,
    /// Given up at this time or later: a time, or so long ago, such as 1h.
    #[arg(long, value_parser = moment::time)]
    since: Option<Timestamp>,
    /// All of them.
    #[arg(long)]
    all: bool,
    /// At most so many, the oldest of each topic first.
    #[arg(long)]
    limit: Option<usize>,
}

impl Which {
    fn is_open(&self) -> bool {
        let given = [&self.subscription, &self.reason, &self.id];
        given.iter().all(|given| given.is_none()) && self.since.is_none() && !self.all
    }

    fn takes(&self, stored: &Value) -> bool {
        let of = |name: &str| stored.pointer(&format!("/event/{name}")).map(plain);
        let is = |wanted: &Option<String>, name| {
            wanted.is_none() || of(name).as_ref() == wanted.as_ref()
        };
        let reason = self
            .reason
            .as_ref()
            .is_none_or(|part| of("deadletterreason").is_some_and(|reason| reason.contains(part)));
        // Nothing keeps others from publishing to a dead-letter topic.
        of("deadlettersub").is_some()
            && is(&self.subscription, "deadlettersub")
            && is(&self.id, "id")
            && reason
            && self.since.is_none_or(|since| after(stored, since))
    }
}

pub(super) fn dead_letters(session: &Session, args: &Args) -> anyhow::Result<()> {
    match &args.action {
        Action::List(which) => list(session, which),
        Action::Show(which) => show(session, which),
        Action::Redrive(which) => change(session, which, "/v1/redrive", "redriven"),
        Action::Drop(which) => change(session, which, "/v1/remove", "removed"),
    }
}

/// Dead letters with their topic, oldest first, of each what `keep` takes: there may be very many.
fn find<T>(
    session: &Session,
    which: &Which,
    keep: impl Fn(Value) -> T,
) -> anyhow::Result<Vec<(String, T)>> {
    let limit = which.limit.unwrap_or(usize::MAX);
    let topics = match &which.topic {
        Some(topic) => vec![topic.clone()],
        None => dead_letter_topics(session)?,
    };
    let mut found = Vec::new();
    for topic in topics {
        let mut from = 0;
        while found.len() < limit {
            let page = page(session, &topic, from, None)?;
            let taken = page.events.into_iter().filter(|stored| which.takes(stored));
            let taken = taken.take(limit - found.len());
            found.extend(taken.map(|stored| (topic.clone(), keep(stored))));
            if page.next == from {
                break;
            }
            from = page.next;
        }
    }
    Ok(found)
}

fn dead_letter_topics(session: &Session) -> anyhow::Result<Vec<String>> {
    let bus = [("bus", session.bus.as_str())];
    let subscriptions = session.client.get("/v1/subscriptions", &bus)?;
    let named = strings(&subscriptions, "subscriptions", "deadLetterTopic");
    let topics = session.client.get("/v1/topics", &bus)?;
    // A topic is there with its first event.
    let topics = strings(&topics, "topics", "name").into_iter();
    Ok(topics.filter(|topic| topic.ends_with(SUFFIX) || named.contains(topic)).collect())
}

/// A field of everything in a list of an answer.
fn strings(answer: &Value, list: &str, field: &str) -> BTreeSet<String> {
    let items = answer.get(list).and_then(Value::as_array).into_iter().flatten();
    items.filter_map(|item| item.get(field)?.as_str().map(str::to_owned)).collect()
}

fn list(session: &Session, which: &Which) -> anyhow::Result<()> {
    let found = find(session, which, |stored| stored)?;
    if session.format == Format::Json {
        return print_json(&found);
    }
    let rows = found.iter().map(|(topic, stored)| {
        let of = |path: &str| stored.pointer(path).map_or_else(|| "-".to_owned(), plain);
        vec![
            topic.clone(),
            of("/position"),
            of("/event/id"),
            of("/event/deadlettersub"),
            of("/event/deadletterattempts"),
            of("/event/deadletterstatus"),
            of("/published"),
            of("/event/deadletterreason"),
        ]
    });
    let titles =
        ["TOPIC", "POSITION", "ID", "SUBSCRIPTION", "ATTEMPTS", "STATUS", "SINCE", "REASON"];
    table(&titles, rows.collect())
}

fn show(session: &Session, which: &Which) -> anyhow::Result<()> {
    let found = find(session, which, |stored| stored)?;
    if session.format == Format::Json {
        return print_json(&found);
    }
    for (number, (topic, stored)) in found.iter().enumerate() {
        if number > 0 {
            output::answer("")?;
        }
        output::answer(&whole(topic, stored))?;
    }
    Ok(())
}

fn print_json(found: &[(String, Value)]) -> anyhow::Result<()> {
    let found = found.iter().map(|(topic, stored)| json!({ "topic": topic, "letter": stored }));
    output::answer(&format!("{:#}", Value::Array(found.collect())))
}

/// Everything of a dead letter, for people: where it is, its attributes, and its data last.
fn whole(topic: &str, stored: &Value) -> String {
    let of = |name: &str| stored.get(name).map(plain).unwrap_or_default();
    let mut text = format!("{topic} at position {}, since {}", of("position"), of("published"));
    let event = stored.get("event").and_then(Value::as_object);
    let is_data = |name: &str| matches!(name, "data" | "data_base64");
    let (data, attributes): (Vec<_>, Vec<_>) =
        event.into_iter().flatten().partition(|(name, _)| is_data(name));
    let width = attributes.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in attributes.into_iter().chain(data) {
        text.push_str(&format!("\n  {name:width$}  {}", plain(value)));
    }
    text
}

fn change(session: &Session, which: &Which, path: &str, done: &str) -> anyhow::Result<()> {
    if which.is_open() {
        bail!("say which: --subscription, --reason, --id or --since, or --all");
    }
    let found = find(session, which, |stored| stored.get("position").and_then(Value::as_u64))?;
    let mut changed = 0;
    for letters in found.chunk_by(|(one, _), (other, _)| one == other) {
        for batch in letters.chunks(BATCH) {
            let Some((topic, _)) = batch.first() else { continue };
            let positions: Vec<u64> = batch.iter().filter_map(|(_, position)| *position).collect();
            let body = json!({ "bus": session.bus, "topic": topic, "positions": positions });
            let answer = session.client.post(path, &body)?;
            changed += answer.get(done).and_then(Value::as_u64).context("no number came back")?;
        }
    }
    let answer = json!({ "matched": found.len(), done: changed });
    let mut text = format!("{changed} of {} dead letters {done}", found.len());
    if changed < found.len() as u64 {
        text.push_str("; the others stay: they have expired, their subscription is gone, or somebody was faster");
    }
    session.say(&answer, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_apply_together() {
        let letter = json!({"position": 4, "published": "2026-01-31T12:00:00Z", "event": {
            "id": "1", "deadlettersub": "shop/fulfil", "deadletterreason": "all 3 attempts used; the last: 500",
        }});
        let which = || Which {
            topic: None,
            subscription: Some("shop/fulfil".into()),
            reason: Some("last: 500".into()),
            id: Some("1".into()),
            since: Some("2026-01-31T12:00:00Z".parse().unwrap()),
            all: false,
            limit: None,
        };
        assert!(which().takes(&letter) && !which().is_open());
        assert!(!Which { id: Some("2".into()), ..which() }.takes(&letter));
        assert!(!Which { subscription: Some("shop/other".into()), ..which() }.takes(&letter));
        assert!(!Which { reason: Some("404".into()), ..which() }.takes(&letter));
        let later = Some("2026-01-31T12:00:00.5Z".parse().unwrap());
        assert!(!Which { since: later, ..which() }.takes(&letter));
    }
}
