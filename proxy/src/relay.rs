//! Events: what the application publishes goes to the bus, or to the outbox while the bus is away; what it
//! subscribes to comes from the bus and is posted to it until it acknowledges; rows of its own outbox tables go to the
//! bus too (`duet_tables`). And the Dapr-compatible HTTP API in
//! front of that.
//!
//! Runs on the control thread: a slow disk or a stuck bus never holds up a call. Imports stages and lower, never
//! `outbound` or `inbound`: calls go into the mesh by the [`InvokeFn`] that the composition root gives.

mod active;
mod api;
mod app;
mod bulk;
mod buses;
mod consumption;
mod doubts;
mod extend;
mod gather;
mod grpc;
mod hand;
mod in_hand;
mod invoke;
mod metrics;
mod post;
mod problem;
mod programmatic;
mod publish;
mod receive;
mod sse;
mod subscriptions;
mod tables;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use duet_api::proto::Workload;
use duet_events::inbox::{Inbox, InboxOptions};
use duet_events::outbox::{Outbox, OutboxOptions};
use futures::future::BoxFuture;
use http::header::{self, HeaderValue};
use http::{Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use prometheus::{IntCounter, Registry};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::config::AppProtocol;
use crate::connect::Pool;
use crate::detect::{NotDetected, Protocol, detect};
use crate::drain::Drain;
use crate::http::body::{Body, Upload};
use crate::http::server::{self, Ending};
use crate::http::{browser, headers};
use crate::listen::Acceptor;
use crate::telemetry::metrics::CallMetrics;
use duet_events::sparse::Sparse;

use active::Active;
use api::Api;
use app::App;
use buses::Buses;
use doubts::Doubts;
use extend::Extensions;
use hand::Aids;
use metrics::EventMetrics;
use problem::Problem;
use publish::store::Publishing;
use sse::Streams;
use subscriptions::Subscriptions;

/// How long handled events are remembered for subscriptions with `once`.
const INBOX_WINDOW: Duration = Duration::from_secs(24 * 3600);
const DETECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Carries one request into the mesh, by its authority.
pub type InvokeFn =
    Arc<dyn Fn(Request<Upload>) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

/// Who we are, and bounds.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Namespace of the workload.
    pub namespace: String,
    /// Services that it is a replica of.
    pub services: Vec<String>,
    /// Name of this replica.
    pub instance: String,
    /// Folder of the outbox.
    pub outbox: PathBuf,
    /// Folder of the inbox.
    pub inbox: PathBuf,
    /// Largest body of one publish. Dapr's limit is the default: 4 MiB.
    pub max_body_bytes: usize,
    /// Most bytes that publishes may hold in memory, all together.
    pub publish_bytes: usize,
    /// Most that waits in the outbox.
    pub outbox_bytes: u64,
}

/// What the relay is connected to.
pub struct RelayInputs {
    /// Our configuration: buses and declarative subscriptions.
    pub workload: watch::Receiver<Option<Arc<Workload>>>,
    /// The way to the control plane, and so to the embedded bus.
    pub control_plane: Channel,
    /// See [`InvokeFn`].
    pub invoke: InvokeFn,
    /// Whether the application accepts connections.
    pub app_ready: watch::Receiver<bool>,
    /// Connections to the application; `None` for a pure client.
    pub app: Option<(Arc<Pool>, AppProtocol)>,
    /// Phase one stops pulling, phase two stops publishing.
    pub drain: Drain,
}

impl std::fmt::Debug for RelayInputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayInputs").finish_non_exhaustive()
    }
}

