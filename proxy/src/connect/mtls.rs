//! The client side of mTLS between sidecars.

use std::collections::HashMap;
use std::sync::Arc;

use duet_api::spiffe::SpiffeId;
use duet_api::tls::{IdentityError, Peer, client_config};
use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Transport;
use crate::error::{ErrorType, Failure, Progress};
use crate::identity::{self, Svid, SvidWatch};

/// Part of what is left of the certificates that a connection is used for.
const GOOD_FOR: f64 = 0.9;

/// TLS configurations by peer, for one certificate; made anew when the certificate changes.
#[derive(Debug)]
pub(super) struct Mtls {
    svid: SvidWatch,
    cache: Mutex<Cache>,
}

type Key = (SpiffeId, Transport);

#[derive(Debug, Default)]
struct Cache {
    svid: Option<Arc<Svid>>,
    configs: HashMap<Key, Arc<ClientConfig>>,
}

impl Mtls {
    pub(super) fn new(svid: SvidWatch) -> Self {
        Self { svid, cache: Mutex::default() }
    }

    /// Handshakes with the peer's sidecar; the application's port travels as the server name. Tells until when the
    /// connection is good for new requests.
    pub(super) async fn secure(
        &self,
        stream: TcpStream,
        (peer, port): (&SpiffeId, u16),
        transport: Transport,
    ) -> Result<(TlsStream<TcpStream>, Instant), Failure> {
        let Some(svid) = self.svid.borrow().clone() else {
            let text = "this sidecar has no certificate yet";
            return Err(unprocessed(ErrorType::DestinationUnavailable, text.to_owned()));
        };
        let config = self.config(&svid, peer, transport)?;
        let name = ServerName::try_from(format!("port-{port}.duet.internal"))
            .map_err(|error| unprocessed(ErrorType::ProxyInternalError, error.to_string()))?;
        let handshake = TlsConnector::from(config).connect(name, stream);
        let stream = handshake.await.map_err(|error| failed(peer, &error))?;
        let until = retirement(&stream, &svid);
        Ok((stream, until))
    }

    fn config(
        &self,
        svid: &Arc<Svid>,
        peer: &SpiffeId,
        transport: Transport,
    ) -> Result<Arc<ClientConfig>, Failure> {
        let mut cache = self.cache.lock();
        if !cache.svid.as_ref().is_some_and(|cached| Arc::ptr_eq(cached, svid)) {
            cache.configs.clear();
            cache.svid = Some(Arc::clone(svid));
        }
        let key = (peer.clone(), transport);
        if let Some(config) = cache.configs.get(&key) {
            return Ok(Arc::clone(config));
        }
        let mut config = client_config(&svid.material, Peer::Exactly(peer.clone()))
            .map_err(|error| unprocessed(ErrorType::ProxyInternalError, error.to_string()))?;
        // Every peer is verified anew.
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![match transport {
            Transport::Http1 | Transport::Upgrade => b"http/1.1".to_vec(),
            Transport::Http2 => b"h2".to_vec(),
        }];
        let config = Arc::new(config);
        cache.configs.insert(key, Arc::clone(&config));
        Ok(config)
    }
}

/// Before the end of either certificate, so that the next connection is there when the peer ends this one. Both sides
/// have had their next certificate for long by then.
fn retirement(stream: &TlsStream<TcpStream>, svid: &Svid) -> Instant {
    let (_, session) = stream.get_ref();
    let chains = [session.peer_certificates().unwrap_or_default(), &svid.material.chain];
    let ends = chains.map(|chain| chain.first().map(identity::remaining).unwrap_or_default());
    let left = ends.into_iter().min().unwrap_or_default();
    let now = Instant::now();
    now.checked_add(left.mul_f64(GOOD_FOR)).unwrap_or(now)
}

fn unprocessed(kind: ErrorType, text: String) -> Failure {
    Failure::new(kind, text).with_progress(Progress::Unprocessed)
}

/// A peer of another name or CA is `tls_certificate_error`; the rest is `tls_protocol_error`.
fn failed(peer: &SpiffeId, error: &std::io::Error) -> Failure {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let certificate = matches!(tls, Some(rustls::Error::InvalidCertificate(_)));
    let kind = match certificate {
        true => ErrorType::TlsCertificateError,
        false => ErrorType::TlsProtocolError,
    };
    let cause = match tls {
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other))) => {
            match other.0.downcast_ref::<IdentityError>() {
                Some(identity) => identity.to_string(),
                None => other.to_string(),
            }
        }
        _ => error.to_string(),
    };
    unprocessed(kind, format!("handshake with {peer}: {cause}"))
}

/// The application's port in a server name, as the dialling side writes it.
#[must_use]
pub fn sni_port(name: Option<&str>) -> Option<u16> {
    name?.strip_prefix("port-")?.strip_suffix(".duet.internal")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_travels_in_the_server_name() {
        assert_eq!(sni_port(Some("port-8080.duet.internal")), Some(8080));
        assert_eq!(sni_port(Some("port-99999.duet.internal")), None);
        assert_eq!(sni_port(Some("example.com")), None);
        assert_eq!(sni_port(None), None);
    }
}
