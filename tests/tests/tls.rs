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
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use duet_api::tls::{Peer, TlsMaterial, client_config, provider};
use duet_tests::app::App;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use rcgen::{Certificate, CertificateParams, CertifiedIssuer, Issuer, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, HandshakeKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const MARKER: &str = "a-marker-that-must-not-be-seen";
const HOUR: Duration = Duration::from_secs(3600);

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

const CALLER: &str = "spiffe://duet.local/ns/default/sa/caller";

/// The certificate of a workload of this mesh, by any CA, from one time to another.
fn certificate(issuer: &Issuer<'_, KeyPair>, valid: Range<SystemTime>) -> (KeyPair, Certificate) {
    let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(CALLER.try_into().unwrap())];
    params.not_before = epoch + since_epoch(valid.start);
    params.not_after = epoch + since_epoch(valid.end);
    let certificate = params.signed_by(&key, issuer).unwrap();
    (key, certificate)
}

/// The same, with what TLS needs besides; since an hour ago.
fn material(
    issuer: &Issuer<'_, KeyPair>,
    roots: Vec<CertificateDer<'static>>,
    until: SystemTime,
) -> TlsMaterial {
    let (key, certificate) = certificate(issuer, SystemTime::now() - 2 * HOUR..until);
    TlsMaterial {
        chain: vec![certificate.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        roots,
        id: CALLER.parse().unwrap(),
    }
}

/// The CA of a mesh.
fn ca(control_plane: &ControlPlane) -> (Issuer<'static, KeyPair>, Vec<CertificateDer<'static>>) {
    let ca = control_plane.folder.path().join("control-plane/ca");
    let pem = std::fs::read_to_string(ca.join("ca.pem")).unwrap();
    let key = KeyPair::from_pem(&std::fs::read_to_string(ca.join("ca-key.pem")).unwrap()).unwrap();
    let root = duet_api::token::certificates_from_pem(&pem).unwrap();
    let root = root.into_iter().map(Into::into).collect();
    (Issuer::from_ca_cert_pem(&pem, key).unwrap(), root)
}

/// For a peer of the mesh that ends at `until`.
fn config(control_plane: &ControlPlane, until: SystemTime, protocol: &str) -> ClientConfig {
    let (issuer, root) = ca(control_plane);
    let peer = Peer::TrustDomain("duet.local".to_owned());
    let mut config = client_config(&material(&issuer, root, until), peer).unwrap();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    config
}

async fn connect(config: &Arc<ClientConfig>, sidecar: &Sidecar, port: u16) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(sidecar.ports.inbound).await.unwrap();
    let name = ServerName::try_from(format!("port-{port}.duet.internal")).unwrap();
    TlsConnector::from(Arc::clone(config)).connect(name, stream).await.unwrap()
}

