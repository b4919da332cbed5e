//! Events of the outbox that their bus will never take: to look at, to send again, to drop. Kept from web pages
//! even more strictly than the rest of the operator port.
//!
//! | request | what |
//! | --- | --- |
//! | `GET /outbox/rejected?bus=&from=` | the next of them, oldest first |
//! | `POST /outbox/redrive?bus=&position=&position=` | back to the end of what waits for the bus |
//! | `POST /outbox/drop?bus=&position=&position=` | away for good |

use duet_events::cloudevent;
use duet_events::outbox::{Outbox, Rejected};
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::http::body::Body;
use crate::http::browser;

/// Events of one answer: each may have some MiB.
const PAGE: usize = 32;
/// Every request has it. A page of another origin cannot send it without being asked first.
const HEADER: &str = "duet-operator";

/// Answers a request below `/outbox/`; `None` is an outbox that is not open yet.
pub(super) async fn answer(outbox: Option<&Outbox>, head: &Parts) -> Response<Body> {
    let answered = match (refusal(&head.headers), outbox) {
        (Some(why), _) => Err((StatusCode::FORBIDDEN, why.to_owned())),
        (None, None) => {
            Err((StatusCode::SERVICE_UNAVAILABLE, "the outbox is not open yet".to_owned()))
        }
        (None, Some(outbox)) => act(outbox, head).await,
    };
    let (status, body) = match answered {
        Ok(body) => (StatusCode::OK, body),
        Err((status, error)) => (status, json!({ "error": error })),
    };
    let mut response = super::text(status, body.to_string());
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

type Failure = (StatusCode, String);

async fn act(outbox: &Outbox, head: &Parts) -> Result<Value, Failure> {
    let asked = Asked::read(head.uri.query().unwrap_or_default())?;
    let bus = asked.bus.as_str();
    match (&head.method, head.uri.path()) {
        (&Method::GET, "/outbox/rejected") => {
            let found = outbox.rejected(bus, asked.from, PAGE).await.map_err(failed)?;
            let next = found.last().map_or(asked.from, |last| last.position + 1);
            Ok(json!({ "rejected": found.iter().map(shown).collect::<Vec<_>>(), "next": next }))
        }
        (&Method::POST, "/outbox/redrive") => {
            let redriven = outbox.redrive(bus, &asked.positions).await.map_err(failed)?;
            tracing::warn!(bus, redriven, "rejected events sent again by an operator");
            Ok(json!({ "redriven": redriven }))
        }
        (&Method::POST, "/outbox/drop") => {
            let dropped = outbox.drop_rejected(bus, asked.positions).await.map_err(failed)?;
            tracing::warn!(bus, dropped, "rejected events dropped by an operator");
            Ok(json!({ "dropped": dropped }))
        }
        _ => Err((StatusCode::NOT_FOUND, "not found".to_owned())),
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    (StatusCode::SERVICE_UNAVAILABLE, error.to_string())
}

fn shown(rejected: &Rejected) -> Value {
    let since = i64::try_from(rejected.rejected_ms).ok();
    let since = since.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    json!({
        "position": rejected.position,
        "rejected": since.map(|time| time.to_string()),
        "topic": rejected.topic,
        "reason": rejected.reason,
        "event": rejected.event.as_ref().map(cloudevent::shown),
    })
}

/// What the query asks for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    bus: String,
    from: u64,
    positions: Vec<u64>,
}

impl Asked {
    fn read(query: &str) -> Result<Self, Failure> {
        let mut asked =
            Self { bus: duet_api::DEFAULT_BUS.to_owned(), from: 0, positions: Vec::new() };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let bad = || (StatusCode::BAD_REQUEST, format!("{pair:?} makes no sense"));
            match pair.split_once('=').ok_or_else(bad)? {
                // Names of buses have nothing that would be encoded.
                ("bus", bus) => bus.clone_into(&mut asked.bus),
                ("from", from) => asked.from = from.parse().map_err(|_error| bad())?,
                ("position", position) => {
                    asked.positions.push(position.parse().map_err(|_error| bad())?);
                }
                _ => return Err(bad()),
            }
        }
        Ok(asked)
    }
}

fn refusal(headers: &HeaderMap) -> Option<&'static str> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if headers.contains_key(header::ORIGIN) {
        Some("web pages have no business here")
    } else if !headers.contains_key(HEADER) {
        Some("the header duet-operator is missing: say `duet-operator: 1`")
    } else if !browser::is_local(host) {
        Some("the host must be a loopback address or localhost")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read() {
        let asked = Asked::read("bus=other&position=1&position=20").unwrap();
        assert_eq!(asked, Asked { bus: "other".into(), from: 0, positions: vec![1, 20] });
        assert_eq!(Asked::read("").unwrap().bus, "default");
        assert!(Asked::read("position=x").is_err() && Asked::read("what=1").is_err());
    }

    #[test]
    fn web_pages_are_kept_out() {
        let headers = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            let pairs =
                pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            pairs.collect()
        };
        let (operator, host) = (("duet-operator", "1"), ("host", "127.0.0.1:15000"));
        assert_eq!(refusal(&headers(&[operator, host])), None);
        assert_eq!(refusal(&headers(&[operator, ("host", "[::1]:1")])), None);
        assert!(refusal(&headers(&[host])).is_some());
        assert!(refusal(&headers(&[operator])).is_some());
        assert!(refusal(&headers(&[operator, ("host", "evil.example:15000")])).is_some());
        assert!(refusal(&headers(&[operator, host, ("origin", "http://localhost")])).is_some());
    }
}
