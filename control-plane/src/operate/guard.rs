//! Keeps web pages away from a port that asks nobody who they are: a page cannot send our header without being asked
//! first (which is never answered), and a name that an attacker's DNS points to this machine is no loopback name.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::Failure;

/// Every request has it.
pub(super) const HEADER: &str = "duet-operator";

/// Whether the host must be loopback.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeepOut {
    loopback_only: bool,
}

pub(super) fn layer(loopback_only: bool) -> KeepOut {
    KeepOut { loopback_only }
}

pub(super) async fn check(State(rule): State<KeepOut>, request: Request, next: Next) -> Response {
    match refusal(rule, request.headers()) {
        None => next.run(request).await,
        Some(why) => {
            let message = why.to_owned();
            Failure { status: StatusCode::FORBIDDEN, message }.into_response()
        }
    }
}

fn refusal(rule: KeepOut, headers: &HeaderMap) -> Option<&'static str> {
    if headers.contains_key(header::ORIGIN) {
        return Some("web pages have no business here");
    }
    if !headers.contains_key(HEADER) {
        return Some("the header duet-operator is missing: say `duet-operator: 1`");
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if rule.loopback_only && !is_loopback(host) {
        return Some("the host must be a loopback address or localhost");
    }
    None
}

fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_pass() {
        for good in
            ["localhost", "localhost:15016", "127.0.0.1:80", "127.9.9.9", "[::1]:15016", "[::1]"]
        {
            assert!(is_loopback(good), "{good}");
        }
        for bad in [
            "",
            "example.com",
            "example.com:15016",
            "10.0.0.1:15016",
            "localhost.example.com",
            "[fe80::1]:1",
        ] {
            assert!(!is_loopback(bad), "{bad}");
        }
    }
}
