//! The life of an incoming call: mTLS -> who is it -> which port -> limits -> the application.
//!
//! Only ports that were declared as the application's can be reached, so that a peer cannot use the sidecar as a
//! way to whatever else listens on loopback. What only an application's own sidecar asks and says, peers cannot
//! (`reserved`, [`headers::strip_forged`]).

mod accept;
mod callback;
mod failure;
pub mod guard;
mod reserved;
pub mod revoked;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderValue};
use http::uri::Authority;
use http::{HeaderMap, Request, Response, StatusCode, Version, request};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::config::{AppPort, AppProtocol};
use crate::connect::{Pool, SharedConnector, Target, Transport};
use crate::error::{ErrorType, Failure, Progress};
use crate::http::body::{Body, BodyError, Watch, Watched};
use crate::http::client::Sender;
use crate::http::reply::{self, Asked};
use crate::http::server::{self, Ending};
use crate::http::upgrade::{self, Upgrade};
use crate::http::{deadline, headers};
use crate::identity::{Svid, SvidWatch};
use crate::record::Record;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::metrics::{CallMetrics, ServiceMetrics};
use duet_events::sparse::Sparse;

use guard::{Guard, Guards, Permit};

/// After the end of a peer's certificate, for requests that were under way when it was told to connect anew.
const LATE: Duration = Duration::from_secs(5);
/// The application is on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The incoming side of one worker.
#[derive(Debug)]
pub struct Inbound {
    svid: SvidWatch,
    tls: Mutex<Option<TlsConfig>>,
    ports: BTreeMap<u16, Arc<Port>>,
    guards: watch::Receiver<Arc<Guards>>,
    revoked: watch::Receiver<revoked::Identities>,
    metrics: CallMetrics,
    access_log: AccessLog,
    refusals: Sparse,
    force: CancellationToken,
}

/// A TLS configuration and the certificate that it was made of.
type TlsConfig = (Arc<Svid>, Arc<rustls::ServerConfig>);

/// What changes while it runs: the sidecar's certificate, and what the mesh says of its callers.
pub type Followed = (SvidWatch, watch::Receiver<Arc<Guards>>, watch::Receiver<revoked::Identities>);

/// A port of the application.
#[derive(Debug)]
struct Port {
    number: u16,
    protocol: AppProtocol,
    pool: Arc<Pool>,
    service: Arc<str>,
    metrics: Arc<ServiceMetrics>,
}

/// What is known of a connection: done once, used by each of its requests.
#[derive(Clone, Debug)]
struct Peer {
    /// `namespace/account`, for metrics.
    name: Arc<str>,
    /// Value of `x-forwarded-client-cert`.
    certificate: HeaderValue,
    port: Arc<Port>,
    /// End of its certificate.
    until: Instant,
}

impl Inbound {
    /// One per worker. `app`: its ports, its address, and this workload's name in metrics (`namespace/name`). `force`
    /// ends upgraded connections.
    #[must_use]
    pub fn new(
        (svid, guards, revoked): Followed,
        app: (&[AppPort], std::net::IpAddr, &str),
        connector: &SharedConnector,
        (metrics, access_log): (&CallMetrics, AccessLog),
        force: CancellationToken,
    ) -> Self {
        let (ports, host, service) = app;
        let port = |app: &AppPort| {
            let target =
                Target { address: SocketAddr::new(host, app.port), identity: None, port: app.port };
            let service: Arc<str> = format!("{service}:{}", app.port).into();
            let port = Port {
                number: app.port,
                protocol: app.protocol,
                pool: Pool::new(target, Arc::clone(connector)),
                metrics: Arc::new(metrics.service("inbound", &service)),
                service,
            };
            (app.port, Arc::new(port))
        };
        Self {
            svid,
            tls: Mutex::new(None),
            ports: ports.iter().map(port).collect(),
            guards,
            revoked,
            metrics: metrics.clone(),
            access_log,
            refusals: Sparse::default(),
            force,
        }
    }

    /// Closes idle connections to the application that are of no more use; to be called every few seconds.
    pub fn sweep_idle(&self) {
        for port in self.ports.values() {
            port.pool.sweep();
        }
    }

    /// Serves one accepted connection until it ends.
    pub async fn connection(self: Arc<Self>, stream: TcpStream, ending: Ending) {
        match self.accept(stream).await {
            Ok((stream, peer)) => {
                let guard = self.guard(peer.port.number);
                let counted = guard.as_ref().map(|guard| guard.connect());
                if matches!(counted, Some(None)) {
                    self.refused("connection_limit", &format!("{} has too many", peer.name));
                    return;
                }
                Box::pin(self.serve(stream, peer, ending)).await;
            }
            Err((reason, details)) => self.refused(reason, &details),
        }
    }

