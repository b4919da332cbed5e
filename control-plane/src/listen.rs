//! The gRPC port: accepts connections, does the TLS handshake within bounds, and tells the services who the peer is.
//! Imports [`crate::telemetry`] and [`crate::revoked`].
//!
//! A connection costs nothing before its handshake is done but a slot and a few seconds. It ends with the certificate
//! of its peer, or when that is revoked; one without a certificate can only be a first contact, which is one short request,
//! and ends after 30 s.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use duet_api::spiffe::SpiffeId;
use duet_api::tls::{self, TlsMaterial};
use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::NoServerSessionStorage;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, ReusableBoxFuture};
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::transport::server::Connected;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::revoked::Revoked;
use crate::telemetry::{Counted, Metrics};

/// Bound on the TLS handshake, and after it on the first bytes of HTTP/2.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound on a connection whose peer has no certificate.
const ANONYMOUS_LIFETIME: Duration = Duration::from_secs(30);
/// Length of HTTP/2's connection preface.
const PREFACE_BYTES: usize = 24;
/// Connections at once; more wait in the kernel.
const MAX_CONNECTIONS: usize = 20_000;
/// Bytes of events on their way to one peer and not answered yet. A sidecar has each about twice in memory.
pub const EVENT_BYTES: u32 = 32 << 20;

/// Who is on the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The identity in its certificate, verified; none without a certificate.
    pub id: Option<SpiffeId>,
    /// Where it is.
    pub address: SocketAddr,
    /// Room for [`EVENT_BYTES`], for all consumers of the connection together.
    pub events: Arc<Semaphore>,
}

/// Room for the events of one connection.
#[must_use]
pub fn event_room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(EVENT_BYTES as usize))
}

impl Peer {
    /// The peer of a request.
    #[must_use]
    pub fn of<T>(request: &tonic::Request<T>) -> Option<&Self> {
        request.extensions().get::<Self>()
    }
}

/// The identity of a request's peer, which must have one.
///
/// # Errors
/// `UNAUTHENTICATED`, counted.
pub fn identity<T>(
    request: &tonic::Request<T>,
    service: &str,
    metrics: &Metrics,
) -> Result<SpiffeId, Status> {
    Peer::of(request).and_then(|peer| peer.id.clone()).ok_or_else(|| {
        metrics.refused.with_label_values(&[service, "anonymous"]).inc();
        Status::unauthenticated("this call needs a client certificate of the mesh")
    })
}

/// The TLS configuration in use; replaced when the control plane's own certificate is renewed.
#[derive(Debug)]
pub struct ServerTls(RwLock<Arc<ServerConfig>>);

impl ServerTls {
    /// From the control plane's SVID.
    ///
    /// # Errors
    /// When the material does not fit together.
    pub fn new(material: &TlsMaterial) -> Result<Self, rustls::Error> {
        Ok(Self(RwLock::new(Self::config(material)?)))
    }

    /// Uses other material from now on.
    ///
    /// # Errors
    /// When the material does not fit together; the old one stays.
    pub fn replace(&self, material: &TlsMaterial) -> Result<(), rustls::Error> {
        *self.0.write() = Self::config(material)?;
        Ok(())
    }

