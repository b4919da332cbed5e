//! Who gets a certificate, and who does not.

use std::time::Duration;

use duet_api::proto;
use duet_api::proto::discovery_client::DiscoveryClient;
use duet_api::tls::{self, TlsMaterial};
use duet_api::token::JoinClaims;
use duet_control_plane::revoked::{self, Identity};
use duet_control_plane::token;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tonic::Code;

use super::mesh::{Mesh, SOON, certify, connect, mtls, try_connect};

#[tokio::test]
async fn a_token_gets_a_certificate_and_the_certificate_renews_itself() {
    let mesh = Mesh::start("").await;
    let sidecar = mesh.sidecar("shop", "orders").await;
    let expected = "spiffe://duet.local/ns/shop/sa/orders";
    assert_eq!(sidecar.material.id.to_string(), expected);
    let leaf = &sidecar.material.chain[0];
    assert_eq!(tls::spiffe_id(leaf).unwrap().to_string(), expected);
    let renewed = certify(sidecar.channel.clone(), "").await.unwrap();
    assert_eq!(renewed.id, sidecar.material.id);
    assert_ne!(renewed.chain, sidecar.material.chain);
    assert!(
        (mesh.metric("duet_control_plane_certificates_total{method=\"renewal\"}").await - 1.0)
            .abs()
            < 0.1
    );
}

#[tokio::test]
async fn a_server_with_another_ca_than_the_tokens_is_refused_by_the_client() {
    let (mesh, other) = (Mesh::start("").await, Mesh::start("").await);
    let token = other.token("shop", "orders", false);
    let hash = JoinClaims::read_unverified(&token).unwrap().ca_hash().unwrap();
    let config = tls::first_contact_config(hash).unwrap();
    let error = format!("{:?}", try_connect(mesh.grpc(), config).await.unwrap_err());
    assert!(error.contains("CaHash"), "{error}");
    mesh.wait_for_metric(
        "duet_control_plane_refused_connections_total{reason=\"refused_by_peer\"}",
        1.0,
    )
    .await;
}

#[tokio::test]
async fn a_single_use_token_works_once() {
    let mesh = Mesh::start("").await;
    let token = mesh.token("shop", "orders", true);
    mesh.join(&token).await.unwrap();
    let status = mesh.join(&token).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("was used before"), "{status}");
    let refused =
        "duet_control_plane_refused_requests_total{reason=\"token_used\",service=\"identity\"}";
    mesh.wait_for_metric(refused, 1.0).await;
}

#[tokio::test]
async fn a_reusable_token_works_until_it_is_revoked() {
    let mesh = Mesh::start("").await;
    let token = mesh.token("shop", "orders", false);
    for _ in 0..2 {
        mesh.join(&token).await.unwrap();
    }
    let id = &token::list(&mesh.args.state).unwrap()[0].claims.jti;
    token::revoke(&mesh.args.state, id).unwrap();
    let status = mesh.join(&token).await.unwrap_err();
    assert!(status.message().contains("revoked"), "{status}");
}

