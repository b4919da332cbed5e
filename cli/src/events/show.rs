//! Tables.

use std::time::Duration;

use duet_api::duration;
use jiff::Timestamp;
use serde_json::Value;

use super::Session;
use crate::output::{self, Format};

pub(super) fn topics(session: &Session) -> anyhow::Result<()> {
    let answer = session.client.get("/v1/topics", &[("bus", &session.bus)])?;
    let columns = [
        ("TOPIC", "name"),
        ("EVENTS", "events"),
        ("BYTES", "bytes"),
        ("FIRST", "first"),
        ("NEXT", "next"),
    ];
    print(session, &answer, "topics", &columns)?;
    warn(session)
}

pub(super) fn subscriptions(session: &Session) -> anyhow::Result<()> {
    let mut answer = session.client.get("/v1/subscriptions", &[("bus", &session.bus)])?;
    if session.format == Format::Text {
        let rows = answer.get_mut("subscriptions").and_then(Value::as_array_mut);
        let now = Timestamp::now();
        rows.into_iter().flatten().filter_map(Value::as_object_mut).for_each(|row| {
            // Control planes of before have no other time.
            let since = row.get("waitingSince").or_else(|| row.get("oldest"));
            let since = since.and_then(Value::as_str);
            let age = since.and_then(|since| age(since, now));
            row.extend(age.map(|age| ("age".to_owned(), Value::from(age))));
        });
    }
    let columns = [
        ("SUBSCRIPTION", "name"),
        ("TOPIC", "topic"),
        ("LAG", "lag"),
        ("LATER", "scheduled"),
        ("OLDEST", "oldest"),
        ("AGE", "age"),
        ("IN FLIGHT", "inFlight"),
        ("RETRYING", "retrying"),
        ("ATTEMPTS", "attempts"),
        ("CONSUMERS", "consumers"),
        ("PAUSED", "paused"),
    ];
    print(session, &answer, "subscriptions", &columns)?;
    warn(session)
}

/// How long ago a time was, in whole seconds; the clock of the control plane may be ahead of this one.
fn age(time: &str, now: Timestamp) -> Option<String> {
    let age = now.duration_since(time.parse().ok()?);
    Some(duration::format(Duration::from_secs(u64::try_from(age.as_secs()).unwrap_or(0))))
}

/// Says what an operator would look for in vain in the tables.
fn warn(session: &Session) -> anyhow::Result<()> {
    let answer = session.client.get("/v1/buses", &[])?;
    let why = answer.get("notMoved").and_then(|buses| buses.get(&session.bus));
    if let Some(why) = why.and_then(Value::as_str) {
        output::note(&format!(
            "the EventBus {} has another backend now: {why}; these are of the old one",
            session.bus
        ));
    }
    Ok(())
}

fn print(
    session: &Session,
    answer: &Value,
    list: &str,
    columns: &[(&str, &str)],
) -> anyhow::Result<()> {
    if session.format == Format::Json {
        return output::answer(&format!("{answer:#}"));
    }
    let rows = answer.get(list).and_then(Value::as_array).into_iter().flatten();
    let rows = rows.map(|row| columns.iter().map(|(_, field)| cell(row.get(*field))).collect());
    table(&columns.iter().map(|(title, _)| *title).collect::<Vec<_>>(), rows.collect())
}

fn cell(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(true)) => "yes".to_owned(),
        None | Some(Value::Null | Value::Bool(false)) => "-".to_owned(),
        Some(other @ (Value::Number(_) | Value::Array(_) | Value::Object(_))) => other.to_string(),
    }
}

/// Columns as wide as their widest cell; the last one as it is.
pub(super) fn table(titles: &[&str], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
    let titles = titles.iter().map(|title| (*title).to_owned()).collect::<Vec<_>>();
    let all = std::iter::once(titles).chain(rows).collect::<Vec<_>>();
    let widths = all.iter().fold(Vec::new(), |mut widths: Vec<usize>, row| {
        widths.resize(row.len().max(widths.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
        widths
    });
    for row in &all {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        output::answer(cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_whole_seconds() {
        let now = "2026-01-31T12:00:00Z".parse().unwrap();
        for (time, expected) in [
            ("2026-01-31T11:58:29.5Z", Some("1m30s")),
            ("2026-01-30T11:00:00Z", Some("25h")),
            ("2026-01-31T11:59:59.9Z", Some("0s")),
            ("2026-01-31T12:00:03Z", Some("0s")),
            ("lately", None),
        ] {
            assert_eq!(age(time, now).as_deref(), expected, "{time}");
        }
    }
}
