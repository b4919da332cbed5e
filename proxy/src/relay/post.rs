//! The receiver that posts events to the application over HTTP.

use bytes::Bytes;
use duet_events::bus::{AppAnswer, Delivery, SubscriptionSpec};
use duet_events::cloudevent::{STRUCTURED_CONTENT_TYPE, encode_structured};
use futures::future::{BoxFuture, FutureExt as _};
use http::header::{self, HeaderValue};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt as _, Limited};

use super::app::App;
use super::bulk;
use super::receive::{Receiver, Work};
use crate::error::Progress;
use crate::http::body::Body;

/// Most that is read of an answer: room for the statuses of the largest bulk.
const MAX_ANSWER_BYTES: usize = 2 << 20;

/// Posts events of one subscription.
#[derive(Debug)]
pub(super) struct Post {
    spec: SubscriptionSpec,
    app: App,
}

impl Receiver for Post {
    fn deliver<'a>(&'a self, work: &'a Work, answers: &'a mut Vec<AppAnswer>) -> BoxFuture<'a, ()> {
        async move {
            if self.spec.bulk.is_some() {
                *answers = self.post_bulk(work).await;
                return;
            }
            for delivery in &work.deliveries {
                answers.push(self.post(delivery, work).await);
            }
        }
        .boxed()
    }
}

impl Post {
    pub(super) fn new(spec: SubscriptionSpec, app: App) -> Self {
        Self { spec, app }
    }

    async fn post(&self, delivery: &Delivery, work: &Work) -> AppAnswer {
        let request = match self.request(delivery, work) {
            Ok(request) => request,
            Err(reason) => return AppAnswer::NoAnswer { reason },
        };
        match self.send(request).await {
            Ok((status, body)) => AppAnswer::from_http(status, &body),
            Err(answer) => answer,
        }
    }

    async fn post_bulk(&self, work: &Work) -> Vec<AppAnswer> {
        let count = work.deliveries.len();
        let request = match self.bulk_request(work) {
            Ok(request) => request,
            Err(reason) => return vec![AppAnswer::NoAnswer { reason }; count],
        };
        match self.send(request).await {
            Ok((status, body)) => bulk::answers(status, &body, &work.deliveries),
            Err(answer) => vec![answer; count],
        }
    }

    fn bulk_request(&self, work: &Work) -> Result<Request<Body>, String> {
        let first = work.deliveries.first().ok_or("nothing to deliver")?;
        let mut request = Request::new(full(bulk::encode(&self.spec, &work.deliveries)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path(first)?;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        work.name(headers);
        Ok(request)
    }

    /// Status and body of the answer; an answer of its own where there was none.
    async fn send(&self, request: Request<Body>) -> Result<(u16, Bytes), AppAnswer> {
        let response = match self.app.send(request).await {
            Ok(answered) => answered,
            Err(failure) if failure.progress == Progress::Unprocessed => {
                return Err(AppAnswer::NotReached);
            }
            Err(failure) => {
                return Err(AppAnswer::NoAnswer { reason: failure.to_string() });
            }
        };
        let status = response.status().as_u16();
        match Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            // Too long to be a status word, or cut off: the status line has said enough.
            Err(_error) => Ok((status, Bytes::new())),
        }
    }

    fn request(&self, delivery: &Delivery, work: &Work) -> Result<Request<Body>, String> {
        let event = &delivery.event;
        let (content_type, body) = if self.spec.raw_payload {
            let kind = event.data_content_type().unwrap_or("application/octet-stream");
            (kind, event.data().cloned().unwrap_or_default())
        } else {
            let extra =
                [("pubsubname", self.spec.bus.as_str()), ("topic", self.spec.topic.as_str())];
            (STRUCTURED_CONTENT_TYPE, encode_structured(event, &extra))
        };
        let mut request = Request::new(full(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path(delivery)?;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, value(content_type)?);
        work.describe(delivery, headers);
        Ok(request)
    }

    /// Where the bus's routes send it, or else where the subscription does.
    fn path(&self, delivery: &Delivery) -> Result<Uri, String> {
        let path = delivery.path.as_ref().unwrap_or(&self.spec.path);
        path.parse::<Uri>().map_err(|error| format!("path {path:?}: {error}"))
    }
}

fn full(body: Bytes) -> Body {
    if body.is_empty() { Body::Empty } else { Body::Full(body) }
}

fn value(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|error| format!("{text:?}: {error}"))
}