    fn refused(&self, reason: &'static str, details: &str) {
        self.metrics.refused.with_label_values(&["inbound", reason]).inc();
        if let Some(left_out) = self.refusals.pass(reason) {
            tracing::info!(reason, details, left_out, "inbound connection refused");
        }
    }

    /// Ends when the peer is shut out.
    fn shut_out(&self, peer: &Peer) -> impl Future<Output = ()> + Send + use<> {
        revoked::shut_out(self.revoked.clone(), Arc::clone(&peer.name))
    }

    fn guard(&self, port: u16) -> Option<Arc<Guard>> {
        self.guards.borrow().get(&port).map(Arc::clone)
    }

    /// Serves a peer until its certificate ends: it comes back with its next one, what it has begun is finished. A peer
    /// that is shut out is cut off.
    async fn serve(self: Arc<Self>, stream: TlsStream<TcpStream>, peer: Peer, mut ending: Ending) {
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let (metrics, until) = (self.metrics.clone(), peer.until);
        ending.graceful = ending.graceful.child_token();
        ending.force = ending.force.child_token();
        let (expired, cut) = (ending.graceful.clone(), ending.force.clone());
        let mut shut_out = std::pin::pin!(self.shut_out(&peer));
        let service = service_fn(move |request| {
            let (inbound, peer) = (Arc::clone(&self), peer.clone());
            async move { Ok::<_, Infallible>(inbound.call(request, &peer).await) }
        });
        let mut served = std::pin::pin!(server::serve(stream, http2, service, ending));
        let end = loop {
            tokio::select! {
                biased;
                end = served.as_mut() => break end,
                () = shut_out.as_mut(), if !cut.is_cancelled() => cut.cancel(),
                () = tokio::time::sleep_until(until), if !expired.is_cancelled() => expired.cancel(),
            }
        };
        if let Err(error) = end {
            metrics.malformed("inbound", server::malformed(&error));
            tracing::debug!(%error, "inbound connection ended");
        }
    }

    /// Whether a request may go on to the application.
    fn admit(&self, head: &request::Parts, peer: &Peer) -> Result<Option<Permit>, Failure> {
        if let Some(refusal) = refusal(head, peer) {
            return Err(refusal);
        }
        let guard = self.guard(peer.port.number);
        guard.map(|guard| guard.admit(&peer.name, head, &peer.port.metrics)).transpose()
    }

    /// Carries one request to the application. Always answers.
    async fn call(&self, request: Request<Incoming>, peer: &Peer) -> Response<Body> {
        let asked = Asked::of(request.headers());
        let (mut head, body) = request.into_parts();
        let port = &peer.port;
        let of = (Arc::clone(&port.metrics), &port.service, Arc::clone(&peer.name));
        let mut record = Record::new("inbound", &head, asked, &self.access_log, of);
        record.attempts(1);
        let upgrade = Upgrade::take(&mut head);
        let admitted = self.admit(&head, peer);
        let deadline =
            deadline::read(&head.headers, asked.is_grpc()).map(|left| Instant::now() + left);
        let outcome = match admitted {
            Err(refused) => Err(refused),
            Ok(permit) => {
                let forwarded = std::pin::pin!(forward(head, body, peer, upgrade.as_ref()));
                in_time(forwarded, deadline).await.map(|response| (response, permit))
            }
        };
        match outcome {
            Ok((mut response, permit)) => {
                if let Some(upgrade) = upgrade
                    && response.status() == StatusCode::SWITCHING_PROTOCOLS
                {
                    let tunnel = upgrade.accepted(hyper::upgrade::on(&mut response));
                    let (force, shut_out) = (self.force.clone(), self.shut_out(peer));
                    port.pool.tasks().spawn(async move {
                        tokio::select! {
                            () = tunnel.run(force) => {}
                            () = shut_out => {}
                        }
                    });
                }
                respond(response, record, permit, deadline)
            }
            Err(failure) => {
                let mut response = reply::failure(&failure, asked);
                if let Some(progress) = failure::progress(&failure) {
                    let progress = HeaderValue::from_static(progress);
                    response.headers_mut().insert(headers::PROGRESS, progress);
                }
                record.fail(&failure);
                response
            }
        }
    }
}

