//! Tables.

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
    let answer = session.client.get("/v1/subscriptions", &[("bus", &session.bus)])?;
    let columns = [
        ("SUBSCRIPTION", "name"),
        ("TOPIC", "topic"),
        ("LAG", "lag"),
        ("OLDEST", "oldest"),
        ("IN FLIGHT", "inFlight"),
        ("RETRYING", "retrying"),
        ("ATTEMPTS", "attempts"),
        ("CONSUMERS", "consumers"),
        ("PAUSED", "paused"),
    ];
    print(session, &answer, "subscriptions", &columns)?;
    warn(session)
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
