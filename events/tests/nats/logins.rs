//! Who the control plane is to the servers, and whom it believes.

use std::time::Duration;

use duet_events::bus::{EventBus as _, PublishErrorKind};
use duet_events::nats::{NatsBus, NatsLogin, NatsOptions, NatsTls};

use super::behaviour::{events, eventually, publish};
use super::{Server, connect, options};

#[tokio::test]
async fn a_wrong_login_is_away_and_the_right_one_works_until_the_next_one() {
    let Some(mut server) = Server::start("authorization { token: sesame }").await else { return };
    let registry = prometheus::Registry::new();
    let bus = NatsBus::open("default", options(&server), &registry).await.unwrap();
    assert!(bus.connected(Duration::from_secs(1)).await.is_err());
    let error = bus.publish("orders", events([1])).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Unavailable);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "sesame\n").unwrap();
    let login = NatsLogin::Token(file.path().to_owned());
    let bus = connect(NatsOptions { login, ..options(&server) }).await;
    assert_eq!(publish(&*bus, [1]).await[0].position, 1);
    // The token is renewed.
    server.kill();
    server.configure("authorization { token: open }");
    server.restart().await;
    assert!(bus.publish("orders", events([2])).await.is_err());
    std::fs::write(&file, "open\n").unwrap();
    eventually("the new token is used", async || bus.publish("orders", events([2])).await.is_ok())
        .await;
}

#[tokio::test]
async fn tls_is_checked_and_names_its_client() {
    let dir = tempfile::TempDir::new().unwrap();
    let (ca, key) = authority();
    let signed = |name: &str| {
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let own = rcgen::KeyPair::generate().unwrap();
        let issuer = rcgen::Issuer::from_params(&ca, &key);
        (params.signed_by(&own, &issuer).unwrap().pem(), own.serialize_pem())
    };
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let root = file("ca.pem", &ca.self_signed(&key).unwrap().pem());
    let (server_cert, server_key) = signed("localhost");
    let (client_cert, client_key) = signed("client");
    let (cert, secret) = (file("s.pem", &server_cert), file("s.key", &server_key));
    let settings = format!(
        "tls {{ cert_file: {cert:?}, key_file: {secret:?}, ca_file: {root:?}, verify: true }}"
    );
    let Some(server) = Server::start(&settings).await else { return };
    let servers = vec![server.url().replace("nats://127.0.0.1", "tls://localhost")];
    let client = Some((file("c.pem", &client_cert), file("c.key", &client_key)));
    let tls = NatsTls { ca_file: Some(root), client };
    let with = |tls| NatsOptions { servers: servers.clone(), tls, ..options(&server) };
    let bus = connect(with(Some(tls.clone()))).await;
    assert_eq!(publish(&*bus, [1]).await[0].position, 1);
    for (tls, why) in [
        (NatsTls { client: None, ..tls.clone() }, "no certificate of the client"),
        (NatsTls { ca_file: None, ..tls }, "a server that nobody vouches for"),
    ] {
        let registry = prometheus::Registry::new();
        let bus = NatsBus::open("default", with(Some(tls)), &registry).await.unwrap();
        assert!(bus.connected(Duration::from_secs(1)).await.is_err(), "{why}");
    }
}

fn authority() -> (rcgen::CertificateParams, rcgen::KeyPair) {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    (params, rcgen::KeyPair::generate().unwrap())
}

#[tokio::test]
async fn a_credentials_file_logs_in() {
    let operator = nkeys::KeyPair::new_operator();
    let account = nkeys::KeyPair::new_account();
    let user = nkeys::KeyPair::new_user();
    let limits = r#""jetstream": {}, "limits": {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "wildcards": true}"#;
    let account_jwt = jwt(
        &operator,
        &account.public_key(),
        &format!(r#"{{{limits}, "type": "account", "version": 2}}"#),
    );
    let user_jwt = jwt(
        &account,
        &user.public_key(),
        r#"{"subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2}"#,
    );
    let operator_jwt =
        jwt(&operator, &operator.public_key(), r#"{"type": "operator", "version": 2}"#);
    // JetStream wants one that is not ours.
    let system = nkeys::KeyPair::new_account();
    let system_jwt = jwt(&operator, &system.public_key(), r#"{"type": "account", "version": 2}"#);
    let settings = format!(
        "operator: {operator_jwt}\nresolver: MEMORY\nsystem_account: {}\nresolver_preload: {{ {}: {account_jwt}, {}: {system_jwt} }}",
        system.public_key(),
        account.public_key(),
        system.public_key()
    );
    let Some(server) = Server::start(&settings).await else { return };
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        user.seed().unwrap()
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, credentials).unwrap();
    let login = NatsLogin::Credentials(file.path().to_owned());
    let bus = connect(NatsOptions { login, ..options(&server) }).await;
    assert_eq!(publish(&*bus, [1]).await[0].position, 1);
}

/// As NATS' own tools sign them.
fn jwt(issuer: &nkeys::KeyPair, subject: &str, claims: &str) -> String {
    use base64::Engine as _;
    let encode = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let head = encode(br#"{"typ":"JWT","alg":"ed25519-nkey"}"#);
    let body = format!(
        r#"{{"jti": "x", "iat": 1700000000, "iss": "{}", "name": "test", "sub": "{subject}", "nats": {claims}}}"#,
        issuer.public_key()
    );
    let signed = format!("{head}.{}", encode(body.as_bytes()));
    let signature = encode(&issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}