    fn config(material: &TlsMaterial) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = tls::server_config(material, true)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would not be verified again, and its certificate may have expired since.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// Accepts connections until `stop`; those with a finished handshake come out of the receiver.
pub fn accept(
    listener: TcpListener,
    config: Arc<ServerTls>,
    revoked: Revoked,
    metrics: &Metrics,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> mpsc::Receiver<io::Result<Connection>> {
    let (accepted, connections) = mpsc::channel(64);
    let (metrics, tasks) = (metrics.clone(), tracker.clone());
    tracker.spawn(async move {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let accepting = async {
            while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, address)) => {
                        let config = Arc::clone(&config.0.read());
                        let (accepted, metrics) = (accepted.clone(), metrics.clone());
                        let revoked = revoked.clone();
                        tasks.spawn(async move {
                            let shaken =
                                handshake(stream, address, slot, config, &revoked, &metrics);
                            match shaken.await {
                                // The receiver is gone only when everything ends.
                                Some(connection) => drop(accepted.send(Ok(connection)).await),
                                None => tracing::debug!(%address, "connection refused"),
                            }
                        });
                    }
                    Err(error) => {
                        metrics.refused_connections.with_label_values(&["accept"]).inc();
                        tracing::warn!(%error, "cannot accept a connection");
                        // Out of file handles, most likely: let some be closed.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        };
        tokio::select! {
            () = accepting => {}
            () = stop.cancelled() => {}
        }
    });
    connections
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    slot: OwnedSemaphorePermit,
    config: Arc<ServerConfig>,
    revoked: &Revoked,
    metrics: &Metrics,
) -> Option<Connection> {
    let refuse = |reason: &str, why: &dyn std::fmt::Display| {
        metrics.refused_connections.with_label_values(&[reason]).inc();
        tracing::info!(peer = %address, reason, "connection refused: {why}");
        None
    };
    if let Err(error) = stream.set_nodelay(true) {
        return refuse("io", &error);
    }
    let handshake = TlsAcceptor::from(config).accept(stream);
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Err(_elapsed) => return refuse("timeout", &"no TLS handshake within 5 s"),
        Ok(Err(error)) => return refuse(tls_reason(&error), &error),
        Ok(Ok(stream)) => stream,
    };
    let (_, session) = stream.get_ref();
    let leaf = session.peer_certificates().and_then(|chain| chain.first());
    let id = match leaf.map(tls::spiffe_id).transpose() {
        Ok(id) => id,
        Err(error) => return refuse("certificate", &error),
    };
    if let Some(id) = id.as_ref().filter(|id| revoked.contains(id)) {
        return refuse("revoked", &format_args!("{id} was revoked"));
    }
    let now = Instant::now();
    // Without a certificate there is nothing to stay for.
    let end = now + leaf.map_or(ANONYMOUS_LIFETIME, remaining);
    Some(Connection {
        deadline: Box::pin(tokio::time::sleep_until(end.min(now + HANDSHAKE_TIMEOUT))),
        missing: PREFACE_BYTES,
        end,
        revoked: id.as_ref().map(|id| ReusableBoxFuture::new(revoked.revoked(id))),
        cut: false,
        peer: Peer { id, address, events: event_room() },
        refused: metrics.refused_connections.with_label_values(&["silent"]),
        _slot: slot,
        _counted: Counted::new(&metrics.connections),
        stream,
    })
}

/// How long a certificate is still valid.
fn remaining(leaf: &CertificateDer<'_>) -> Duration {
    let Ok((_, parsed)) = X509Certificate::from_der(leaf) else {
        return Duration::ZERO;
    };
    let left = parsed.validity().time_to_expiration();
    left.and_then(|left| Duration::try_from(left).ok()).unwrap_or_default()
}

/// A short word for what went wrong in a handshake.
fn tls_reason(error: &io::Error) -> &'static str {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Expired))
        | Some(rustls::Error::InvalidCertificate(rustls::CertificateError::ExpiredContext {
            ..
        })) => "certificate_expired",
        Some(rustls::Error::InvalidCertificate(_)) => "certificate",
        Some(rustls::Error::AlertReceived(_)) => "refused_by_peer",
        Some(_) => "tls",
        None => "io",
    }
}

/// A connection after its TLS handshake.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// Reading fails after this: first the time for the preface, then `end`.
    deadline: Pin<Box<Sleep>>,
    /// Bytes of the preface that have not come yet.
    missing: usize,
    /// The end of the peer's certificate: it comes back with its next one.
    end: Instant,
    /// Ends when the peer's identity is revoked.
    revoked: Option<ReusableBoxFuture<'static, ()>>,
    /// It did.
    cut: bool,
    refused: prometheus::IntCounter,
    _slot: OwnedSemaphorePermit,
    _counted: Counted,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        if this.missing > 0 && read.is_ready() {
            let fresh = buffer.filled().len().saturating_sub(before);
            this.missing = this.missing.saturating_sub(fresh);
            if this.missing == 0 {
                this.deadline.as_mut().reset(this.end);
            }
        }
        if this.deadline.as_mut().poll(context).is_ready() {
            if this.missing > 0 {
                this.refused.inc();
            }
            let text = "the time is up for an HTTP/2 preface, or of the peer's certificate";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)));
        }
        if this.cut || this.revoked.as_mut().is_some_and(|end| end.poll(context).is_ready()) {
            // Not asked again: it has ended.
            this.cut = true;
            let text = "the peer's identity was revoked";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::PermissionDenied, text)));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
