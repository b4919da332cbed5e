//! The connection to the control plane: gRPC over TLS 1.3 with SPIFFE names on both sides.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use duet_api::spiffe::SpiffeId;
use duet_api::tls::{IdentityError, Peer, client_config};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::SvidWatch;

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A control plane that vanished without a word is noticed in this time.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel that connects when first used, reconnects by itself, and uses the newest certificate each time.
///
/// # Errors
/// When the address is not host:port.
pub fn channel(control_plane: &str, svid: SvidWatch) -> anyhow::Result<Channel> {
    let address: Arc<str> = control_plane.into();
    let connector = tower::service_fn(move |_uri: Uri| {
        let (address, svid) = (Arc::clone(&address), svid.clone());
        async move {
            let config = current_config(&svid).map_err(io::Error::other)?;
            Ok::<_, io::Error>(TokioIo::new(dial(&address, config).await?))
        }
    });
    Ok(endpoint(control_plane)?.connect_with_connector_lazy(connector))
}

/// A channel over one connection made now, with its own TLS configuration: for first contact.
///
/// # Errors
/// When the control plane cannot be reached, or is not the right one.
pub async fn connect_once(control_plane: &str, config: ClientConfig) -> anyhow::Result<Channel> {
    let address: Arc<str> = control_plane.into();
    // Dialled here and not in the connector, whose errors tonic hides behind "transport error".
    let mut stream = Some(TokioIo::new(
        dial(&address, config).await.with_context(|| format!("connecting to {address}"))?,
    ));
    let connector = tower::service_fn(move |_uri: Uri| {
        let stream = stream.take();
        async move { stream.ok_or_else(|| io::Error::other("the first connection ended")) }
    });
    Ok(endpoint(control_plane)?.connect_with_connector(connector).await?)
}

fn endpoint(control_plane: &str) -> anyhow::Result<Endpoint> {
    let uri: Uri = format!("http://{control_plane}")
        .parse()
        .with_context(|| format!("--control-plane {control_plane}: give HOST:PORT"))?;
    if uri.port_u16().is_none() {
        anyhow::bail!("--control-plane {control_plane}: give HOST:PORT");
    }
    Ok(Endpoint::from(uri)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20))
}

fn current_config(svid: &SvidWatch) -> anyhow::Result<ClientConfig> {
    let svid = svid.borrow().clone().context("no certificate yet")?;
    let control_plane = SpiffeId::control_plane(svid.material.id.trust_domain())?;
    Ok(client_config(&svid.material, Peer::Exactly(control_plane))?)
}

async fn dial(address: &str, mut config: ClientConfig) -> io::Result<TlsStream<TcpStream>> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("control-plane.duet.internal").map_err(io::Error::other)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(in_words)
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connect)
        .await
        .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
}

/// What is wrong with who the peer is: of such an error, rustls shows only the name of its type.
fn in_words(error: io::Error) -> io::Error {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if let Some(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other))) = tls
        && let Some(identity) = other.0.downcast_ref::<IdentityError>()
    {
        return io::Error::new(error.kind(), identity.to_string());
    }
    error
}

/// A status's message with its causes, which `Display` leaves out. Many repeat the text of their own cause.
#[must_use]
pub fn message(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layer(&'static str, #[source] Option<Box<Layer>>);

    #[test]
    fn another_ca_is_said_in_words() {
        let other = rustls::OtherError(Arc::new(IdentityError::CaHash));
        let tls = rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other));
        let said = in_words(io::Error::new(io::ErrorKind::InvalidData, tls)).to_string();
        assert_eq!(said, "the server's CA is not the one named by the join token");
        assert_eq!(in_words(io::Error::other("broken")).to_string(), "broken");
    }

    #[test]
    fn each_cause_is_said_once() {
        let cause = Layer("refused", Some(Box::new(Layer("refused", None))));
        let status = tonic::Status::from_error(Box::new(Layer("no way", Some(Box::new(cause)))));
        assert_eq!(message(&status), "no way: refused");
        assert_eq!(message(&tonic::Status::unavailable("alone")), "alone");
    }
}
