//! One subscription of this replica: pulls events from the bus while the application is there, posts each, and
//! tells the bus what came of it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use duet_events::bus::{
    AppAnswer, ConsumeError, Consumer, Delivery, EventBus, Settle, SubscriptionSpec, on_answer,
};
use duet_events::cloudevent::{STRUCTURED_CONTENT_TYPE, encode_structured};
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt as _, Limited};
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::app::App;
use super::metrics::EventMetrics;
use crate::error::Progress;
use crate::http::body::Body;
use crate::http::headers::TRACEPARENT;

/// Number of the try, from 1.
const ATTEMPT: HeaderName = HeaderName::from_static("duet-delivery-attempt");
/// Most that is read of an answer; the status word comes at its start.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Wait before pulling again after the application was not there.
const AWAY_PAUSE: Duration = Duration::from_millis(200);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Consumption {
    bus: Arc<dyn EventBus>,
    app_ready: watch::Receiver<bool>,
    errors: IntCounterVec,
    post: Arc<Post>,
}

/// Why a consumer ended.
enum End {
    Stopped,
    AppAway,
    Broken(ConsumeError),
}

impl Consumption {
    pub(super) fn new(
        spec: SubscriptionSpec,
        bus: Arc<dyn EventBus>,
        app: App,
        app_ready: watch::Receiver<bool>,
        metrics: &EventMetrics,
    ) -> Self {
        let (errors, post) = (metrics.refused.clone(), Arc::new(Post::new(spec, app, metrics)));
        Self { bus, app_ready, errors, post }
    }

    /// Consumes until `stop`; then finishes what is in flight, and the rest goes back unspent.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                here = self.app_ready.wait_for(|ready| *ready) => if here.is_err() { return },
            }
            let spec = self.post.spec.clone();
            let bus = Arc::clone(&self.bus);
            let opened = tokio::select! {
                opened = bus.consume(spec) => opened,
                () = stop.cancelled() => return,
            };
            let end = match opened {
                Ok(consumer) => {
                    backoff = FIRST_BACKOFF;
                    self.consume(consumer, &stop).await
                }
                Err(error) => End::Broken(error),
            };
            let pause = match end {
                End::Stopped => return,
                End::AppAway => AWAY_PAUSE,
                End::Broken(error) => self.broken(&error, &mut backoff),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Reports a consumer that broke; how long to wait before the next one.
    fn broken(&self, error: &ConsumeError, backoff: &mut Duration) -> Duration {
        self.errors.with_label_values(&["bus"]).inc();
        let subscription = &self.post.spec.name;
        if error.is_retryable() {
            tracing::info!(%error, subscription, "no events for now; trying again");
        } else {
            tracing::error!(%error, subscription, "the bus refuses the subscription");
            *backoff = LONGEST_BACKOFF;
        }
        let pause = backoff.mul_f64(0.5 + rand::random::<f64>());
        *backoff = (*backoff * 2).min(LONGEST_BACKOFF);
        pause
    }

    async fn consume(&mut self, mut consumer: Consumer, stop: &CancellationToken) -> End {
        let settler = consumer.settler();
        let mut open = JoinSet::new();
        let end = loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break End::Stopped,
                away = self.app_ready.wait_for(|ready| !*ready) => match away {
                    Ok(_) => break End::AppAway,
                    Err(_closed) => break End::Stopped,
                },
                settled = open.join_next(), if !open.is_empty() => {
                    // Not there, although the probe has not noticed: do not pull what cannot be delivered.
                    if matches!(settled, Some(Ok(false))) {
                        break End::AppAway;
                    }
                }
                next = consumer.next() => match next {
                    Some(Ok(delivery)) => {
                        let (post, settler) = (Arc::clone(&self.post), settler.clone());
                        open.spawn(async move {
                            let id = delivery.id;
                            let outcome = post.deliver(delivery).await;
                            let reached = !matches!(outcome, Settle::Release { .. });
                            settler.settle(id, outcome);
                            reached
                        });
                    }
                    Some(Err(error)) => break End::Broken(error),
                    None => {
                        let subscription = self.post.spec.name.clone();
                        let reason = "the bus ended the stream".to_owned();
                        break End::Broken(ConsumeError::Internal { subscription, reason });
                    }
                },
            }
        };
        // What the application has in hand is settled before the rest goes back.
        while open.join_next().await.is_some() {}
        end
    }
}

