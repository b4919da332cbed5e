//! An application that speaks Dapr's `AppCallback`: what it subscribes to, and its events.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use duet_api::dapr::runtime::v1::{
    ListTopicSubscriptionsResponse, TopicEventBulkRequest, TopicEventBulkResponse,
    TopicEventResponse, TopicSubscription,
};
use duet_events::bus::{AppAnswer, Delivery, SubscriptionSpec};
use futures::future::{BoxFuture, FutureExt as _};
use http::Request;
use parking_lot::Mutex;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use prost::Message;
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::super::app::App;
use super::super::extend::Extensions;
use super::super::receive::{Receiver, Work};
use super::topic_event;
use crate::error::Progress;
use crate::http::grpc;

const LIST: &str = "/dapr.proto.runtime.v1.AppCallback/ListTopicSubscriptions";
const ON_TOPIC_EVENT: &str = "/dapr.proto.runtime.v1.AppCallback/OnTopicEvent";
const ON_BULK_TOPIC_EVENT: &str = "/dapr.proto.runtime.v1.AppCallback/OnBulkTopicEvent";
/// Its name before it was stable, which is the one that most SDKs serve.
const ON_BULK_TOPIC_EVENT_ALPHA: &str =
    "/dapr.proto.runtime.v1.AppCallbackAlpha/OnBulkTopicEventAlpha1";
/// Before the words of the application for its handlers.
const ROUTE: &str = "/dapr-route/";
/// Largest answer.
const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// Of an event whose time ran out.
const NO_ANSWER: &str = "no answer in time";
const LIST_TIMEOUT: Duration = Duration::from_secs(5);

/// What the application subscribes to, in the shape of an HTTP application's answer to `GET /dapr/subscribe`.
///
/// # Errors
/// When it did not answer.
pub(in super::super) async fn ask(app: &App) -> Result<Bytes, String> {
    let entries: Vec<Value> = list(app).await?.iter().map(entry).collect();
    Ok(Value::Array(entries).to_string().into())
}

