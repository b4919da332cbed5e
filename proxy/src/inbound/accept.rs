//! A peer's connection: handshake, who it is, and which port it wants.
//!
//! Every connection is verified anew: no session is resumed, so that a certificate counts until its end and no longer.

use std::sync::Arc;
use std::time::Duration;

use duet_api::spiffe::SpiffeId;
use http::HeaderValue;
use rustls::pki_types::CertificateDer;
use rustls::server::NoServerSessionStorage;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{Inbound, Peer, Port};
use crate::connect::sni_port;
use crate::identity;

/// A peer must finish its handshake in this time.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

impl Inbound {
    /// Handshakes and finds out who it is and where it wants to go.
    ///
    /// # Errors
    /// With a label for the metric and details for the log.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Peer), (&'static str, String)> {
        let from = stream.peer_addr().map(|peer| peer.to_string()).unwrap_or_default();
        let config = self.tls_config().map_err(|error| ("no_certificate", error))?;
        let handshake = Box::pin(TlsAcceptor::from(config).accept(stream));
        let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(("tls_handshake", format!("{from}: {error}"))),
            Err(_elapsed) => return Err(("tls_timeout", format!("{from}: no handshake"))),
        };
        let (_, session) = stream.get_ref();
        let certificate = session.peer_certificates().and_then(|chain| chain.first());
        let named = certificate.and_then(|leaf| Some((leaf, duet_api::tls::spiffe_id(leaf).ok()?)));
        let Some((certificate, id)) = named else {
            return Err(("no_identity", format!("{from}: no SPIFFE id")));
        };
        let port = sni_port(session.server_name()).and_then(|port| self.ports.get(&port));
        let Some(port) = port.map(Arc::clone) else {
            let name = session.server_name().unwrap_or_default().to_owned();
            return Err(("unknown_port", format!("{id} at {from} wants {name:?}")));
        };
        let peer = self.peer(&id, port, end(certificate));
        if self.revoked.borrow().contains(&*peer.name) {
            return Err(("revoked", format!("{id} at {from} was revoked")));
        }
        Ok((stream, peer))
    }

    fn peer(&self, id: &SpiffeId, port: Arc<Port>, until: Instant) -> Peer {
        let by = self.svid.borrow().as_ref().map(|svid| svid.material.id.to_string());
        let text = format!("By={};URI={id}", by.unwrap_or_default());
        Peer {
            name: format!("{}/{}", id.namespace(), id.account()).into(),
            // A SPIFFE id has no character that a header cannot carry.
            certificate: HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("")),
            port,
            until,
        }
    }

    /// The TLS configuration of the newest certificate.
    fn tls_config(&self) -> Result<Arc<rustls::ServerConfig>, String> {
        let svid = self.svid.borrow().clone().ok_or("no certificate yet")?;
        let mut cached = self.tls.lock();
        if let Some((of, config)) = &*cached
            && Arc::ptr_eq(of, &svid)
        {
            return Ok(Arc::clone(config));
        }
        let mut config = duet_api::tls::server_config(&svid.material, false)
            .map_err(|error| error.to_string())?;
        // A resumed session would not be verified again, and the peer's certificate may have expired since.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let config = Arc::new(config);
        *cached = Some((svid, Arc::clone(&config)));
        Ok(config)
    }
}

/// When a certificate ends; now, where that cannot be read.
fn end(certificate: &CertificateDer<'_>) -> Instant {
    let now = Instant::now();
    now.checked_add(identity::remaining(certificate)).unwrap_or(now)
}