/// Opens the outbox, starts the subscriptions, and serves the API, over HTTP and gRPC, on all `listeners`. Returns the
/// outbox.
///
/// # Errors
/// When another process uses the outbox on disk.
pub async fn start(
    config: RelayConfig,
    inputs: RelayInputs,
    listeners: [TcpListener; 2],
    (registry, call_metrics): (&Registry, &CallMetrics),
) -> anyhow::Result<Arc<Outbox>> {
    let options = OutboxOptions { dir: config.outbox.clone(), capacity_bytes: config.outbox_bytes };
    let outbox = Outbox::open(options, registry).await.context("outbox")?;
    let metrics = EventMetrics::register(registry)?;
    let buses = Buses::new(Arc::clone(&outbox), inputs.control_plane, inputs.workload.clone());
    let drain = inputs.drain.clone();
    drain.background.spawn(Arc::clone(&buses).follow(drain.force.clone()));
    let inbox = InboxOptions { dir: config.inbox.clone(), window: INBOX_WINDOW };
    let aids = Aids {
        metrics: metrics.clone(),
        extensions: Extensions::default(),
        inbox: Inbox::new(inbox),
    };
    let active = Active::default();
    if let Some((pool, protocol)) = inputs.app {
        let app = App { pool, protocol };
        let subscriptions = Subscriptions {
            namespace: config.namespace.clone(),
            services: config.services.clone(),
            workload: inputs.workload.clone(),
            app_ready: inputs.app_ready.clone(),
            buses: Arc::clone(&buses),
            app,
            aids: aids.clone(),
            active: active.clone(),
            instance: config.instance.clone(),
            drain: drain.clone(),
            doubts: Doubts::default(),
            log: Sparse::default(),
        };
        // Part of phase one: what is in flight is finished before the phase ends.
        drain.inbound_tasks.spawn(subscriptions.run());
    }
    tables::start(&inputs.workload, &buses, (registry, &metrics), &drain)?;
    let source = config.services.first().map_or("duet", String::as_str).to_owned();
    let bounds = (config.max_body_bytes, config.publish_bytes);
    let publishing = Arc::new(Publishing::new(Arc::clone(&buses), metrics, source, bounds));
    let service = config.services.first().map_or("client", String::as_str);
    let owner = format!("{}/{service}", config.namespace);
    let streams = Streams::new(Arc::clone(&buses), owner, drain.clone());
    let api = Arc::new(Api {
        config,
        buses,
        publishing,
        streams,
        aids,
        active,
        invoke: inputs.invoke,
        workload: inputs.workload,
        app_ready: inputs.app_ready,
        outbox: Arc::clone(&outbox),
        drain: drain.clone(),
        labels: grpc::Labels::default(),
    });
    for listener in listeners {
        serve(&api, listener, call_metrics, &drain);
    }
    leave(&outbox, &drain);
    Ok(outbox)
}

/// What waits goes to its bus before the process ends, if that comes back in time; then the store is closed.
fn leave(outbox: &Arc<Outbox>, drain: &Drain) {
    let (waiting, flush, force) = (Arc::clone(outbox), drain.flush.clone(), drain.force.clone());
    drain.flush_tasks.spawn(async move {
        flush.cancelled().await;
        tokio::select! {
            () = waiting.emptied() => {}
            () = force.cancelled() => {
                let events = waiting.depth();
                tracing::warn!(events, "events stay in the outbox until this sidecar runs again");
            }
        }
    });
    let (outbox, force) = (Arc::clone(outbox), drain.force.clone());
    drain.background.spawn(async move {
        force.cancelled().await;
        outbox.close().await;
    });
}

/// Accepts connections until phase two of the drain.
fn serve(api: &Arc<Api>, listener: TcpListener, call_metrics: &CallMetrics, drain: &Drain) {
    let acceptor = Acceptor::new("api", listener, call_metrics);
    let (api, metrics) = (Arc::clone(api), call_metrics.clone());
    let ending = Ending {
        graceful: drain.outbound.clone(),
        force: drain.force.clone(),
        tasks: drain.outbound_tasks.clone(),
    };
    let accept =
        acceptor.run(drain.outbound.clone(), drain.outbound_tasks.clone(), move |stream| {
            connection(Arc::clone(&api), stream, ending.clone(), metrics.clone())
        });
    drain.background.spawn(accept);
}

async fn connection(api: Arc<Api>, stream: TcpStream, ending: Ending, metrics: CallMetrics) {
    let http2 = match detect(&stream, DETECT_TIMEOUT).await {
        Ok(Protocol::Http2) => true,
        Ok(Protocol::Http1) | Err(NotDetected::Silent) => false,
        Ok(Protocol::Tls | Protocol::Opaque) => {
            metrics.refused.with_label_values(&["api", "not_http"]).inc();
            return;
        }
        Err(NotDetected::Closed) => return,
    };
    let loopback = browser::is_loopback(&stream);
    let refused = metrics.refused.with_label_values(&["api", "web_page"]);
    let service = service_fn(move |request: Request<Incoming>| {
        let api = Arc::clone(&api);
        let refused = refused.clone();
        async move {
            if let Some(why) = browser::refusal(request.version(), request.headers(), loopback) {
                return Ok(refuse(&request, why, &refused));
            }
            let own = headers::is_grpc(request.headers()) && grpc::is_own(&request);
            Ok::<_, Infallible>(match own {
                true => Box::pin(grpc::answer(&api, request)).await,
                false => Box::pin(api.answer(request)).await,
            })
        }
    });
    if let Err(error) = server::serve(stream, http2, service, ending).await {
        metrics.malformed("api", server::malformed(&error));
        tracing::debug!(%error, "API connection ended");
    }
}

/// Answers what a web page sent, and ends its connection.
fn refuse(request: &Request<Incoming>, why: &'static str, refused: &IntCounter) -> Response<Body> {
    refused.inc();
    browser::log_refusal(request.method(), request.headers());
    let mut response = Problem::new(StatusCode::FORBIDDEN, "ERR_FORBIDDEN", why).response();
    if request.version() < Version::HTTP_2 {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}
