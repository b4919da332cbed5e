//! A workload that is shut out, and let in again, with `duet token`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests: a failure here is a failed test"
)]

use std::process::{Command, Output};

use std::time::Duration;

use duet_tests::app::{App, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, metrics};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

fn token(control_plane: &ControlPlane, arguments: &[&str]) -> Output {
    Command::new(duet_tests::process::program("duet"))
        .arg("token")
        .args(arguments)
        .arg("--state")
        .arg(control_plane.folder.path().join("control-plane"))
        .output()
        .unwrap()
}

async fn connections(control_plane: &ControlPlane) -> f64 {
    metrics::sum(control_plane.admin, "duet_control_plane_watches", &[]).await
}

#[tokio::test]
async fn a_revoked_sidecar_loses_its_streams_and_a_restored_one_comes_back() {
    let control_plane = ControlPlane::start(&[]).await;
    let _orders = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let _payments = Sidecar::ready(&control_plane, Options::client("payments")).await;
    let watches = |wanted: f64| {
        let control_plane = &control_plane;
        eventually("watches come and go", SOON, move || async move {
            ((connections(control_plane).await - wanted).abs() < 0.5).then_some(())
        })
    };
    watches(2.0).await;

    let revoked = token(&control_plane, &["revoke", "--identity", "default/orders"]);
    assert!(revoked.status.success(), "{}", String::from_utf8_lossy(&revoked.stderr));
    watches(1.0).await;
    eventually("it is refused when it comes back", SOON, || async {
        let reason = [("reason", "revoked")];
        let name = "duet_control_plane_refused_connections_total";
        (metrics::sum(control_plane.admin, name, &reason).await >= 1.0).then_some(())
    })
    .await;
    let list = token(&control_plane, &["list"]);
    let list = String::from_utf8(list.stdout).unwrap();
    assert!(list.contains("identity default/orders  revoked"), "{list}");
    let create = token(&control_plane, &["create", "--service-account", "orders"]);
    assert!(!create.status.success());
    assert!(String::from_utf8_lossy(&create.stderr).contains("default/orders was revoked"));

    let restored = token(&control_plane, &["restore", "--identity", "default/orders"]);
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    watches(2.0).await;
    for wrong in [
        &["revoke"][..],
        &["revoke", "--identity", "orders"],
        &["revoke", "x", "--identity", "a/b"],
    ] {
        assert!(!token(&control_plane, wrong).status.success(), "{wrong:?}");
    }
}

/// Switches protocols, and then says nothing.
async fn switch(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                // The end is the sidecar's probe.
                let Ok(byte) = stream.read_u8().await else { return };
                head.push(byte);
            }
            let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\n\
                          upgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0, "the tunnel ends");
        });
    }
}

/// The control plane has nothing more to say to a sidecar that was shut out, but others still have to be kept from it.
#[tokio::test]
async fn other_sidecars_cut_off_who_is_revoked() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let chat_port = listener.local_addr().unwrap().port();
    tokio::spawn(switch(listener));
    let slow = |asked: &duet_tests::app::Asked| {
        let wait = if asked.path == "/slow" { SOON * 10 } else { Duration::ZERO };
        Reply::new(200, "").after(wait)
    };
    let app = App::replying(slow).await;
    let control_plane = ControlPlane::start(&[]).await;
    let payments = Sidecar::ready(&control_plane, Options::service("payments", app.port())).await;
    let _chat = Sidecar::ready(&control_plane, Options::service("chat", chat_port)).await;
    let orders = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let carts = Sidecar::ready(&control_plane, Options::client("carts")).await;
    assert_eq!(http::get(orders.ports.outbound, "payments", "/").await.status(), 200);
    let through = orders.ports.outbound;
    let in_hand = tokio::spawn(async move { http::get(through, "payments", "/slow").await });
    let mut tunnel = TcpStream::connect(orders.ports.outbound).await.unwrap();
    let request = "GET /ws HTTP/1.1\r\nHost: chat\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Key: x\r\n\r\n";
    tunnel.write_all(request.as_bytes()).await.unwrap();
    let mut head = [0; 12];
    tunnel.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 101");
    eventually("the slow request is in hand", SOON, || async {
        app.asked().iter().any(|asked| asked.path == "/slow").then_some(())
    })
    .await;

    assert!(token(&control_plane, &["revoke", "--identity", "default/orders"]).status.success());
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(SOON, tunnel.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the tunnel is cut");
    let cut = tokio::time::timeout(SOON, in_hand).await.expect("what is in hand is cut").unwrap();
    assert!(cut.status().is_server_error(), "{}", cut.status());
    let refused = http::get(orders.ports.outbound, "payments", "/").await;
    assert_eq!(refused.status(), 502, "the connection is closed by its other end");
    let refused = [("listener", "inbound"), ("reason", "revoked")];
    let name = "duet_connections_refused_total";
    assert!(metrics::sum(payments.ports.admin, name, &refused).await >= 1.0);
    assert_eq!(http::get(carts.ports.outbound, "payments", "/").await.status(), 200);

    assert!(token(&control_plane, &["restore", "--identity", "default/orders"]).status.success());
    eventually("it may call again", SOON, || async {
        (http::get(orders.ports.outbound, "payments", "/").await.status() == 200).then_some(())
    })
    .await;
}

/// Nobody can tell it who is shut out: it has to know.
#[tokio::test]
async fn a_sidecar_that_restarts_while_the_control_plane_is_away_knows_who_is_revoked() {
    let app = App::echo("payments").await;
    let mut control_plane = ControlPlane::start(&[]).await;
    let mut payments =
        Sidecar::ready(&control_plane, Options::service("payments", app.port())).await;
    let orders = Sidecar::ready(&control_plane, Options::client("orders")).await;
    let carts = Sidecar::ready(&control_plane, Options::client("carts")).await;
    let status = async |caller: &Sidecar| {
        http::get(caller.ports.outbound, "payments", "/").await.status().as_u16()
    };
    assert_eq!((status(&orders).await, status(&carts).await), (200, 200));
    assert!(token(&control_plane, &["revoke", "--identity", "default/orders"]).status.success());
    eventually("it is shut out", SOON, async || (status(&orders).await == 502).then_some(())).await;
    let list = payments.state.join("revoked");
    eventually("that is on disk", SOON, async || list.exists().then_some(())).await;
    control_plane.kill();
    payments.restart().await;
    eventually("it is back", SOON, async || (status(&carts).await == 200).then_some(())).await;
    assert_eq!(status(&orders).await, 502, "after the restart as well");

    payments.process.kill();
    std::fs::write(&list, "damaged").unwrap();
    payments.restart().await;
    eventually("it goes on", SOON, async || (status(&carts).await == 200).then_some(())).await;
    control_plane.restart().await;
    eventually("it is told again", SOON, async || (status(&orders).await == 502).then_some(()))
        .await;
    eventually("that is on disk", SOON, async || {
        std::fs::read_to_string(&list).ok()?.ends_with("default/orders\n").then_some(())
    })
    .await;
}
