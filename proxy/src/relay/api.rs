//! The application's API: Dapr's HTTP paths for publishing, invoking and asking how things are.

use std::sync::Arc;

use bytes::Bytes;
use duet_api::proto::Workload;
use duet_events::bus::SubscriptionSpec;
use duet_events::outbox::Outbox;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::active::{Active, Kind};
use super::buses::Buses;
use super::grpc::Labels;
use super::hand::Aids;
use super::problem::Problem;
use super::publish::store::{self, Publishing};
use super::sse::Streams;
use super::{InvokeFn, RelayConfig, invoke, publish};
use crate::drain::Drain;
use crate::http::body::Body;
use crate::http::leftover::{self, Coming};

/// Dapr's other way to name the service to invoke.
pub(super) const DAPR_APP_ID: HeaderName = HeaderName::from_static("dapr-app-id");

/// Of a path, in an error.
const MAX_NAMED_CHARS: usize = 100;

/// As metadata tells it.
pub(super) const VERSION: &str = concat!("duet-", env!("CARGO_PKG_VERSION"));

pub(super) struct Api {
    pub(super) config: RelayConfig,
    pub(super) buses: Arc<Buses>,
    pub(super) publishing: Arc<Publishing>,
    pub(super) streams: Streams,
    pub(super) aids: Aids,
    pub(super) active: Active,
    pub(super) invoke: InvokeFn,
    pub(super) workload: watch::Receiver<Option<Arc<Workload>>>,
    pub(super) app_ready: watch::Receiver<bool>,
    pub(super) outbox: Arc<Outbox>,
    pub(super) drain: Drain,
    pub(super) labels: Labels,
}

