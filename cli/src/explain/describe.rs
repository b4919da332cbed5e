//! Conditions, filters and values in words.

use duet_api::proto;
use duet_api::proto::filter::Kind as FilterKind;
use duet_api::proto::path_match::Kind as PathKind;
use duet_api::proto::path_modifier::Kind as ChangeKind;
use duet_api::proto::value_match::Kind as ValueKind;
use duet_control_plane::compile::explain::Setting;
use duet_proxy::route::Mismatch;
use serde_json::{Map, Value};

/// A condition of a rule that a request does not meet.
pub(crate) fn mismatch(mismatch: &Mismatch, wanted: &proto::Match) -> String {
    match mismatch {
        Mismatch::NotGrpc => "not a gRPC call".to_owned(),
        Mismatch::Path => path(wanted),
        Mismatch::Method => format!("the method is not {}", wanted.method),
        Mismatch::Header(name) => {
            format!("the header {name} {}", value_of(&wanted.headers, name.as_str()))
        }
        Mismatch::Query(name) => {
            format!("the query parameter {name} {}", value_of(&wanted.query_params, name))
        }
    }
}

fn path(wanted: &proto::Match) -> String {
    match wanted.path.as_ref().and_then(|path| path.kind.as_ref()) {
        Some(PathKind::Exact(path)) => format!("the path is not {path}"),
        Some(PathKind::Prefix(prefix)) => format!("the path is not {prefix} or below it"),
        Some(PathKind::Regex(pattern)) => format!("the path does not match {pattern}"),
        None => "the path does not match".to_owned(),
    }
}

fn value_of(wanted: &[proto::ValueMatch], name: &str) -> String {
    let wanted = wanted.iter().find(|wanted| wanted.name == name);
    match wanted.and_then(|wanted| wanted.kind.as_ref()) {
        Some(ValueKind::Exact(value)) => format!("is not {value:?}"),
        Some(ValueKind::Regex(pattern)) => format!("does not match {pattern}"),
        None => "does not match".to_owned(),
    }
}

/// What a filter does.
pub(crate) fn filter(filter: &proto::Filter) -> String {
    match &filter.kind {
        Some(FilterKind::RequestHeaders(change)) => format!("request headers: {}", headers(change)),
        Some(FilterKind::ResponseHeaders(change)) => {
            format!("response headers: {}", headers(change))
        }
        Some(FilterKind::Redirect(redirect)) => format!("redirect with {}", redirect.status),
        Some(FilterKind::UrlRewrite(rewrite)) => {
            let host = &rewrite.hostname;
            let host = (!host.is_empty()).then(|| format!("the host becomes {host}"));
            let path = rewrite.path.as_ref().and_then(|path| path.kind.as_ref());
            let path = path.map(|change| match change {
                ChangeKind::ReplaceFull(path) => format!("the path becomes {path}"),
                ChangeKind::ReplacePrefix(prefix) => {
                    format!("{prefix} takes the place of the prefix that matched")
                }
            });
            let changes: Vec<String> = host.into_iter().chain(path).collect();
            format!("rewrite: {}", changes.join(", "))
        }
        Some(FilterKind::Mirror(mirror)) => {
            let share = f64::from(mirror.numerator) * 100.0 / f64::from(mirror.denominator.max(1));
            format!("mirror {share}% to {}", mirror.backend)
        }
        Some(FilterKind::Cors(cors)) => format!("CORS for {}", cors.allow_origins.join(", ")),
        None => "unknown".to_owned(),
    }
}

fn headers(change: &proto::HeaderModifier) -> String {
    let pairs = |verb: &str, headers: &[proto::Header]| {
        let pair = |header: &proto::Header| format!("{verb} {}: {}", header.name, header.value);
        headers.iter().map(pair).collect::<Vec<_>>()
    };
    let mut changes = pairs("set", &change.set);
    changes.extend(pairs("add", &change.add));
    changes.extend(change.remove.iter().map(|name| format!("remove {name}")));
    changes.join(", ")
}

/// A setting's value on one line.
pub(crate) fn setting(setting: &Setting) -> String {
    match (setting.name, &setting.value) {
        ("outlierDetection", Value::Object(limits)) => outliers(limits),
        (name, Value::String(text)) if text == "0s" && name.starts_with("timeouts.") => {
            "0s (no bound)".to_owned()
        }
        (_, other) => value(other),
    }
}

/// As a sentence: six fields would be too wide for a table.
fn outliers(limits: &Map<String, Value>) -> String {
    let of = |name: &str| limits.get(name).map(value).unwrap_or_default();
    format!(
        "{} failures in a row, or under {}% of {} good: left alone for {} to {}, {}% of them at most",
        of("consecutiveFailures"),
        of("minSuccessPercent"),
        of("minRequests"),
        of("minEjection"),
        of("maxEjection"),
        of("maxEjectionPercent")
    )
}

fn value(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => "none".to_owned(),
        Value::Array(values) => values.iter().map(self::value).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => fields.iter().map(field).collect::<Vec<_>>().join(", "),
        // Without the decimals of a whole number.
        Value::Number(number) => number.as_f64().map_or_else(String::new, |n| n.to_string()),
        Value::Bool(_) => value.to_string(),
    }
}

fn field((name, value): (&String, &Value)) -> String {
    let text = self::value(value);
    if value.is_object() { format!("{name} ({text})") } else { format!("{name} {text}") }
}