#[tokio::test]
async fn bad_tokens_and_requests_are_refused_and_cost_nothing() {
    let mesh = Mesh::start("").await;
    let token = mesh.token("shop", "orders", true);
    let hash = JoinClaims::read_unverified(&token).unwrap().ca_hash().unwrap();
    let channel = connect(mesh.grpc(), tls::first_contact_config(hash).unwrap()).await;
    let garbage = certify(channel.clone(), "not.a.token").await.unwrap_err();
    assert_eq!(garbage.code(), Code::Unauthenticated);
    let long = certify(channel.clone(), &"x".repeat(10_000)).await.unwrap_err();
    assert_eq!(long.code(), Code::Unauthenticated);
    let nobody = certify(channel.clone(), "").await.unwrap_err();
    assert!(nobody.message().contains("needs a join token"), "{nobody}");
    let mut client = proto::identity_client::IdentityClient::new(channel.clone());
    let request = proto::CertifyRequest { csr: b"no request".to_vec(), token: token.clone() };
    let csr = client.certify(request).await.unwrap_err();
    assert_eq!(csr.code(), Code::InvalidArgument);
    mesh.join(&token).await.expect("the bad request did not use the token up");
    let watch = DiscoveryClient::new(channel).watch(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(watch.code(), Code::Unauthenticated);
}

/// A certificate of the mesh's CA with another lifetime, or of another CA.
fn forge(mesh: &Mesh, genuine: &TlsMaterial, years: (i32, i32), own_ca: bool) -> TlsMaterial {
    let pem = std::fs::read_to_string(mesh.args.state.join("ca/ca-key.pem")).unwrap();
    let ca = if own_ca { KeyPair::generate().unwrap() } else { KeyPair::from_pem(&pem).unwrap() };
    let issuer = Issuer::from_ca_cert_der(&genuine.roots[0], ca).unwrap();
    let mut params = CertificateParams::default();
    let uri = genuine.id.to_string().try_into().unwrap();
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
    params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    TlsMaterial {
        chain: vec![leaf.der().clone()],
        key: key.into(),
        roots: genuine.roots.clone(),
        id: genuine.id.clone(),
    }
}

#[tokio::test]
async fn expired_and_foreign_certificates_are_refused_and_counted() {
    let mesh = Mesh::start("").await;
    let genuine = mesh.sidecar("shop", "orders").await.material;
    let cases = [
        (forge(&mesh, &genuine, (2020, 2021), false), "certificate_expired"),
        (forge(&mesh, &genuine, (2020, 2090), true), "certificate"),
    ];
    for (material, reason) in cases {
        // In TLS 1.3 a client learns of the refusal when it first reads.
        if let Ok(channel) = try_connect(mesh.grpc(), mtls(&material)).await {
            assert!(certify(channel, "").await.is_err(), "{reason}");
        }
        let name = format!("duet_control_plane_refused_connections_total{{reason=\"{reason}\"}}");
        mesh.wait_for_metric(&name, 1.0).await;
    }
    mesh.sidecar("shop", "orders").await;
}

#[tokio::test]
async fn a_client_that_says_nothing_is_let_go() {
    let mesh = Mesh::start("").await;
    let mut silent = TcpStream::connect(mesh.grpc()).await.unwrap();
    let mut bytes = [0; 16];
    let read = tokio::time::timeout(SOON, silent.read(&mut bytes));
    assert_eq!(read.await.expect("closed in time").unwrap_or(0), 0);
    let name = "duet_control_plane_refused_connections_total{reason=\"timeout\"}";
    mesh.wait_for_metric(name, 1.0).await;
}

#[tokio::test]
async fn the_admin_pages_answer() {
    let mesh = Mesh::start("").await;
    for page in ["/live", "/ready", "/metrics"] {
        assert_eq!(mesh.get(page).await.0, "HTTP/1.1 200 OK", "{page}");
    }
    assert_eq!(mesh.get("/nothing").await.0, "HTTP/1.1 404 Not Found");
    assert!(mesh.get("/metrics").await.1.contains("duet_build_info"));
    let stopping = Duration::from_secs(8);
    let mut mesh = mesh;
    let stop = mesh.control_plane.take().unwrap().shutdown();
    tokio::time::timeout(stopping, stop).await.expect("stops in time");
}

#[tokio::test]
async fn a_revoked_identity_is_cut_off_and_comes_back_when_it_is_restored() {
    let mesh = Mesh::start("").await;
    let (orders, payments) =
        (mesh.sidecar("shop", "orders").await, mesh.sidecar("shop", "payments").await);
    let token = mesh.token("shop", "orders", false);
    let (mut watch, mut other) = (orders.watch(&["orders"]).await, payments.watch(&[]).await);
    watch.next().await.unwrap();
    other.next().await.unwrap();

    let identity: Identity = "shop/orders".parse().unwrap();
    revoked::revoke(&mesh.args.state, &identity).unwrap();
    // At once, whatever the connection is.
    let status = mesh.join(&token).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("shop/orders was revoked"), "{status}");
    assert!(certify(orders.channel.clone(), "").await.is_err());
    // Streams of before within seconds, and no new connection.
    assert!(watch.next().await.is_err());
    certify(orders.channel.clone(), "").await.unwrap_err();
    mesh.wait_for_metric("duet_control_plane_refused_connections_total{reason=\"revoked\"}", 1.0)
        .await;
    certify(payments.channel.clone(), "").await.expect("another identity goes on");

    revoked::restore(&mesh.args.state, &identity).unwrap();
    let again = async {
        while !is_served(&mesh, &orders.material).await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON, again).await.expect("it is let in again");
}

#[tokio::test]
async fn an_identity_stays_revoked_over_a_restart() {
    let mut mesh = Mesh::start("").await;
    let orders = mesh.sidecar("shop", "orders").await;
    revoked::revoke(&mesh.args.state, &"shop/orders".parse().unwrap()).unwrap();
    mesh.restart().await;
    assert!(!is_served(&mesh, &orders.material).await);
}

/// Whether the certificate is renewed, on a connection of its own.
async fn is_served(mesh: &Mesh, material: &TlsMaterial) -> bool {
    match try_connect(mesh.grpc(), mtls(material)).await {
        Ok(channel) => certify(channel, "").await.is_ok(),
        Err(_) => false,
    }
}
