//! One worker: a thread with its own runtime, listeners, connection pools and balancer state, so that a call never
//! crosses a thread.

use std::convert::Infallible;
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::Duration;

use http::{Request, Response, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::config::Config;
use crate::connect::Connector;
use crate::detect::{NotDetected, Protocol, detect};
use crate::discovery::Discovery;
use crate::drain::Drain;
use crate::error::{ErrorType, Failure};
use crate::http::body::{Body, Upload};
use crate::http::reply::{self, Asked};
use crate::http::server::{self, Ending};
use crate::http::{browser, headers, leftover};
use crate::identity::SvidWatch;
use crate::inbound::guard::Guards;
use crate::inbound::{Inbound, revoked};
use crate::listen::Acceptor;
use crate::net;
use crate::outbound::replica::Healths;
use crate::outbound::{Outbound, destination};
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::metrics::CallMetrics;
use duet_events::sparse::Sparse;

use super::ports::WorkerSockets;

/// A client that says nothing for this long is taken for HTTP/1 and has its time for a first request.
const DETECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Letting go of destinations that are not used any more.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// Closing idle connections that the other end has closed.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);

/// What all workers share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) config: Arc<Config>,
    pub(super) svid: SvidWatch,
    pub(super) discovery: Discovery<destination::Config>,
    pub(super) metrics: CallMetrics,
    pub(super) access_log: AccessLog,
    pub(super) drain: Drain,
    pub(super) healths: Healths,
    pub(super) guards: watch::Receiver<Arc<Guards>>,
    pub(super) revoked: watch::Receiver<revoked::Identities>,
}

impl Shared {
    /// A connector for one runtime.
    pub(super) fn connector(&self) -> Arc<Connector> {
        let tasks = self.drain.background.clone();
        Arc::new(Connector::new(self.svid.clone(), tasks, &self.metrics))
    }

    /// An outgoing side for one runtime.
    pub(super) fn outbound(&self, connector: Arc<Connector>) -> Arc<Outbound> {
        let (metrics, access_log) = (self.metrics.clone(), self.access_log.clone());
        let force = self.drain.force.clone();
        let context = destination::Context {
            connector,
            healths: self.healths.clone(),
            zone: self.config.args.zone.as_str().into(),
            name: self.name().into(),
        };
        Arc::new(Outbound::new(self.discovery.clone(), context, (metrics, access_log), force))
    }

    /// `namespace/name` of the workload.
    fn name(&self) -> String {
        let args = &self.config.args;
        format!("{}/{}", args.namespace, args.service.first().map_or("", String::as_str))
    }
}

/// Starts a thread for each set of sockets.
pub(super) fn start(
    shared: &Shared,
    sockets: Vec<WorkerSockets>,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let start = |(number, sockets)| {
        let shared = shared.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name(format!("worker-{number}"));
        Ok(thread.spawn(move || {
            if let Err(error) = runtime.block_on(run(&shared, sockets)) {
                tracing::error!(error = format!("{error:#}"), "a worker failed");
            }
        })?)
    };
    sockets.into_iter().enumerate().map(start).collect()
}