/// A request by HTTP/1, and its answer as far as it comes at once.
async fn ask(stream: &mut TlsStream<TcpStream>, path: &str) -> std::io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: web\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = vec![0; 16 * 1024];
    let length = stream.read(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
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

    let (issuer, root) = ca(&control_plane);
    let peer = || Peer::TrustDomain("duet.local".to_owned());

    let good = material(&issuer, root.clone(), SystemTime::now() + HOUR);
    assert!(is_answered(client_config(&good, peer()).unwrap(), inbound, port).await);
    assert!(
        !is_answered(client_config(&good, peer()).unwrap(), inbound, port ^ 1).await,
        "a port that was not declared"
    );
    let expired = material(&issuer, root.clone(), SystemTime::now() - HOUR);
    assert!(!is_answered(client_config(&expired, peer()).unwrap(), inbound, port).await, "expired");

    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let other = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let foreign = material(&other, root, SystemTime::now() + HOUR);
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

#[tokio::test]
async fn every_connection_of_a_peer_is_verified_anew() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let config = Arc::new(config(&control_plane, SystemTime::now() + HOUR, "http/1.1"));
    for _ in 0..3 {
        let mut stream = connect(&config, &server, app.port()).await;
        // A ticket would come before the answer.
        assert!(ask(&mut stream, "/").await.unwrap().starts_with("HTTP/1.1 200"));
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[tokio::test]
async fn a_connection_ends_with_the_certificate_of_its_peer_and_what_it_began_is_answered() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let end = SystemTime::now() + Duration::from_secs(5);
    let config = Arc::new(config(&control_plane, end, "http/1.1"));
    let mut idle = connect(&config, &server, app.port()).await;
    let mut busy = connect(&config, &server, app.port()).await;
    for stream in [&mut idle, &mut busy] {
        assert!(ask(stream, "/").await.unwrap().starts_with("HTTP/1.1 200"));
        assert!(ask(stream, "/").await.unwrap().starts_with("HTTP/1.1 200"), "it stays open");
    }
    let answer = ask(&mut busy, "/delay/7000").await.unwrap();
    assert!(SystemTime::now() > end, "the answer came after the end");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for mut stream in [idle, busy] {
        let after = ask(&mut stream, "/").await;
        assert!(after.as_ref().is_ok_and(String::is_empty) || after.is_err(), "{after:?}");
    }
    let mut late = connect(&config, &server, app.port()).await;
    assert!(ask(&mut late, "/").await.is_err(), "refused with the handshake");
    assert_eq!(app.asked().len(), 5);
}

/// A head with `END_STREAM`: `GET / HTTP/2` for `web`.
fn get_frame(stream: u8, authority: &[u8]) -> Vec<u8> {
    let block = [&[0x82, 0x86, 0x84], authority].concat();
    [&[0, 0, u8::try_from(block.len()).unwrap(), 1, 5, 0, 0, 0, stream], block.as_slice()].concat()
}

/// Reads frames until a head on a stream.
async fn head_on(stream: &mut TlsStream<TcpStream>, number: u8) {
    loop {
        let mut header = [0; 9];
        stream.read_exact(&mut header).await.unwrap();
        let length = usize::from(u16::from_be_bytes([header[1], header[2]]));
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        if (header[3], header[8]) == (1, number) {
            return;
        }
    }
}

/// A connection ends when both sides are done, and this one does not listen.
#[tokio::test]
async fn a_peer_that_stays_on_after_its_certificate_gets_nothing_from_the_application() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let config = config(&control_plane, SystemTime::now() + Duration::from_secs(4), "h2");
    let mut stream = connect(&Arc::new(config), &server, app.port()).await;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    stream.write_all(&get_frame(1, b"\x41\x03web")).await.unwrap();
    head_on(&mut stream, 1).await;
    assert_eq!(app.asked().len(), 1);
    tokio::time::sleep(Duration::from_secs(11)).await;
    stream.write_all(&get_frame(3, &[0xbe])).await.unwrap();
    head_on(&mut stream, 3).await;
    assert_eq!(app.asked().len(), 1);
}

#[tokio::test]
async fn a_sidecar_changes_connections_before_its_certificate_ends_and_no_call_fails() {
    let control_plane = ControlPlane::start(&[]).await;
    let app = App::echo("web").await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    let (start, life) = (Instant::now(), Duration::from_secs(12));
    let now = SystemTime::now();
    let (key, certificate) = certificate(&ca(&control_plane).0, now..now + life);
    let state = control_plane.folder.path().join("sidecars/caller");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::write(state.join("svid.pem"), key.serialize_pem() + &certificate.pem()).unwrap();
    let root = control_plane.folder.path().join("control-plane/ca/ca.pem");
    std::fs::copy(root, state.join("trust-bundle.pem")).unwrap();
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let client = http::client();
    let call = || {
        let to = caller.ports.outbound;
        http::request(&client, reqwest::Method::POST, to, "web", "/").send()
    };
    assert_eq!(call().await.unwrap().status(), 200);
    assert!(caller.process.log().contains("using the stored certificate"));
    let opened = || async {
        let name = "duet_connections_opened_total";
        metrics::sum(caller.ports.metrics, name, &[("target", "mesh")]).await
    };
    let before = opened().await;
    assert!(start.elapsed() < life / 3, "the machine is too slow for this certificate");
    let mut changed = None;
    while start.elapsed() < life + Duration::from_secs(3) {
        assert_eq!(call().await.unwrap().status(), 200, "{:?}", start.elapsed());
        if changed.is_none() && opened().await > before {
            changed = Some(start.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let changed = changed.expect("there is another connection");
    assert!(changed > life / 2 && changed < life, "{changed:?}");
}
