//! The receiver that posts events to the application over HTTP.

use bytes::Bytes;
use duet_events::bus::{AppAnswer, Delivery, SubscriptionSpec};
use duet_events::cloudevent::{EnvelopeError, Event, STRUCTURED_CONTENT_TYPE, encode_structured};
use futures::future::{BoxFuture, FutureExt as _};
use http::header::{self, HeaderValue};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};

use super::app::App;
use super::bulk;
use super::extend::Extensions;
use super::receive::{Receiver, Work};
use crate::error::Progress;

/// Most that is read of an answer: room for the statuses of the largest bulk.
const MAX_ANSWER_BYTES: usize = 2 << 20;

/// Posts events of one subscription.
#[derive(Debug)]
pub(super) struct Post {
    spec: SubscriptionSpec,
    app: App,
    extensions: Extensions,
}

impl Receiver for Post {
    fn deliver<'a>(&'a self, work: &'a Work, answers: &'a mut Vec<AppAnswer>) -> BoxFuture<'a, ()> {
        async move {
            if self.spec.bulk.is_some() {
                *answers = self.post_bulk(work, answers).await;
                return;
            }
            for delivery in &work.deliveries {
                let answer = self.post(delivery, work, answers).await;
                answers.push(answer);
            }
        }
        .boxed()
    }
}

impl Post {
    pub(super) fn new(spec: SubscriptionSpec, app: App, extensions: Extensions) -> Self {
        Self { spec, app, extensions }
    }

    async fn post(
        &self,
        delivery: &Delivery,
        work: &Work,
        answers: &mut Vec<AppAnswer>,
    ) -> AppAnswer {
        let request = match self.request(delivery, work) {
            Ok(request) => request,
            Err(reason) => return AppAnswer::NoAnswer { reason },
        };
        match self.send(request, work, answers).await {
            Ok((status, body)) => AppAnswer::from_http(status, &body),
            Err(answer) => answer,
        }
    }

    async fn post_bulk(&self, work: &Work, answers: &mut Vec<AppAnswer>) -> Vec<AppAnswer> {
        let count = work.deliveries.len();
        let request = match self.bulk_request(work) {
            Ok(request) => request,
            Err(reason) => return vec![AppAnswer::NoAnswer { reason }; count],
        };
        match self.send(request, work, answers).await {
            Ok((status, body)) => bulk::answers(status, &body, &work.deliveries),
            Err(answer) => vec![answer; count],
        }
    }

    fn bulk_request(&self, work: &Work) -> Result<Request<Bytes>, String> {
        let first = work.deliveries.first().ok_or("nothing to deliver")?;
        let mut request = Request::new(bulk::encode(&self.spec, &work.deliveries));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path(first)?;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        work.name(headers);
        Ok(request)
    }

    /// Status and body of the answer; an answer of its own where there was none. What waits for an application that takes
    /// no more at once has not been seen by it: should its time run out, no attempt is spent. All of its time begins when
    /// it is taken.
    async fn send(
        &self,
        request: Request<Bytes>,
        work: &Work,
        answers: &mut Vec<AppAnswer>,
    ) -> Result<(u16, Bytes), AppAnswer> {
        let before = answers.len();
        answers.resize(work.deliveries.len(), AppAnswer::NotNow);
        let mut seen = false;
        let taken = || {
            seen = true;
            answers.truncate(before);
            self.extensions.renew(&work.token);
        };
        let sent = self.app.hand(request, taken).await;
        answers.truncate(before);
        let response = match sent {
            Ok(answered) => answered,
            Err(failure) if failure.progress == Progress::Unprocessed => {
                return Err(AppAnswer::NotReached);
            }
            // The connection ended while it waited.
            Err(failure) if failure.stale && !seen => return Err(AppAnswer::NotNow),
            Err(failure) => {
                return Err(AppAnswer::NoAnswer { reason: failure.to_string() });
            }
        };
        let status = response.status().as_u16();
        match Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            // Too long to be a status word: the status line has said enough. So has one that is no success, of which nobody
            // reads more.
            Err(error) if error.is::<LengthLimitError>() || !(200..300).contains(&status) => {
                Ok((status, Bytes::new()))
            }
            Err(error) => {
                let reason = format!("the answer broke off after its status {status}: {error}");
                Err(AppAnswer::NoAnswer { reason })
            }
        }
    }

    fn request(&self, delivery: &Delivery, work: &Work) -> Result<Request<Bytes>, String> {
        let body = envelope(&self.spec, &delivery.event).map_err(|error| error.to_string())?;
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path(delivery)?;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(STRUCTURED_CONTENT_TYPE));
        work.describe(delivery, headers);
        Ok(request)
    }

    /// Where the bus's routes send it, or else where the subscription does.
    fn path(&self, delivery: &Delivery) -> Result<Uri, String> {
        let path = delivery.path.as_ref().unwrap_or(&self.spec.path);
        path.parse::<Uri>().map_err(|error| format!("path {path:?}: {error}"))
    }
}

fn envelope(spec: &SubscriptionSpec, event: &Event) -> Result<Bytes, EnvelopeError> {
    let extra = [("pubsubname", spec.bus.as_str()), ("topic", spec.topic.as_str())];
    Ok(match spec.raw_payload {
        true => encode_structured(&opaque(event)?, &extra),
        false => encode_structured(event, &extra),
    })
}

/// What Dapr makes of a raw payload: an envelope around the bytes, which says nothing about what they are.
fn opaque(event: &Event) -> Result<Event, EnvelopeError> {
    let opaque = Event::new(event.id(), event.source(), "com.dapr.event.sent")?;
    let opaque = opaque.with_attribute("datacontenttype", "application/octet-stream")?;
    Ok(opaque.with_data(event.data().cloned().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_payload_comes_as_bytes_in_daprs_envelope() {
        let spec = SubscriptionSpec::new("a/b", "pubsub", "readings").unwrap();
        let raw = SubscriptionSpec { raw_payload: true, ..spec };
        let event = Event::new("1", "/s", "own.type").unwrap();
        let event = event.with_attribute("datacontenttype", "application/json").unwrap();
        for (data, base64) in [(Some("{\"a\": 1}"), "eyJhIjogMX0="), (None, "")] {
            let event = data.map_or(event.clone(), |data| event.clone().with_data(data));
            let sent: serde_json::Value =
                serde_json::from_slice(&envelope(&raw, &event).unwrap()).unwrap();
            let expected = serde_json::json!({
                "specversion": "1.0", "id": "1", "source": "/s", "type": "com.dapr.event.sent",
                "datacontenttype": "application/octet-stream", "pubsubname": "pubsub",
                "topic": "readings", "data_base64": base64,
            });
            assert_eq!(sent, expected);
        }
    }
}