/// What no peer may ask, whatever the limits.
fn refusal(head: &request::Parts, peer: &Peer) -> Option<Failure> {
    if reserved::is_reserved(head.uri.path()) {
        let text = "only the application's own sidecar asks this";
        return Some(Failure::new(ErrorType::HttpRequestDenied, text));
    }
    if Instant::now() > peer.until + LATE {
        let text = "the caller's certificate has expired since it connected";
        let failure = Failure::new(ErrorType::TlsCertificateError, text);
        return Some(failure.with_progress(Progress::Unprocessed));
    }
    None
}

/// Nobody waits for an answer past the caller's deadline.
async fn in_time<F: Future<Output = Result<Response<Body>, Failure>>>(
    forwarded: Pin<&mut F>,
    deadline: Option<Instant>,
) -> Result<Response<Body>, Failure> {
    let Some(deadline) = deadline else {
        return forwarded.await;
    };
    tokio::time::timeout_at(deadline, forwarded).await.unwrap_or_else(|_elapsed| {
        let text = "the application did not answer within the caller's deadline";
        Err(Failure::new(ErrorType::HttpResponseTimeout, text))
    })
}

async fn forward(
    mut head: request::Parts,
    body: Incoming,
    peer: &Peer,
    upgrade: Option<&Upgrade>,
) -> Result<Response<Body>, Failure> {
    let authority = headers::authority(&head)?;
    let original = head.headers.remove(headers::ORIGINAL_VERSION);
    headers::strip_forged(&mut head.headers);
    head.headers.insert(headers::CLIENT_CERT, peer.certificate.clone());
    if let Some(upgrade) = upgrade {
        upgrade.ask(&mut head.headers);
    }
    let transport = match peer.port.protocol {
        _ if upgrade.is_some() => Transport::Upgrade,
        AppProtocol::Http1 => Transport::Http1,
        AppProtocol::H2c | AppProtocol::Grpc => Transport::Http2,
        AppProtocol::Auto if original.is_none() && head.version == Version::HTTP_2 => {
            Transport::Http2
        }
        AppProtocol::Auto => Transport::Http1,
    };
    let mut sender = peer
        .port
        .pool
        .sender(transport, CONNECT_TIMEOUT)
        .await
        .map_err(|failure| failure::app_away(&failure))?;
    match transport {
        Transport::Http1 | Transport::Upgrade => headers::for_http1(&mut head, &authority),
        Transport::Http2 => headers::for_http2(&mut head, &authority),
    }
    if peer.port.protocol == AppProtocol::Grpc && !headers::is_grpc(&head.headers) {
        return Box::pin(invoke(sender, head, body, &authority)).await;
    }
    let body = if body.is_end_stream() { Body::Empty } else { Body::Incoming(body) };
    sender.send(Request::from_parts(head, body)).await.map_err(failure::app_died)
}

/// The application speaks gRPC and the caller does not: as Dapr's callback.
async fn invoke(
    mut sender: Sender,
    head: request::Parts,
    body: Incoming,
    authority: &Authority,
) -> Result<Response<Body>, Failure> {
    let (mut head, body) = callback::request(head, body).await?;
    headers::for_http2(&mut head, authority);
    let answer = sender.send(Request::from_parts(head, body)).await.map_err(failure::app_died)?;
    Ok(callback::response(answer).await)
}

fn respond(
    response: Response<Body>,
    mut record: Record,
    mut permit: Option<Permit>,
    deadline: Option<Instant>,
) -> Response<Body> {
    if let Some(permit) = &mut permit {
        permit.answered(response.status());
    }
    let (mut head, body) = response.into_parts();
    head.version = Version::HTTP_11;
    let switched = head.status == StatusCode::SWITCHING_PROTOCOLS;
    let upgraded = if switched { head.headers.get(header::UPGRADE).cloned() } else { None };
    headers::strip_all(&mut head.headers);
    if switched {
        upgrade::switched(&mut head.headers, upgraded);
    }
    record.answered(head.status, &head.headers);
    let mut end = End { record, _permit: permit };
    if body.is_end_stream() {
        end.end(Ok(None));
        return Response::from_parts(head, body);
    }
    let watched = Watched::new(body, Box::new(end), deadline, None);
    Response::from_parts(head, Body::Watched(Box::new(watched)))
}

/// What happens when the response's last byte is through.
#[derive(Debug)]
struct End {
    record: Record,
    _permit: Option<Permit>,
}

impl Watch for End {
    fn end(&mut self, end: Result<Option<&HeaderMap>, &BodyError>) {
        self.record.end(end);
    }
}