/// Waits for the workers' threads, after the drain.
pub(super) async fn join(workers: Vec<JoinHandle<()>>) {
    while workers.iter().any(|worker| !worker.is_finished()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn run(shared: &Shared, sockets: WorkerSockets) -> anyhow::Result<()> {
    let args = &shared.config.args;
    let drain = &shared.drain;
    let connector = shared.connector();
    let inbound = Arc::new(Inbound::new(
        (shared.svid.clone(), shared.guards.clone(), shared.revoked.clone()),
        (&shared.config.app_ports, args.app_host, &shared.name()),
        &connector,
        (&shared.metrics, shared.access_log.clone()),
        drain.force.clone(),
    ));
    let (outbound, swept) = (shared.outbound(connector), Arc::clone(&inbound));
    let outbound_acceptor =
        Acceptor::new("outbound", net::adopt(sockets.outbound)?, &shared.metrics);
    let inbound_acceptor = Acceptor::new("inbound", net::adopt(sockets.inbound)?, &shared.metrics);

    let inbound_ending = Ending {
        graceful: drain.inbound.clone(),
        force: drain.force.clone(),
        tasks: drain.inbound_tasks.clone(),
    };
    let accept_inbound =
        inbound_acceptor.run(drain.inbound.clone(), drain.inbound_tasks.clone(), move |stream| {
            Arc::clone(&inbound).connection(stream, inbound_ending.clone())
        });
    let outbound_ending = Ending {
        graceful: drain.outbound.clone(),
        force: drain.force.clone(),
        tasks: drain.outbound_tasks.clone(),
    };
    let (calls, metrics) = (Arc::clone(&outbound), shared.metrics.clone());
    let accept_outbound = outbound_acceptor.run(
        drain.outbound.clone(),
        drain.outbound_tasks.clone(),
        move |stream| {
            serve_outbound(Arc::clone(&calls), stream, outbound_ending.clone(), metrics.clone())
        },
    );
    let sweep = sweep(&outbound, &swept);
    tokio::select! {
        _ = async { tokio::join!(accept_inbound, accept_outbound, drain.force.cancelled()) } => {}
        () = sweep => {}
    }
    Ok(())
}

async fn sweep(outbound: &Outbound, inbound: &Inbound) {
    let mut destinations = tokio::time::interval(SWEEP_INTERVAL);
    let mut idle = tokio::time::interval(IDLE_INTERVAL);
    destinations.tick().await;
    loop {
        tokio::select! {
            _ = destinations.tick() => outbound.sweep(),
            _ = idle.tick() => {
                outbound.sweep_idle();
                inbound.sweep_idle();
            }
        }
    }
}

async fn serve_outbound(
    outbound: Arc<Outbound>,
    stream: TcpStream,
    ending: Ending,
    metrics: CallMetrics,
) {
    let http2 = match detect(&stream, DETECT_TIMEOUT).await {
        Ok(Protocol::Http2) => true,
        Ok(Protocol::Http1) | Err(NotDetected::Silent) => false,
        Ok(Protocol::Tls | Protocol::Opaque) => {
            metrics.refused.with_label_values(&["outbound", "not_http"]).inc();
            static LOG: LazyLock<Sparse> = LazyLock::new(Sparse::default);
            if let Some(left_out) = LOG.pass("") {
                tracing::info!(
                    left_out,
                    "a client of the outbound port does not speak HTTP in plaintext; point it at the \
                     service itself, or use http:// and let the sidecar encrypt"
                );
            }
            return;
        }
        Err(NotDetected::Closed) => return,
    };
    let local = stream.local_addr().ok();
    let refused = metrics.refused.with_label_values(&["outbound", "web_page"]);
    let service = service_fn(move |mut request| {
        if !http2 {
            headers::detach(&mut request);
        }
        let chosen =
            |local| browser::chose_destination(request.version(), request.headers(), local);
        let by_page = local.is_some_and(chosen);
        let (outbound, refused) = (Arc::clone(&outbound), refused.clone());
        async move {
            if by_page {
                refused.inc();
                return Ok(denied(&request));
            }
            Ok::<_, Infallible>(outbound.call(request.map(Upload::from)).await)
        }
    });
    if let Err(error) = server::serve(stream, http2, service, ending).await {
        metrics.malformed("outbound", server::malformed(&error));
        tracing::debug!(%error, "outbound connection ended");
    }
}

/// Answers what a web page sent, and ends its connection.
fn denied(request: &Request<Incoming>) -> Response<Body> {
    browser::log_refusal(request.method(), request.headers());
    let text = "the Host is a name that DNS may point anywhere, so that a web page could have sent this: \
                say localhost or 127.0.0.1 beside duet-destination";
    let failure = Failure::new(ErrorType::HttpRequestDenied, text);
    let mut response = reply::failure(&failure, Asked::of(request.headers()));
    if request.version() < Version::HTTP_2 {
        leftover::close(response.headers_mut());
    }
    response
}