impl Api {
    /// Answers one request.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let http1 = request.version() < Version::HTTP_2;
        let mut request = Coming::of(request);
        let bulk = ["/v1.0/publish/bulk/", "/v1.0-alpha1/publish/bulk/"];
        let answer = if let Some(rest) = bulk.iter().find_map(|bulk| bulk_path(&path, bulk)) {
            self.publish(rest, true, &mut request).await
        } else if let Some(rest) = path.strip_prefix("/v1.0/publish/") {
            self.publish(rest, false, &mut request).await
        } else if let Some(rest) = path.strip_prefix("/v1.0/subscribe/") {
            self.streams.answer(rest, &request).await
        } else if let Some(rest) = path.strip_prefix("/v1.0/deliveries/") {
            let query = request.uri().query().unwrap_or_default();
            self.aids.extensions.answer(rest, request.method(), query)
        } else if let Some(key) = path.strip_prefix("/v1.0/metadata/") {
            self.set_metadata(key, &mut request).await
        } else if let Some(rest) = path.strip_prefix("/v1.0/invoke/") {
            match invoke::by_path(rest, &mut request) {
                Ok(()) => return self.carry(request).await,
                Err(problem) => Err(problem),
            }
        } else {
            match (path.as_str(), request.method()) {
                ("/v1.0/healthz", &Method::GET) => Ok(self.health(true)),
                ("/v1.0/healthz/outbound", &Method::GET) => Ok(self.health(false)),
                ("/v1.0/metadata", &Method::GET) => Ok(self.metadata()),
                ("/v1.0/shutdown", &Method::POST) => self.shutdown(&request),
                _ if request.headers().contains_key(DAPR_APP_ID) => {
                    match invoke::by_header(&DAPR_APP_ID, &mut request) {
                        Ok(()) => return self.carry(request).await,
                        Err(problem) => Err(problem),
                    }
                }
                (_, method) => Err(unknown(method, &path)),
            }
        };
        let mut response = answer.unwrap_or_else(Problem::response);
        if http1 && !request.into_body().discard(&self.drain.outbound_tasks).await {
            leftover::close(response.headers_mut());
        }
        response
    }

    /// Into the mesh.
    async fn carry(&self, request: Request<Coming<Incoming>>) -> Response<Body> {
        (self.invoke)(request.map(|body| body.whole().into())).await
    }

    async fn publish(
        &self,
        rest: &str,
        bulk: bool,
        request: &mut Request<Coming<Incoming>>,
    ) -> Result<Response<Body>, Problem> {
        if !matches!(*request.method(), Method::POST | Method::PUT) {
            let text = "publish with POST";
            let status = StatusCode::METHOD_NOT_ALLOWED;
            return Err(Problem::new(status, "ERR_METHOD_NOT_ALLOWED", text));
        }
        let target = store::target(rest)?;
        let target = (target.0.as_str(), target.1.as_str());
        match bulk {
            true => publish::bulk::bulk(&self.publishing, target, request).await,
            false => publish::single(&self.publishing, target, request).await,
        }
    }

    /// Takes what the application says about itself, as `SetMetadata` does.
    async fn set_metadata(
        &self,
        key: &str,
        request: &mut Request<Coming<Incoming>>,
    ) -> Result<Response<Body>, Problem> {
        if *request.method() != Method::PUT {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            return Err(Problem::new(status, "ERR_METHOD_NOT_ALLOWED", "set metadata with PUT"));
        }
        let (value, _room) = self.publishing.body(request.body_mut()).await?.split();
        let key = percent_encoding::percent_decode_str(key).decode_utf8();
        let (Ok(key), Ok(value)) = (key, std::str::from_utf8(&value)) else {
            let text = "the key or its value is not UTF-8";
            return Err(Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text));
        };
        self.labels.set(key.into_owned(), value.to_owned())?;
        Ok(no_content())
    }

    fn shutdown<B>(&self, request: &Request<B>) -> Result<Response<Body>, Problem> {
        if request.headers().contains_key(header::ORIGIN) {
            // No page ends a sidecar, of this machine either; no application has an origin.
            let text = "a web page cannot end this sidecar";
            return Err(Problem::new(StatusCode::FORBIDDEN, "ERR_FORBIDDEN", text));
        }
        self.shut_down();
        Ok(no_content())
    }

    /// Leaves, as for a signal.
    pub(super) fn shut_down(&self) {
        tracing::info!("the application asks this sidecar to leave");
        self.drain.inbound.cancel();
    }

    /// `with_app`: the application counts too.
    pub(super) fn is_ready(&self, with_app: bool) -> bool {
        self.workload.borrow().is_some() && (!with_app || *self.app_ready.borrow())
    }

    /// What metadata says of this sidecar, besides what the application set.
    pub(super) fn extended(&self) -> [(String, String); 2] {
        [
            ("namespace".to_owned(), self.config.namespace.clone()),
            ("outboxEvents".to_owned(), self.outbox.depth().to_string()),
        ]
    }

    /// All subscriptions of the application: those that the control plane knows, and its own.
    pub(super) fn subscriptions(&self) -> Vec<(Kind, SubscriptionSpec)> {
        let workload = self.workload.borrow().clone();
        let declared = workload.iter().flat_map(|workload| &workload.subscriptions);
        // One that cannot be used is not consumed either; that is logged where it is found.
        let declared = declared.filter_map(|raw| SubscriptionSpec::try_from(raw.clone()).ok());
        let declared = declared.map(|spec| (Kind::Declarative, spec));
        declared.chain(self.active.list()).collect()
    }

    /// 204 when ready (Dapr's code), 500 when not. `with_app`: the application counts too.
    fn health(&self, with_app: bool) -> Response<Body> {
        let ready = self.is_ready(with_app);
        let mut response = Response::new(Body::Empty);
        *response.status_mut() =
            if ready { StatusCode::NO_CONTENT } else { StatusCode::INTERNAL_SERVER_ERROR };
        response
    }

    /// In the shape of Dapr's metadata.
    fn metadata(&self) -> Response<Body> {
        let subscriptions: Vec<_> = self.subscriptions().into_iter().map(subscription).collect();
        let components = self.buses.names().into_iter();
        let components: Vec<_> = components
            .map(|name| json!({"name": name, "type": "pubsub.duet", "version": "v1"}))
            .collect();
        let mut extended = self.labels.all();
        extended.extend(self.extended());
        let metadata = json!({
            "id": self.config.services.first(),
            "runtimeVersion": VERSION,
            "components": components,
            "subscriptions": subscriptions,
            "extended": extended,
        });
        let mut response = Response::new(Body::Full(Bytes::from(metadata.to_string())));
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        response
    }
}

fn subscription((kind, spec): (Kind, SubscriptionSpec)) -> Value {
    let routes =
        spec.routes.iter().map(|route| json!({"match": route.matches, "path": route.path}));
    let main = (!spec.path.is_empty()).then(|| json!({"path": spec.path}));
    json!({
        "pubsubname": spec.bus,
        "topic": spec.topic,
        "rules": routes.chain(main).collect::<Vec<_>>(),
        "deadLetterTopic": spec.dead_letter_topic,
        "type": match kind {
            Kind::Declarative => "DECLARATIVE",
            Kind::Programmatic => "PROGRAMMATIC",
            Kind::Streaming => "STREAMING",
        },
    })
}

/// Names what was asked for, which may be a part of Dapr's API that is not here.
fn unknown(method: &Method, path: &str) -> Problem {
    let asked: String = path.chars().take(MAX_NAMED_CHARS).collect();
    let text = format!(
        "{method} {asked} is not here; of Dapr's API, Duet serves /v1.0/publish, /v1.0/publish/bulk, /v1.0/invoke, /v1.0/healthz, \
         /v1.0/metadata and /v1.0/shutdown, and of its own /v1.0/subscribe and /v1.0/deliveries"
    );
    Problem::new(StatusCode::NOT_FOUND, "ERR_NOT_FOUND", text)
}

fn no_content() -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// What follows `prefix`, where that is a bus and a topic: a bus may itself be called `bulk`.
fn bulk_path<'p>(path: &'p str, prefix: &str) -> Option<&'p str> {
    path.strip_prefix(prefix).filter(|rest| rest.contains('/'))
}
