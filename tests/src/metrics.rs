//! Reading `/metrics`.

use std::net::SocketAddr;

use crate::http;

/// Sum of all series of a metric that have these labels.
pub async fn sum(address: SocketAddr, name: &str, labels: &[(&str, &str)]) -> f64 {
    sum_of(&http::text(address, "/metrics").await, name, labels)
}

/// The same of a text.
#[must_use]
pub fn sum_of(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let has = |line: &&str| {
        labels.iter().all(|(label, value)| line.contains(&format!("{label}=\"{value}\"")))
    };
    text.lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
        .filter(has)
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
