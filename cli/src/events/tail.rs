//! `duet events tail`, and reading a topic page by page.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::runtime::Runtime;

use super::Session;
use super::moment::From;
use crate::output::{self, Format, ReaderGone};

/// How often a topic is asked for what is new.
const POLL: Duration = Duration::from_millis(250);
/// Events of one answer.
const PAGE: &str = "500";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The topic.
    topic: String,
    /// Where to begin: `latest`, `earliest`, a position, a time, or so long ago, such as 1h.
    #[arg(long, default_value = "latest", value_parser = From::parse)]
    from: From,
    /// CEL: show only events for which it is true.
    #[arg(long)]
    filter: Option<String>,
    /// Stop at the end of what there is, instead of waiting for more.
    #[arg(long)]
    no_follow: bool,
    /// Stop after so many events.
    #[arg(long)]
    limit: Option<usize>,
}

/// A page of a topic.
pub(super) struct Page {
    pub(super) events: Vec<Value>,
    /// Position to go on from.
    pub(super) next: u64,
}

/// Events of a topic from a position on; of a filter those that match.
pub(super) fn page(
    session: &Session,
    topic: &str,
    from: u64,
    filter: Option<&str>,
) -> anyhow::Result<Page> {
    let from_text = from.to_string();
    let mut query = vec![
        ("bus", session.bus.as_str()),
        ("topic", topic),
        ("from", &from_text),
        ("limit", PAGE),
    ];
    query.extend(filter.map(|filter| ("filter", filter)));
    let mut answer = session.client.get("/v1/events", &query)?;
    let events = answer.get_mut("events").map(Value::take);
    let Some(Value::Array(events)) = events else {
        anyhow::bail!("the control plane answered without events");
    };
    let next = answer.get("next").and_then(Value::as_u64).context("the answer has no next")?;
    Ok(Page { events, next })
}

/// Runs until there is nothing more to show, or until the user ends it.
pub(super) fn tail(session: &Session, args: &Args) -> anyhow::Result<()> {
    let (mut from, since) = begin(session, args)?;
    let news = News::new()?;
    let mut left = args.limit.unwrap_or(usize::MAX);
    while left > 0 {
        let page = page(session, &args.topic, from, args.filter.as_deref())?;
        let at_end = page.next == from;
        from = page.next;
        for event in
            page.events.iter().filter(|event| since.is_none_or(|since| after(event, since)))
        {
            if left == 0 {
                return Ok(());
            }
            left -= 1;
            show(session, event)?;
        }
        if at_end && args.no_follow {
            return Ok(());
        }
        if at_end {
            news.wait(&std::io::stdout())?;
        }
    }
    Ok(())
}

/// Waits for what is new, as long as somebody reads: nothing more may ever come, and then no write would tell.
struct News {
    runtime: Runtime,
}

impl News {
    fn new() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime })
    }

    fn wait(&self, out: &impl AsFd) -> anyhow::Result<()> {
        let gone = async {
            // Unchecked, since a check would change how everybody who has the pipe writes to it. A file cannot be watched,
            // and need not be.
            let file = File::from(out.as_fd().try_clone_to_owned()?);
            let Ok(pipe) = pipe::Sender::from_file_unchecked(file) else {
                return std::future::pending().await;
            };
            pipe.ready(Interest::ERROR).await.map(drop)
        };
        match self.runtime.block_on(async { tokio::time::timeout(POLL, gone).await }) {
            Ok(Ok(())) => Err(ReaderGone.into()),
            Ok(Err(error)) => Err(error).context("standard output cannot be watched"),
            Err(_nobody_left) => Ok(()),
        }
    }
}

/// The first position, and the time before which events are left out.
fn begin(session: &Session, args: &Args) -> anyhow::Result<(u64, Option<Timestamp>)> {
    match args.from {
        From::Earliest => return Ok((0, None)),
        From::Position(position) => return Ok((position, None)),
        From::Time(time) => return Ok((0, Some(time))),
        From::Latest => {}
    }
    let topics = session.client.get("/v1/topics", &[("bus", &session.bus)])?;
    let topics = topics.get("topics").and_then(Value::as_array).cloned().unwrap_or_default();
    let topic = topics.iter().find(|topic| topic.get("name") == Some(&args.topic.as_str().into()));
    Ok((topic.and_then(|topic| topic.get("next")?.as_u64()).unwrap_or(0), None))
}

/// Whether an event was published at or after a time.
pub(super) fn after(event: &Value, since: Timestamp) -> bool {
    let published = event.get("published").and_then(Value::as_str);
    published.and_then(|text| text.parse::<Timestamp>().ok()).is_none_or(|time| time >= since)
}

fn show(session: &Session, stored: &Value) -> anyhow::Result<()> {
    if session.format == Format::Json {
        return output::answer(&stored.to_string());
    }
    let text = |name: &str| stored.get(name).map_or_else(String::new, plain);
    let event = stored.get("event").cloned().unwrap_or_default();
    let of = |name: &str| event.get(name).map_or_else(String::new, plain);
    let data = event.get("data").or_else(|| event.get("data_base64")).map(plain);
    output::answer(&format!(
        "{:>8}  {}  {}  {}  {}  {}",
        text("position"),
        text("published"),
        of("type"),
        of("source"),
        of("id"),
        data.unwrap_or_default()
    ))
}

/// Text without its quotes, on one line: what somebody published must not steer a terminal.
pub(super) fn plain(value: &Value) -> String {
    let Some(text) = value.as_str() else { return value.to_string() };
    let mut plain = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter.is_control() {
            true => plain.extend(letter.escape_default()),
            false => plain.push(letter),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_steers_no_terminal() {
        let text = Value::from("ü \u{1b}[31mred\r\n\u{9b}2J \"quoted\"");
        assert_eq!(plain(&text), "ü \\u{1b}[31mred\\r\\n\\u{9b}2J \"quoted\"");
        assert_eq!(plain(&serde_json::json!({"a": "\u{1b}"})), r#"{"a":"\u001b"}"#);
    }

    #[test]
    fn whoever_waits_notices_that_nobody_reads_any_more() {
        let news = News::new().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        news.wait(&writer).unwrap();
        drop(reader);
        assert!(news.wait(&writer).unwrap_err().is::<ReaderGone>());
        // What cannot be watched is only waited at.
        let file = tempfile::tempfile().unwrap();
        news.wait(&file).unwrap();
        news.wait(&File::options().write(true).open("/dev/null").unwrap()).unwrap();
    }
}