/// Posts events of one subscription.
#[derive(Debug)]
struct Post {
    spec: SubscriptionSpec,
    app: App,
    in_flight: IntGauge,
    duration: Histogram,
    acked: IntCounter,
    retried: IntCounter,
    released: IntCounter,
    dead: IntCounter,
}

impl Post {
    fn new(spec: SubscriptionSpec, app: App, metrics: &EventMetrics) -> Self {
        let name = spec.name.as_str();
        let delivered = |outcome| metrics.delivered.with_label_values(&[name, outcome]);
        Self {
            in_flight: metrics.in_flight.with_label_values(&[name]),
            duration: metrics.duration.with_label_values(&[name]),
            acked: delivered("ack"),
            retried: delivered("retry"),
            released: delivered("release"),
            dead: delivered("dead_letter"),
            app,
            spec,
        }
    }

    async fn deliver(&self, delivery: Delivery) -> Settle {
        let _guard = Counted::new(&self.in_flight);
        let timer = self.duration.start_timer();
        let attempt = delivery.attempt;
        let answer = tokio::time::timeout(self.spec.ack_timeout, self.post(&delivery)).await;
        timer.observe_duration();
        let answer = answer.unwrap_or_else(|_elapsed| AppAnswer::NoAnswer {
            reason: format!("no answer within {:?}", self.spec.ack_timeout),
        });
        let settle = on_answer(&answer, attempt, &self.spec, rand::random());
        match &settle {
            Settle::Ack => self.acked.inc(),
            Settle::Retry { .. } => self.retried.inc(),
            Settle::Release { .. } => self.released.inc(),
            Settle::DeadLetter { reason, .. } => {
                self.dead.inc();
                let (subscription, id) = (&self.spec.name, delivery.event.id());
                tracing::warn!(subscription, id, reason, attempt, "event goes to the dead letters");
            }
        }
        settle
    }

    async fn post(&self, delivery: &Delivery) -> AppAnswer {
        let request = match self.request(delivery) {
            Ok(request) => request,
            Err(reason) => return AppAnswer::NoAnswer { reason },
        };
        let response = match self.app.send(request).await {
            Ok(answered) => answered,
            Err(failure) if failure.progress == Progress::Unprocessed => {
                return AppAnswer::NotReached;
            }
            Err(failure) => {
                return AppAnswer::NoAnswer { reason: failure.to_string() };
            }
        };
        let status = response.status().as_u16();
        match Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await {
            Ok(body) => AppAnswer::from_http(status, &body.to_bytes()),
            // Too long to be a status word, or cut off: the status line has said enough.
            Err(_error) => AppAnswer::from_http(status, b""),
        }
    }

    fn request(&self, delivery: &Delivery) -> Result<Request<Body>, String> {
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
        *request.uri_mut() =
            self.spec.path.parse::<Uri>().map_err(|error| format!("path: {error}"))?;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, value(content_type)?);
        headers.insert(ATTEMPT, HeaderValue::from(delivery.attempt));
        // One that cannot be a header stays in the envelope only; it must not cost the event.
        if let Some(Ok(trace)) = event.attribute("traceparent").map(HeaderValue::from_str) {
            headers.insert(TRACEPARENT, trace);
        }
        Ok(request)
    }
}

fn full(body: Bytes) -> Body {
    if body.is_empty() { Body::Empty } else { Body::Full(body) }
}

fn value(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|error| format!("{text:?}: {error}"))
}

/// Counts a delivery in flight until dropped.
#[derive(Debug)]
struct Counted<'g>(&'g IntGauge);

impl<'g> Counted<'g> {
    fn new(gauge: &'g IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