fn entry(subscription: &TopicSubscription) -> Value {
    let routes = subscription.routes.clone().unwrap_or_default();
    let rules = routes.rules.iter();
    let rules: Vec<_> =
        rules.map(|rule| json!({"match": rule.r#match, "path": route(&rule.path)})).collect();
    // As in Dapr: an application that says nothing about routes has one handler, without a name.
    let unnamed = routes.default.is_empty() && !rules.is_empty();
    let default = Some(route(&routes.default)).filter(|_| !unnamed);
    let dead = &subscription.dead_letter_topic;
    let bulk = subscription.bulk_subscribe.as_ref().map(|bulk| {
        json!({
            "enabled": bulk.enabled,
            "maxMessagesCount": Some(bulk.max_messages_count).filter(|count| *count > 0),
            "maxAwaitDurationMs": Some(bulk.max_await_duration_ms).filter(|time| *time > 0),
        })
    });
    json!({
        "pubsubname": subscription.pubsub_name,
        "topic": subscription.topic,
        "routes": {"default": default, "rules": rules},
        "deadLetterTopic": Some(dead).filter(|topic| !topic.is_empty()),
        "metadata": subscription.metadata,
        "bulkSubscribe": bulk,
    })
}

/// The application's own word for a handler, which may be anything and is often empty, as a path.
fn route(own: &str) -> String {
    format!("{ROUTE}{}", utf8_percent_encode(own, NON_ALPHANUMERIC))
}

/// The application's own word again; the path of a declared subscription is one already.
fn own_route(path: &str) -> String {
    match path.strip_prefix(ROUTE) {
        Some(own) => percent_decode_str(own).decode_utf8_lossy().into_owned(),
        None => path.to_owned(),
    }
}

/// Nothing when the application does not serve the callback.
async fn list(app: &App) -> Result<Vec<TopicSubscription>, String> {
    let listed = async {
        let response = app.send(grpc::request(LIST, &())).await;
        let response = response.map_err(|failure| failure.to_string())?;
        match grpc::answer::<ListTopicSubscriptionsResponse>(response, MAX_ANSWER_BYTES).await {
            Ok((_metadata, answer)) => Ok(answer.subscriptions),
            Err(status) if status.code() == Code::Unimplemented => Ok(Vec::new()),
            Err(status) => Err(status.to_string()),
        }
    };
    let listed = tokio::time::timeout(LIST_TIMEOUT, listed).await;
    listed.unwrap_or_else(|_elapsed| Err("no answer".to_owned()))
}

/// Hands events of one subscription to the application's `OnTopicEvent`.
#[derive(Debug)]
pub(in super::super) struct Callback {
    spec: SubscriptionSpec,
    app: App,
    extensions: Extensions,
    /// Whether the application answered by the older name of the bulk call when it last answered.
    alpha: AtomicBool,
}

/// What the application says; an answer of its own where it says nothing.
type Said<M> = Result<Result<M, Status>, AppAnswer>;

impl Receiver for Callback {
    fn deliver<'a>(&'a self, work: &'a Work, answers: &'a mut Vec<AppAnswer>) -> BoxFuture<'a, ()> {
        async move {
            if self.spec.bulk.is_some()
                && let Some(all) = self.call_bulk(work, answers).await
            {
                *answers = all;
                return;
            }
            // Should the time run out, those that the application was never told of spend no attempt.
            answers.clear();
            answers.resize(work.deliveries.len(), AppAnswer::NotReached);
            for (delivery, answer) in work.deliveries.iter().zip(answers) {
                self.extensions.renew(&work.token);
                *answer = AppAnswer::NotNow;
                let taken = || self.taken(work, std::slice::from_mut(answer));
                *answer = self.call(delivery, work, taken).await;
            }
        }
        .boxed()
    }
}

impl Callback {
    pub(in super::super) fn new(spec: SubscriptionSpec, app: App, extensions: Extensions) -> Self {
        Self { spec, app, extensions, alpha: AtomicBool::new(false) }
    }

    /// The application may have seen these from now on, and has all of the time for them.
    fn taken(&self, work: &Work, answers: &mut [AppAnswer]) {
        answers.fill(AppAnswer::NoAnswer { reason: NO_ANSWER.to_owned() });
        self.extensions.renew(&work.token);
    }

    async fn call(
        &self,
        delivery: &Delivery,
        work: &Work,
        taken: impl FnOnce() + Send,
    ) -> AppAnswer {
        let request = event_request(&self.spec, delivery, work);
        match self.send::<TopicEventResponse>(request, taken).await {
            Ok(Ok(response)) => topic_event::outcome(Some(response)),
            Ok(Err(status)) => topic_event::failure(&status),
            Err(answer) => answer,
        }
    }

    /// `None` when the application has no handler for several events, as most SDKs: it gets them one by one.
    async fn call_bulk(&self, work: &Work, answers: &mut Vec<AppAnswer>) -> Option<Vec<AppAnswer>> {
        let deliveries = &work.deliveries;
        let events = bulk(&self.spec, deliveries);
        let same = |answer: AppAnswer| vec![answer; deliveries.len()];
        *answers = same(AppAnswer::NotNow);
        let answers = Mutex::new(answers);
        let taken = || self.taken(work, &mut answers.lock());
        let call =
            |name| self.send::<TopicEventBulkResponse>(bulk_request(name, &events, work), taken);
        Some(match by_either_name(&self.alpha, call).await? {
            Ok(Ok(response)) => topic_event::outcomes(&response, deliveries),
            Ok(Err(status)) => same(topic_event::failure(&status)),
            Err(answer) => same(answer),
        })
    }

    async fn send<M: Message + Default>(
        &self,
        request: Request<Bytes>,
        taken: impl FnOnce() + Send,
    ) -> Said<M> {
        let mut seen = false;
        let sent = self.app.hand(request, || {
            seen = true;
            taken();
        });
        let response = match sent.await {
            Ok(response) => response,
            Err(failure) if failure.progress == Progress::Unprocessed => {
                return Err(AppAnswer::NotReached);
            }
            // The connection ended while it waited.
            Err(failure) if failure.stale && !seen => return Err(AppAnswer::NotNow),
            Err(failure) => return Err(AppAnswer::NoAnswer { reason: failure.to_string() }),
        };
        let answer = grpc::answer::<M>(response, MAX_ANSWER_BYTES).await;
        Ok(answer.map(|(_metadata, response)| response).inspect_err(|status| {
            tracing::debug!(subscription = self.spec.name, %status, "the application failed");
        }))
    }
}

fn event_request(spec: &SubscriptionSpec, delivery: &Delivery, work: &Work) -> Request<Bytes> {
    let mut event = topic_event::request(delivery, spec);
    event.path = own_route(&event.path);
    let mut request = grpc::request(ON_TOPIC_EVENT, &event);
    work.describe(delivery, request.headers_mut());
    request
}

/// Calls by the name that the application answered to before, then by the other one. `None` when it knows neither.
async fn by_either_name<M, F>(
    alpha: &AtomicBool,
    call: impl Fn(&'static str) -> F,
) -> Option<Said<M>>
where
    F: Future<Output = Said<M>>,
{
    let before = alpha.load(Ordering::Relaxed);
    for older in [before, !before] {
        let name = if older { ON_BULK_TOPIC_EVENT_ALPHA } else { ON_BULK_TOPIC_EVENT };
        let said = call(name).await;
        if matches!(&said, Ok(Err(status)) if status.code() == Code::Unimplemented) {
            continue;
        }
        if said.is_ok() {
            alpha.store(older, Ordering::Relaxed);
        }
        return Some(said);
    }
    None
}

fn bulk(spec: &SubscriptionSpec, deliveries: &[Delivery]) -> TopicEventBulkRequest {
    let mut events = topic_event::bulk(deliveries, spec);
    events.path = own_route(&events.path);
    events
}

fn bulk_request(name: &'static str, events: &TopicEventBulkRequest, work: &Work) -> Request<Bytes> {
    let mut request = grpc::request(name, events);
    work.name(request.headers_mut());
    request
}

#[cfg(test)]
mod tests {
    use duet_events::Event;

    use super::*;

    #[test]
    fn the_metadata_names_the_delivery_and_counts_the_attempt() {
        let spec = SubscriptionSpec::new("a/b", "default", "news").unwrap();
        let event = Event::new("1", "/s", "t").unwrap();
        let event = event.with_attribute("traceparent", "00-1-2-01").unwrap();
        let event = event.with_attribute("tracestate", "a=b").unwrap();
        let delivery =
            Delivery { id: 1, position: 1, attempt: 3, generation: 0, event, path: None };
        let work = Work { token: "word".to_owned(), deliveries: vec![delivery] };
        let request = event_request(&spec, &work.deliveries[0], &work);
        assert_eq!(request.headers()["duet-delivery-attempt"], "3");
        assert_eq!(request.headers()["duet-delivery"], "word");
        assert_eq!(request.headers()["traceparent"], "00-1-2-01");
        assert_eq!(request.headers()["tracestate"], "a=b");
        // The attempts of a bulk are its entries'.
        let request = bulk_request(ON_BULK_TOPIC_EVENT, &bulk(&spec, &work.deliveries), &work);
        assert_eq!(request.headers()["duet-delivery"], "word");
        assert!(!request.headers().contains_key("duet-delivery-attempt"));
    }

    #[tokio::test]
    async fn a_bulk_is_called_by_the_name_that_the_application_serves() {
        // What the application says to a name, and by which names it is called.
        let alpha = AtomicBool::new(false);
        let called = Mutex::new(Vec::new());
        let ask = async |serves: &'static str, fails: Option<AppAnswer>| {
            let said = by_either_name(&alpha, |name: &'static str| {
                called.lock().push(name);
                let served = name.contains(serves);
                let unknown = Err(Status::unimplemented("no such method"));
                let said = if served { fails.clone().map_or(Ok(Ok(())), Err) } else { Ok(unknown) };
                std::future::ready(said)
            });
            let said = said.await;
            (said.map(|said| said.is_ok()), std::mem::take(&mut *called.lock()))
        };
        let (stable, older) = (ON_BULK_TOPIC_EVENT, ON_BULK_TOPIC_EVENT_ALPHA);
        assert_eq!(ask("AppCallback/", None).await, (Some(true), vec![stable]));
        assert_eq!(ask("neither", None).await, (None, vec![stable, older]));
        // One that is not there now says nothing about its names.
        let away = Some(AppAnswer::NotReached);
        assert_eq!(ask("AppCallbackAlpha/", away).await, (Some(false), vec![stable, older]));
        assert_eq!(ask("AppCallbackAlpha/", None).await, (Some(true), vec![stable, older]));
        assert_eq!(ask("AppCallbackAlpha/", None).await, (Some(true), vec![older]));
        // Its next version.
        assert_eq!(ask("AppCallback/", None).await, (Some(true), vec![older, stable]));
        assert_eq!(ask("AppCallback/", None).await, (Some(true), vec![stable]));
    }

    #[test]
    fn the_application_s_words_for_its_handlers_come_back_as_they_were() {
        for own in ["", "/", "handler", "/a/b", "with space", "100%", "ü"] {
            let path = route(own);
            assert!(path.parse::<http::Uri>().is_ok(), "{path}");
            assert_eq!(own_route(&path), own);
        }
        assert_eq!(own_route("/events/orders"), "/events/orders");
    }
}
