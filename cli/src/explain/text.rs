//! A report for people.

use std::fmt::{self, Write as _};

use duet_control_plane::compile::explain::{Place, Setting};

use super::describe;
use super::report::{Backend, Outcome, Report, Rule};

/// Rules after the one that is used: enough to see what comes next.
const LATER: usize = 3;

/// Values wider than this do not make room for themselves in every line.
const WIDE: usize = 40;

/// Several lines.
pub(crate) fn render(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    write(report, &mut text).ok();
    text
}

fn write(report: &Report, out: &mut String) -> fmt::Result {
    let request = &report.request;
    writeln!(out, "{} {} from {}", request.method, request.url, request.from)?;
    writeln!(out)?;
    if let Some(destination) = &report.destination {
        writeln!(out, "Destination: {destination}")?;
    }
    writeln!(out, "Outcome: {}", outcome(report))?;
    rules(&report.rules, out)?;
    section("Routes that do not count", out, &report.passed_over, |route| {
        vec![format!("{}: {}", route.place, route.why)]
    })?;
    section("Filters", out, &report.filters, |filter| vec![filter.clone()])?;
    section("Backends", out, &report.backends, backend)?;
    section("Settings", out, &aligned(&report.settings), |setting| vec![setting.clone()])?;
    section("Notes", out, &report.notes, |note| vec![note.clone()])
}

fn outcome(report: &Report) -> String {
    match &report.outcome {
        Outcome::Forwarded { url } if *url == report.request.url => {
            "sent to the backends".to_owned()
        }
        Outcome::Forwarded { url } => format!("sent to the backends, as {url}"),
        Outcome::Preflight { status } => format!("answered with {status}, a CORS preflight"),
        Outcome::Redirected { status, location } => format!("answered with {status} to {location}"),
        Outcome::Failed { status, error, details } => {
            format!("answered with {status}, {error}: {details}")
        }
    }
}

fn rules(rules: &[Rule], out: &mut String) -> fmt::Result {
    let used = rules.iter().position(|rule| rule.used);
    let shown = used.map_or(rules.len(), |used| used + 1 + LATER);
    let numbered: Vec<(usize, &Rule)> = rules.iter().enumerate().take(shown).collect();
    section("Rules, the first that matches is used", out, &numbered, |(number, rule)| {
        let mark = match used {
            Some(used) if *number == used => "used ",
            Some(used) if *number > used => "later",
            _ => "no   ",
        };
        let mut line = format!("{mark}  {}", place(rule));
        if !rule.mismatches.is_empty() {
            line.push_str(&format!(": {}", rule.mismatches.join("; ")));
        }
        vec![line]
    })?;
    match rules.len().saturating_sub(shown) {
        0 => Ok(()),
        more => writeln!(out, "  later  {more} more"),
    }
}

fn place(rule: &Rule) -> String {
    match (&rule.place, &rule.name) {
        (None, _) => "every request, as the service has no route".to_owned(),
        (Some(place), None) => place.to_string(),
        (Some(place), Some(name)) => format!("{place} {name:?}"),
    }
}

fn backend(backend: &Backend) -> Vec<String> {
    let name = match (&backend.backend, &backend.broken) {
        (_, Some(why)) => format!("answered with 500: {why}"),
        (Some(name), None) => name.clone(),
        (None, None) => "unknown".to_owned(),
    };
    let mut lines = vec![format!("{}%  {name}", (backend.percent * 10.0).round() / 10.0)];
    lines.extend(backend.filters.iter().map(|filter| format!("  {filter}")));
    lines.extend(aligned(&backend.settings).into_iter().map(|line| format!("  {line}")));
    lines
}

/// Settings in columns: name, value, who says so.
fn aligned(settings: &[Setting]) -> Vec<String> {
    let values: Vec<String> = settings.iter().map(describe::setting).collect();
    let name_width = settings.iter().map(|setting| setting.name.len()).max().unwrap_or_default();
    let widths = values.iter().map(|value| value.chars().count());
    let value_width = widths.filter(|width| *width <= WIDE).max().unwrap_or_default();
    let line = |(setting, value): (&Setting, &String)| {
        let from = setting.from.as_ref().map_or("default".to_owned(), Place::to_string);
        format!("{:name_width$}  {value:value_width$}  {from}", setting.name)
    };
    settings.iter().zip(&values).map(line).collect()
}

/// A title and indented lines; nothing where there are no items.
fn section<T>(
    title: &str,
    out: &mut String,
    items: &[T],
    lines: impl Fn(&T) -> Vec<String>,
) -> fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{title}:")?;
    for line in items.iter().flat_map(lines) {
        writeln!(out, "  {line}")?;
    }
    Ok(())
}
