//! What operators, Prometheus and the kubelet ask.
//!
//! Two listeners: one for everybody (`/metrics`, `/live`, `/ready`), which changes nothing; one on loopback
//! (`/config`, `POST /drain`, and what is below `/outbox/`), which web pages are kept from.

mod outbox;

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use duet_api::proto;
use duet_events::outbox::Outbox;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode, request};
use hyper::body::Incoming;
use hyper::service::service_fn;
use prometheus::{IntCounter, Registry, TextEncoder};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::discovery::{Discovery, View};
use crate::http::body::Body;
use crate::http::browser;
use crate::http::server::{self, Ending};
use crate::identity::SvidWatch;
use crate::outbound::destination::Config;

/// What there is to tell.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Metrics of the whole process.
    pub registry: Registry,
    /// Our certificate.
    pub svid: SvidWatch,
    /// Our configuration.
    pub workload: watch::Receiver<Option<Arc<proto::Workload>>>,
    /// Whether the application accepts connections.
    pub app_ready: watch::Receiver<bool>,
    /// Destinations in use.
    pub discovery: Discovery<Config>,
    /// Starts the drain.
    pub drain: CancellationToken,
    /// Name of this replica.
    pub instance: Arc<str>,
    /// Counts what web pages asked.
    pub refused: IntCounter,
    /// Events that wait for their bus, once they can be read.
    pub outbox: Arc<OnceLock<Arc<Outbox>>>,
}

/// What a listener may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Metrics and probes.
    Public,
    /// Everything.
    Operator,
}

impl Admin {
    /// Serves a listener until `stop`.
    pub async fn serve(self, listener: TcpListener, access: Access, stop: CancellationToken) {
        let admin = Arc::new(self);
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _peer)) = accepted else {
                // Out of file descriptors: the probes come again.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            };
            let loopback = browser::is_loopback(&stream);
            let ending =
                Ending { graceful: stop.clone(), force: stop.clone(), tasks: tasks.clone() };
            let admin = Arc::clone(&admin);
            let service = service_fn(move |request| {
                let admin = Arc::clone(&admin);
                async move { Ok::<_, Infallible>(admin.answer(request, access, loopback).await) }
            });
            tasks.spawn(async move {
                if let Err(error) = server::serve(stream, false, service, ending).await {
                    tracing::debug!(%error, "admin connection ended");
                }
            });
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        access: Access,
        loopback: bool,
    ) -> Response<Body> {
        // Nothing here has a body to be read.
        let (head, _body) = request.into_parts();
        if access == Access::Operator
            && let Some(why) = refusal(&head, loopback)
        {
            self.refused.inc();
            browser::log_refusal(&head.method, &head.headers);
            return text(StatusCode::FORBIDDEN, format!("{why}\n"));
        }
        match (&head.method, head.uri.path(), access) {
            (&Method::GET | &Method::HEAD, "/metrics", _) => self.metrics(),
            (&Method::GET | &Method::HEAD, "/live", _) => text(StatusCode::OK, "live\n".to_owned()),
            (&Method::GET | &Method::HEAD, "/ready", _) => self.ready(),
            (&Method::GET, "/config", Access::Operator) => self.config(),
            (&Method::POST, "/drain", Access::Operator) => {
                self.drain.cancel();
                text(StatusCode::ACCEPTED, "draining\n".to_owned())
            }
            (_, "/drain", Access::Operator) => {
                text(StatusCode::METHOD_NOT_ALLOWED, "use POST\n".to_owned())
            }
            (_, path, Access::Operator) if path.starts_with("/outbox/") => {
                outbox::answer(self.outbox.get().map(Arc::as_ref), &head).await
            }
            _ => text(StatusCode::NOT_FOUND, "not found\n".to_owned()),
        }
    }

    fn metrics(&self) -> Response<Body> {
        match TextEncoder::new().encode_to_string(&self.registry.gather()) {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                let format = HeaderValue::from_static(prometheus::TEXT_FORMAT);
                response.headers_mut().insert(header::CONTENT_TYPE, format);
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    fn ready(&self) -> Response<Body> {
        let missing = if self.drain.is_cancelled() {
            "draining"
        } else if self.svid.borrow().is_none() {
            "no certificate yet"
        } else if self.workload.borrow().is_none() {
            "no configuration yet"
        } else if !*self.app_ready.borrow() {
            "the application does not accept connections"
        } else {
            return text(StatusCode::OK, "ready\n".to_owned());
        };
        text(StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n"))
    }

    fn config(&self) -> Response<Body> {
        let destinations: Vec<_> = self.discovery.views().iter().map(destination).collect();
        let workload = self.workload.borrow().clone();
        let subscriptions = workload.as_ref().map(|workload| {
            let one =
                |s: &proto::Subscription| json!({"name": s.name, "topic": s.topic, "path": s.path});
            workload.subscriptions.iter().map(one).collect::<Vec<_>>()
        });
        let identity =
            self.svid.borrow().as_ref().map(
                |svid| json!({"id": svid.material.id.to_string(), "not_after": svid.not_after}),
            );
        let config = json!({
            "instance": &*self.instance,
            "identity": identity,
            "workload_version": workload.map(|workload| workload.version),
            "subscriptions": subscriptions,
            "destinations": destinations,
        });
        let mut response = text(StatusCode::OK, format!("{config:#}\n"));
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        response
    }
}

/// No page has any business at the operator port, of this machine either.
fn refusal(head: &request::Parts, loopback: bool) -> Option<&'static str> {
    if head.headers.contains_key(header::ORIGIN) {
        return Some("web pages have no business here");
    }
    browser::refusal(head.version, &head.headers, loopback)
}

fn destination((authority, view): &(Arc<str>, View<Config>)) -> serde_json::Value {
    match view {
        View::Pending => json!({"authority": &**authority, "state": "pending"}),
        View::NotFound(reason) => {
            json!({"authority": &**authority, "state": "not_found", "reason": &**reason})
        }
        View::Known(snapshot) => {
            let endpoints: Vec<_> = snapshot
                .endpoints
                .iter()
                .flat_map(|(backend, endpoints)| endpoints.iter().map(move |one| (backend, one)))
                .map(|(backend, one)| {
                    json!({
                        "backend": &**backend,
                        "address": one.address.to_string(),
                        "identity": one.identity.as_ref().map(ToString::to_string),
                        "instance": &*one.instance,
                    })
                })
                .collect();
            json!({
                "authority": &**authority,
                "state": "known",
                "service": &*snapshot.config.service,
                "endpoints": endpoints,
            })
        }
    }
}

fn text(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Body::Full(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
