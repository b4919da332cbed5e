//! What settings mean for one request in particular: they may not apply to it, and it may bring a bound of its own.

use anyhow::anyhow;
use duet_api::{duration, proto};
use duet_proxy::http::{deadline, headers};
use duet_proxy::route::RouteTable;
use http::request;

/// Whole sentences.
pub(crate) fn of(rule: &proto::Rule, head: &request::Parts) -> anyhow::Result<Vec<String>> {
    let mut notes = Vec::new();
    if let Some(left) = deadline::read(&head.headers, headers::is_grpc(&head.headers)) {
        let left = duration::format(left);
        notes.push(format!("the caller leaves {left}: no bound on the request is longer"));
    }
    if !headers::is_idempotent(&head.method, &head.headers) {
        let retry = rule.retry.as_ref().filter(|retry| retry.attempts > 0);
        notes.extend(retry.map(|retry| retried(retry, head)));
        let hedged = rule.hedge.map(|_| format!("{} is not hedged", without_key(head)));
        notes.extend(hedged);
    }
    if let Some(fault) = &rule.fault
        && !suffers(fault, head)?
    {
        notes.push("the fault is not for this request: it lacks the headers".to_owned());
    }
    Ok(notes)
}

fn without_key(head: &request::Parts) -> String {
    format!("{} without Idempotency-Key", head.method)
}

/// Policies name statuses to retry, but which of them count depends on the request.
fn retried(retry: &proto::Retry, head: &request::Parts) -> String {
    let more = match headers::is_grpc(&head.headers) {
        true if !retry.grpc_codes.is_empty() => ", or answered with one of retry.grpcCodes",
        false if !retry.codes.is_empty() => "; retry.codes do not count for it",
        _ => "",
    };
    let what = without_key(head);
    format!("{what} is tried again only if it provably was not processed{more}")
}

/// Whether a request has the headers that a fault asks for, as the sidecar decides it.
fn suffers(fault: &proto::Fault, head: &request::Parts) -> anyhow::Result<bool> {
    let condition = proto::Match { headers: fault.headers.clone(), ..proto::Match::default() };
    let rule = proto::Rule { r#match: Some(condition), ..proto::Rule::default() };
    let table = RouteTable::compile(&[rule])
        .map_err(|why| anyhow!("sidecars refuse the fault's headers: {why}"))?;
    Ok(table.find(head).is_some())
}
