//! `POST /v1.0/publish/{bus}/{topic}`: from the request to a durable event.

use std::time::Duration;

use bytes::Bytes;
use duet_events::bus::{PublishError, PublishErrorKind};
use duet_events::cloudevent::{EnvelopeError, WrapContext, decode};
use duet_events::outbox::Accepted;
use http::header::HeaderValue;
use http::{HeaderName, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;

use super::api::Api;
use super::problem::Problem;
use crate::http::body::Body;

/// Where an accepted event lies: `bus` or `outbox`.
const ACCEPTED: HeaderName = HeaderName::from_static("duet-accepted");

/// Longest name of a bus or topic.
const MAX_NAME_BYTES: usize = 255;
/// A publisher must send its whole body within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// An accepted publish.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    spooled: bool,
}

impl Done {
    /// For the metric and the header.
    pub(super) fn label(self) -> &'static str {
        if self.spooled { "outbox" } else { "bus" }
    }

    /// 204, as in Dapr.
    pub(super) fn response(self) -> Response<Body> {
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::NO_CONTENT;
        response.headers_mut().insert(ACCEPTED, HeaderValue::from_static(self.label()));
        response
    }
}

/// The metric's word for a refusal.
pub(super) fn label(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST | StatusCode::UNSUPPORTED_MEDIA_TYPE => "invalid",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::FORBIDDEN => "denied",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        StatusCode::TOO_MANY_REQUESTS => "full",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        _ => "failed",
    }
}

/// A bus's or topic's name in a path.
pub(super) fn name(segment: &str) -> Result<String, Problem> {
    let decoded = percent_encoding::percent_decode_str(segment).decode_utf8();
    let bad = |text: String| Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text);
    let decoded = decoded.map_err(|_err| bad(format!("{segment:?} is not UTF-8")))?;
    if decoded.is_empty() || decoded.contains('/') {
        return Err(bad("the path is /v1.0/publish/{bus}/{topic}".to_owned()));
    }
    // As the bus itself has it: what is accepted into the outbox must not be refused later.
    if decoded.len() > MAX_NAME_BYTES
        || decoded.contains(|c: char| c.is_control() || c.is_whitespace())
    {
        return Err(bad(format!(
            "a bus or topic has a name of at most {MAX_NAME_BYTES} bytes, without white space and control characters"
        )));
    }
    Ok(decoded.into_owned())
}

/// Checks, stores, and only then says so.
pub(super) async fn publish(
    api: &Api,
    bus: &str,
    topic: &str,
    request: Request<Incoming>,
) -> Result<Done, Problem> {
    let publisher = api.buses.publisher(bus, topic)?;
    refuse_metadata(request.uri().query().unwrap_or_default())?;
    let (head, body) = request.into_parts();
    let body = read(body, api.config.max_body_bytes).await?;
    let source = api.config.services.first().map_or("duet", String::as_str);
    let context = WrapContext { source, bus, topic, now: jiff::Timestamp::now() };
    let events = decode(&head.headers, body, &context).map_err(|error| malformed(&error))?;
    match publisher.publish(topic, events).await {
        Ok(Accepted::Stored(_)) => Ok(Done { spooled: false }),
        Ok(Accepted::Spooled) => Ok(Done { spooled: true }),
        Err(error) => Err(refused(error)),
    }
}

/// What a publisher asks for and does not get must not pass in silence.
fn refuse_metadata(query: &str) -> Result<(), Problem> {
    let mut names = query.split('&').map(|pair| pair.split('=').next().unwrap_or_default());
    let Some(name) = names.find(|name| name.starts_with("metadata.")) else {
        return Ok(());
    };
    let text = format!("{name:?} is not supported");
    let mut problem = Problem::new(StatusCode::BAD_REQUEST, "ERR_PUBSUB_REQUEST_METADATA", text);
    problem.attribute = Some(name.to_owned());
    Err(problem)
}

async fn read(body: Incoming, limit: usize) -> Result<Bytes, Problem> {
    let read = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await;
    let Ok(read) = read else {
        let text = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
        return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "ERR_MALFORMED_REQUEST", text));
    };
    match read {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            let text = format!("the body is larger than {limit} bytes");
            Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "ERR_BODY_TOO_LARGE", text))
        }
        Err(error) => {
            let text = format!("the body ended early: {error}");
            Err(Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text))
        }
    }
}

fn malformed(error: &EnvelopeError) -> Problem {
    let status = match error.is_unsupported_format() {
        true => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        false => StatusCode::BAD_REQUEST,
    };
    let mut problem = Problem::new(status, "ERR_PUBSUB_CLOUD_EVENTS_SER", error.to_string());
    problem.attribute = error.attribute().map(str::to_owned);
    problem
}

fn refused(error: PublishError) -> Problem {
    let (status, code, retry_after) = match error.kind {
        PublishErrorKind::UnknownBus => (StatusCode::NOT_FOUND, "ERR_PUBSUB_NOT_FOUND", None),
        PublishErrorKind::UnknownTopic => (StatusCode::NOT_FOUND, "ERR_TOPIC_NOT_FOUND", None),
        PublishErrorKind::Denied => (StatusCode::FORBIDDEN, "ERR_PUBSUB_FORBIDDEN", None),
        PublishErrorKind::Invalid => (StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", None),
        PublishErrorKind::Full => (StatusCode::TOO_MANY_REQUESTS, "ERR_PUBSUB_FULL", Some(1)),
        PublishErrorKind::Unavailable => {
            (StatusCode::SERVICE_UNAVAILABLE, "ERR_PUBSUB_PUBLISH_MESSAGE", Some(1))
        }
        PublishErrorKind::Internal => {
            (StatusCode::INTERNAL_SERVER_ERROR, "ERR_PUBSUB_PUBLISH_MESSAGE", None)
        }
    };
    let mut problem = Problem::new(status, code, error.message);
    problem.retry_after = retry_after;
    problem
}
