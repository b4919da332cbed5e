//! Traffic policies, through two real sidecars: overload, limits, faults, deadlines, retries, mirrors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    clippy::cast_precision_loss,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use duet_tests::app::{App, Reply};
use duet_tests::http::{self, client};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::web::{Mesh, SERVICE, load, percentile, policy};
use duet_tests::{SOON, eventually, metrics};
use reqwest::Method;
use tokio::sync::Semaphore;

/// Answers per second of an application that is asked by just as many clients as it has workers.
async fn capacity(address: SocketAddr, clients: usize) -> f64 {
    let started = Instant::now();
    let time = Duration::from_secs(2);
    let asking = (0..clients).map(|_| async {
        let (client, mut answers) = (client(), 0_u32);
        while started.elapsed() < time {
            client.get(format!("http://{address}/")).send().await.unwrap();
            answers += 1;
        }
        answers
    });
    let answers: u32 = futures::future::join_all(asking).await.into_iter().sum();
    f64::from(answers) / started.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adaptive_concurrency_keeps_goodput_at_twice_the_capacity() {
    // 4 at once, 20 ms each: 200 a second.
    let workers = Arc::new(Semaphore::new(4));
    let turn = Duration::from_millis(20);
    let app = App::replying(move |asked| {
        let workers = (asked.path == "/").then(|| Arc::clone(&workers));
        Reply { workers, ..Reply::new(200, "").after(turn) }
    })
    .await;
    let apps = [app];
    let per_second = capacity(apps[0].address, 4).await;
    let mesh =
        Mesh::start(&policy("  concurrency: {adaptive: true}\n  retry: {attempts: 0}"), &apps)
            .await;
    // Latencies are the machine's as well: up to three times.
    let mut tries = Vec::new();
    let shed = loop {
        let (share, p99, shed) = overload(mesh.outbound(), per_second).await;
        tries.push((share, p99));
        if share > 0.9 && p99 < turn * 8 {
            break shed;
        }
        assert!(tries.len() < 3, "shares of the capacity of {per_second}/s, and p99: {tries:?}");
    };
    let labels = [("action", "shed")];
    let counted = metrics::sum(mesh.servers[0].ports.metrics, "duet_policy_actions_total", &labels);
    assert!(counted.await >= shed as f64);
}

/// 400 requests a second for a while. Returns, of those after it has settled, which share of the capacity was answered, the
/// p99 of these answers, and how many were shed.
async fn overload(outbound: SocketAddr, per_second: f64) -> (f64, Duration, usize) {
    let outcomes = load(outbound, 400, Duration::from_secs(12)).await;
    let settled: Vec<_> =
        outcomes.into_iter().filter(|(sent, ..)| *sent > Duration::from_secs(4)).collect();
    let good: Vec<Duration> =
        settled.iter().filter(|(_, status, _)| *status == 200).map(|(.., took)| *took).collect();
    let share = good.len() as f64 / (per_second * 8.0);
    let shed = settled.iter().filter(|(_, status, _)| *status == 503).count();
    assert!(shed > settled.len() / 4, "{shed} of {} were shed", settled.len());
    (share, percentile(good, 99), shed)
}

#[tokio::test]
async fn rate_limits_are_for_all_and_for_each_caller() {
    let app = App::replying(|_| Reply::new(200, "")).await;
    let spec = "  rateLimit: {requests: 20, per: 60s, perCaller: {requests: 12, per: 60s}}";
    let apps = [app];
    let mesh = Mesh::start(&policy(spec), &apps).await;
    let other = Sidecar::ready(&mesh.control_plane, Options::client("other")).await;
    let ask = |address: SocketAddr| async move {
        let response = http::get(address, "web", "/").await;
        let wait =
            response.headers().get("retry-after").map(|wait| wait.to_str().unwrap().to_owned());
        (response.status().as_u16(), wait)
    };
    let mut granted = 0;
    let refused = loop {
        match ask(mesh.outbound()).await {
            (200, _) => granted += 1,
            refused => break refused,
        }
        assert!(granted < 12);
    };
    assert_eq!(refused.0, 429);
    let wait: u64 = refused.1.unwrap().parse().unwrap();
    assert!((1..=5).contains(&wait), "{wait}");
    // The caller's own limit did not use up what the other one has.
    for _ in 0..8 {
        assert_eq!(ask(other.ports.outbound).await.0, 200);
    }
    assert_eq!(ask(other.ports.outbound).await.0, 429);
    let labels = [("action", "rate_limited")];
    let server = mesh.servers[0].ports.metrics;
    assert!(metrics::sum(server, "duet_policy_actions_total", &labels).await >= 1.0);
}

#[tokio::test]
async fn faults_are_for_requests_with_the_header_only() {
    let app = App::replying(|_| Reply::new(200, "")).await;
    let spec = "  fault:\n    headers: [{name: x-chaos, value: \"on\"}]\n    \
                delay: {duration: 300ms}\n    abort: {percent: 100, status: 418}";
    let apps = [app];
    let mesh = Mesh::start(&policy(spec), &apps).await;
    let plain = http::get(mesh.outbound(), "web", "/").await;
    assert_eq!(plain.status(), 200, "{:?}", plain.headers());
    let started = Instant::now();
    let request = http::request(&client(), Method::GET, mesh.outbound(), "web", "/");
    let response = request.header("x-chaos", "on").send().await.unwrap();
    assert_eq!(response.status(), 418);
    assert!(started.elapsed() >= Duration::from_millis(300));
    let status = response.headers()["proxy-status"].to_str().unwrap();
    assert!(status.contains("proxy_internal_response"), "{status}");
    assert!(mesh.actions("fault_abort").await >= 1.0);
}

#[tokio::test]
async fn a_post_reaches_an_application_that_dies_of_it_once() {
    let asked = Arc::new(AtomicUsize::new(0));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let counted = Arc::clone(&asked);
    let dying = tokio::spawn(async move {
        use tokio::io::AsyncReadExt as _;
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut read = Vec::new();
            // Reads all of the request, then dies without a word. Probes of the port bring nothing.
            while !read.ends_with(b"the whole body") {
                let mut more = [0; 4096];
                match stream.read(&mut more).await {
                    Ok(0) | Err(_) => break,
                    Ok(n) => read.extend_from_slice(&more[..n]),
                }
            }
            if read.ends_with(b"the whole body") {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    let control_plane = ControlPlane::start(&[("web.yaml", SERVICE)]).await;
    let _server = Sidecar::ready(&control_plane, Options::service("web", port)).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    let post = |key: Option<&str>| {
        let request = http::request(&client(), Method::POST, caller.ports.outbound, "web", "/");
        let request = request.body("the whole body");
        match key {
            Some(key) => request.header("idempotency-key", key),
            None => request,
        }
    };
    let response = post(None).send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    // With a key it is safe to repeat: 1 + 2 retries.
    post(Some("7")).send().await.unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 1 + 3);
    dying.abort();
}

#[tokio::test]
async fn a_retry_waits_as_long_as_the_server_says() {
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let app = App::replying(move |asked| match asked.path.as_str() {
        "/busy" if counted.fetch_add(1, Ordering::SeqCst) == 0 => {
            Reply::new(503, "").header("retry-after", "1")
        }
        _ => Reply::new(200, ""),
    })
    .await;
    let apps = [app];
    let mesh = Mesh::start(&policy("  retry: {codes: [503]}"), &apps).await;
    let started = Instant::now();
    assert_eq!(http::get(mesh.outbound(), "web", "/busy").await.status(), 200);
    assert!(started.elapsed() >= Duration::from_secs(1));
    // A wait past the caller's own deadline is not made.
    tries.store(0, Ordering::SeqCst);
    let request = http::request(&client(), Method::GET, mesh.outbound(), "web", "/busy");
    let response = request.header("duet-timeout-ms", "500").send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(tries.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn the_time_that_is_left_travels_and_a_caller_that_leaves_ends_the_work() {
    let app = App::replying(|asked| match asked.path.as_str() {
        "/slow" => Reply::new(200, "").after(Duration::from_secs(30)),
        _ => Reply::new(200, asked.header("duet-timeout-ms")),
    })
    .await;
    let apps = [app];
    let mesh = Mesh::start(&policy("  timeouts: {request: 5s}"), &apps).await;
    let left = |asked: Option<&'static str>| {
        let request = http::request(&client(), Method::GET, mesh.outbound(), "web", "/");
        let request = asked.into_iter().fold(request, |r, ms| r.header("duet-timeout-ms", ms));
        async move { request.send().await.unwrap().text().await.unwrap().parse::<u64>().unwrap() }
    };
    let of_policy = left(None).await;
    assert!((4_000..=5_000).contains(&of_policy), "{of_policy}");
    let of_caller = left(Some("2000")).await;
    assert!((1_000..=2_000).contains(&of_caller), "{of_caller}");
    let started = Instant::now();
    let request = http::request(&client(), Method::GET, mesh.outbound(), "web", "/slow");
    let response = request.header("duet-timeout-ms", "300").send().await.unwrap();
    assert_eq!(response.status(), 504);
    assert!(started.elapsed() < Duration::from_secs(4));
    let request = http::request(&client(), Method::GET, mesh.outbound(), "web", "/slow");
    request.timeout(Duration::from_millis(200)).send().await.unwrap_err();
    let server = mesh.servers[0].ports.metrics;
    let inbound = [("direction", "inbound"), ("service", "default/web")];
    eventually("nothing is in flight at the called side", SOON, || async {
        let active = metrics::sum(server, "duet_active_requests", &inbound[..1]).await;
        (active == 0.0).then_some(())
    })
    .await;
    let gone = metrics::sum(server, "duet_requests_total", &[("status", "499")]).await;
    assert!(gone >= 1.0, "{gone}");
}

#[tokio::test]
async fn a_mirror_gets_a_copy_with_the_body_and_nobody_waits_for_it() {
    let web = App::replying(|_| Reply::new(200, "web")).await;
    let shadow = App::replying(|_| Reply::new(500, "").after(Duration::from_millis(500))).await;
    let yaml = format!(
        "{SERVICE}\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: shadow}}, spec: {{ports: [{{port: 80}}]}}}}\n\
         ---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web}}\n\
         spec:\n  parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n  - backendRefs: [{{name: web, port: 80}}]\n    \
         filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: shadow, port: 80}}}}}}]\n"
    );
    let control_plane = ControlPlane::start(&[("web.yaml", &yaml)]).await;
    let _web = Sidecar::ready(&control_plane, Options::service("web", web.port())).await;
    let _shadow = Sidecar::ready(&control_plane, Options::service("shadow", shadow.port())).await;
    let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
    eventually("the mirror is in use", SOON, || async {
        http::get(caller.ports.outbound, "web", "/first").await;
        (!shadow.asked().is_empty()).then_some(())
    })
    .await;
    let post = http::request(&client(), Method::POST, caller.ports.outbound, "web", "/copy");
    let answer = post.body("the body").send().await.unwrap();
    assert_eq!(answer.text().await.unwrap(), "web");
    let copy = eventually("the copy arrives", SOON, || async {
        shadow.asked().into_iter().find(|asked| asked.path == "/copy")
    })
    .await;
    assert_eq!((copy.method, &copy.body[..]), (Method::POST, &b"the body"[..]));
    assert_eq!(web.asked().iter().filter(|asked| asked.path == "/copy").count(), 1);
}
