//! What travels between two sidecars, and who is let in.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use duet_api::tls::{Peer, TlsMaterial, client_config, provider};
use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use rcgen::{CertificateParams, CertifiedIssuer, Issuer, KeyPair, SanType};
use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

const MARKER: &str = "a-marker-that-must-not-be-seen";

/// Passes bytes on, and keeps them.
async fn record(listener: TcpListener, to: SocketAddr, seen: [Arc<Mutex<Vec<u8>>>; 2]) {
    while let Ok((client, _)) = listener.accept().await {
        let server = TcpStream::connect(to).await.unwrap();
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        let [up, down] = seen.clone();
        tokio::spawn(pass(client_read, server_write, up));
        tokio::spawn(pass(server_read, client_write, down));
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    seen: Arc<Mutex<Vec<u8>>>,
) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        seen.lock().unwrap().extend_from_slice(&buffer[..length]);
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Types of the TLS records in a capture; fails the test where it is not a sequence of TLS records.
fn record_types(bytes: &[u8]) -> Vec<u8> {
    let (mut types, mut rest) = (Vec::new(), bytes);
    while rest.len() >= 5 {
        assert!((20..=23).contains(&rest[0]), "not a TLS record: {:?}", &rest[..5]);
        assert_eq!(rest[1], 3, "not a TLS record: {:?}", &rest[..5]);
        types.push(rest[0]);
        let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        rest = rest.get(5 + length..).unwrap_or_default();
    }
    types
}

#[tokio::test]
async fn between_two_sidecars_there_is_tls_1_3_and_nothing_else() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let relay = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let advertise = relay.local_addr().unwrap().to_string();
    let options = Options::service("web", app.port()).flags(&["--advertise", &advertise]);
    let server = Sidecar::ready(&control_plane, options).await;
    let seen: [Arc<Mutex<Vec<u8>>>; 2] = Default::default();
    let task = tokio::spawn(record(relay, server.ports.inbound, seen.clone()));
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let request = http::client().post(format!("http://{}/{MARKER}", caller.ports.outbound));
    let response = request.header("host", "web").header("x-marker", MARKER).body(MARKER);
    let response = response.send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.text().await.unwrap().contains(MARKER), "the application saw it");
    task.abort();

    for side in &seen {
        let bytes = side.lock().unwrap().clone();
        let types = record_types(&bytes);
        assert!(types.len() > 2 && types.contains(&23), "{types:?}");
        let clear = bytes.windows(MARKER.len()).any(|window| window == MARKER.as_bytes());
        assert!(!clear, "the marker was readable");
    }
    // The ServerHello's supported_versions extension (43) of two bytes says 0x0304: TLS 1.3.
    let down = seen[1].lock().unwrap().clone();
    let hello = &down[..5 + usize::from(u16::from_be_bytes([down[3], down[4]]))];
    assert!(hello.windows(6).any(|bytes| bytes == [0, 43, 0, 2, 3, 4]), "{hello:?}");
}

/// Believes every server: the question here is whom the server believes.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

fn without_certificate(version: &'static rustls::SupportedProtocolVersion) -> ClientConfig {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth()
}

/// A certificate for a workload of this mesh, by any CA, that ended `expired_days` ago or is valid.
fn material(
    issuer: &Issuer<'_, KeyPair>,
    roots: Vec<CertificateDer<'static>>,
    expired: bool,
) -> TlsMaterial {
    let uri = "spiffe://duet.local/ns/default/sa/caller";
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(if expired { 2021 } else { 2090 }, 1, 1);
    let certificate = params.signed_by(&key, issuer).unwrap();
    TlsMaterial {
        chain: vec![certificate.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        roots,
        id: uri.parse().unwrap(),
    }
}

/// Handshakes and sends a request; whether any HTTP answer came. With TLS 1.3 a refusal shows at the first read only.
async fn is_answered(mut config: ClientConfig, inbound: SocketAddr, port: u16) -> bool {
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let stream = TcpStream::connect(inbound).await.unwrap();
    let name = ServerName::try_from(format!("port-{port}.duet.internal")).unwrap();
    let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, stream).await else {
        return false;
    };
    if stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").await.is_err() {
        return false;
    }
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).await.is_ok() && answer.starts_with(b"HTTP/1.1")
}

#[tokio::test]
async fn only_workloads_of_this_mesh_are_let_in() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let (inbound, port) = (server.ports.inbound, app.port());

    let ca = control_plane.folder.path().join("control-plane/ca");
    let pem = std::fs::read_to_string(ca.join("ca.pem")).unwrap();
    let key = KeyPair::from_pem(&std::fs::read_to_string(ca.join("ca-key.pem")).unwrap()).unwrap();
    let root: Vec<CertificateDer<'static>> =
        duet_api::token::certificates_from_pem(&pem).unwrap().into_iter().map(Into::into).collect();
    let issuer = Issuer::from_ca_cert_pem(&pem, key).unwrap();
    let peer = || Peer::TrustDomain("duet.local".to_owned());

    let good = material(&issuer, root.clone(), false);
    assert!(is_answered(client_config(&good, peer()).unwrap(), inbound, port).await);
    assert!(
        !is_answered(client_config(&good, peer()).unwrap(), inbound, port ^ 1).await,
        "a port that was not declared"
    );
    let expired = material(&issuer, root.clone(), true);
    assert!(!is_answered(client_config(&expired, peer()).unwrap(), inbound, port).await, "expired");

    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let other = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let foreign = material(&other, root, false);
    assert!(
        !is_answered(client_config(&foreign, peer()).unwrap(), inbound, port).await,
        "other CA"
    );

    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        assert!(!is_answered(without_certificate(version), inbound, port).await, "{version:?}");
    }
    assert!(http::client().get(format!("http://{inbound}/")).send().await.is_err(), "plaintext");
    let silent = TcpStream::connect(inbound).await.unwrap();
    let reasons = [("tls_handshake", 5.0), ("unknown_port", 1.0), ("tls_timeout", 1.0)];
    for (reason, at_least) in reasons {
        let labels = [("listener", "inbound"), ("reason", reason)];
        eventually(&format!("{reason} is counted"), SOON, || async {
            let name = "duet_connections_refused_total";
            (metrics::sum(server.ports.metrics, name, &labels).await >= at_least).then_some(())
        })
        .await;
    }
    drop(silent);
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    assert_eq!(http::get(caller.ports.outbound, "web", "/").await.status(), 200);
    assert!(!server.process.log().contains("panicked"));
}
