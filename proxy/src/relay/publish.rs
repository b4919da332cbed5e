//! Publishing: from the application's request to a durable event.
//!
//! [`options`] is what a publisher may ask for beside its event, [`store`] is the way of every publish, and this file is
//! the one of `POST /v1.0/publish/{bus}/{topic}`; [`bulk`] is that of many events with a result for each.

pub(super) mod bulk;
pub(super) mod options;
pub(super) mod store;

use http::header::HeaderValue;
use http::{HeaderName, Request, Response, StatusCode};
use hyper::body::Incoming;

use super::problem::Problem;
use crate::http::body::Body;
use crate::http::deadline;
use crate::http::leftover::Coming;
use options::Options;
use store::{Done, Publishing};

/// Where an accepted event lies: `bus` or `outbox`.
const ACCEPTED: HeaderName = HeaderName::from_static("duet-accepted");

/// Checks, stores, and only then says so: 204, as in Dapr.
pub(super) async fn single(
    publishing: &Publishing,
    (bus, topic): (&str, &str),
    request: &mut Request<Coming<Incoming>>,
) -> Result<Response<Body>, Problem> {
    let events = async {
        publishing.check(bus, topic)?;
        let options = Options::from_query(request.uri().query().unwrap_or_default())?;
        store::check_encoding(request.headers())?;
        let left = deadline::read(request.headers(), false);
        let (body, room) = publishing.body(request.body_mut()).await?.split();
        Ok((publishing.read((bus, topic), request.headers(), body, &options, left)?, room))
    };
    let (events, _room) =
        events.await.inspect_err(|problem| publishing.count_refused(bus, topic, problem))?;
    let done = publishing.store(bus, topic, events).await?;
    Ok(accepted(done))
}

fn accepted(done: Done) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(ACCEPTED, HeaderValue::from_static(done.label()));
    response
}
