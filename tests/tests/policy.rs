//! Traffic policies, through two real sidecars: outliers, slow endpoints, overload, limits, faults, hedges, sessions.

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
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use duet_tests::app::{App, Reply};
use duet_tests::http::{self, client};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, metrics};
use reqwest::Method;
use tokio::sync::Semaphore;

const SERVICE: &str =
    "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 80}]}}";

fn policy(spec: &str) -> String {
    format!(
        "{SERVICE}\n---\napiVersion: duet.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: web}}\n\
         spec:\n  targetRefs: [{{kind: Service, name: web}}]\n{spec}\n"
    )
}

/// A mesh with one service `web` of these applications, and a caller.
struct Mesh {
    control_plane: ControlPlane,
    servers: Vec<Sidecar>,
    caller: Sidecar,
}

impl Mesh {
    async fn start(yaml: &str, apps: &[App]) -> Self {
        let control_plane = ControlPlane::start(&[("web.yaml", yaml)]).await;
        let mut servers = Vec::new();
        for (number, app) in apps.iter().enumerate() {
            let options = Options::service("web", app.port()).instance(&format!("web-{number}"));
            servers.push(Sidecar::start(&control_plane, options).await);
        }
        for server in &servers {
            server.wait_ready().await;
        }
        let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
        let mesh = Self { control_plane, servers, caller };
        eventually("every endpoint is known", SOON, || async {
            http::get(mesh.outbound(), "web", "/warm-up").await;
            let known = metrics::sum(mesh.caller.ports.metrics, "duet_endpoints", &[]).await;
            (known >= apps.len() as f64).then_some(())
        })
        .await;
        mesh
    }

    fn outbound(&self) -> SocketAddr {
        self.caller.ports.outbound
    }

    async fn actions(&self, action: &str) -> f64 {
        let labels = [("action", action)];
        metrics::sum(self.caller.ports.metrics, "duet_policy_actions_total", &labels).await
    }
}

/// What came of a steady load: for each request when it was sent (since the start), the status, and how long it took.
async fn load(
    address: SocketAddr,
    per_second: u64,
    time: Duration,
) -> Vec<(Duration, u16, Duration)> {
    let client = client();
    let (started, mut calls) = (Instant::now(), Vec::new());
    let mut turn = tokio::time::interval(Duration::from_micros(1_000_000 / per_second));
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    while started.elapsed() < time {
        turn.tick().await;
        let request = http::request(&client, Method::GET, address, "web", "/");
        calls.push(tokio::spawn(async move {
            let sent = Instant::now();
            let response = request.send().await.unwrap();
            let status = response.status().as_u16();
            response.bytes().await.ok();
            (sent - started, status, sent.elapsed())
        }));
    }
    let mut outcomes = Vec::new();
    for call in calls {
        outcomes.push(call.await.unwrap());
    }
    outcomes
}

fn percentile(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_that_fail_get_probes_only() {
    let broken = Arc::new(AtomicBool::new(false));
    let mut apps = Vec::new();
    for number in 0..5 {
        let broken = Arc::clone(&broken);
        let bad = move || number < 2 && broken.load(Ordering::SeqCst);
        apps.push(App::replying(move |_| Reply::new(if bad() { 500 } else { 200 }, "")).await);
    }
    let mesh = Mesh::start(SERVICE, &apps).await;
    broken.store(true, Ordering::SeqCst);
    let outcomes = load(mesh.outbound(), 300, Duration::from_secs(6)).await;
    let later = outcomes.iter().filter(|(sent, ..)| *sent > Duration::from_secs(1));
    let failed = later.clone().filter(|(_, status, _)| *status != 200).count();
    let all = later.count();
    assert!(failed * 1000 < all, "{failed} of {all} failed after the first second");
    assert!((2.0..=12.0).contains(&mesh.actions("ejected").await));
    // 7 failures each, or fewer by success rate, then probes after 1, 2 and 4 s.
    for app in &apps[..2] {
        let asked = app.asked().iter().filter(|asked| asked.path == "/").count();
        assert!(asked < 60, "{asked} requests to an endpoint that fails");
    }
    broken.store(false, Ordering::SeqCst);
    eventually("the endpoints come back", SOON, || async {
        http::get(mesh.outbound(), "web", "/").await;
        (mesh.actions("recovered").await >= 2.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_endpoint_does_not_slow_the_rest_down() {
    let slow = Arc::new(AtomicBool::new(false));
    let mut apps = Vec::new();
    for number in 0..5 {
        let slow = Arc::clone(&slow);
        let delay = move || match number == 0 && slow.load(Ordering::SeqCst) {
            true => Duration::from_millis(200),
            false => Duration::from_millis(20),
        };
        apps.push(App::replying(move |_| Reply::new(200, "").after(delay())).await);
    }
    let mesh = Mesh::start(SERVICE, &apps).await;
    let times = |outcomes: Vec<(Duration, u16, Duration)>| {
        let settled = outcomes.into_iter().filter(|(sent, ..)| *sent > Duration::from_secs(1));
        settled.map(|(_, _, took)| took).collect::<Vec<_>>()
    };
    let healthy = percentile(times(load(mesh.outbound(), 200, Duration::from_secs(4)).await), 99);
    slow.store(true, Ordering::SeqCst);
    let with_slow = percentile(times(load(mesh.outbound(), 200, Duration::from_secs(4)).await), 99);
    assert!(
        with_slow.as_secs_f64() < healthy.as_secs_f64() * 1.5,
        "{with_slow:?}, {healthy:?} healthy"
    );
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
    let mesh =
        Mesh::start(&policy("  concurrency: {adaptive: true}\n  retry: {attempts: 0}"), &apps)
            .await;
    let outcomes = load(mesh.outbound(), 400, Duration::from_secs(12)).await;
    let settled: Vec<_> =
        outcomes.into_iter().filter(|(sent, ..)| *sent > Duration::from_secs(4)).collect();
    let good: Vec<Duration> =
        settled.iter().filter(|(_, status, _)| *status == 200).map(|(.., took)| *took).collect();
    // What the application can do in the same time, by a timer that is at most 1 ms late.
    let capacity = 4.0 * 8.0 / 0.0215;
    let share = good.len() as f64 / capacity;
    assert!(share > 0.9, "goodput is {share} of the capacity");
    let p99 = percentile(good, 99);
    assert!(p99 < turn * 8, "p99 is {p99:?}");
    let shed = settled.iter().filter(|(_, status, _)| *status == 503).count();
    assert!(shed > settled.len() / 4, "{shed} of {} were shed", settled.len());
    let labels = [("action", "shed")];
    let counted = metrics::sum(mesh.servers[0].ports.metrics, "duet_policy_actions_total", &labels);
    assert!(counted.await >= shed as f64);
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
async fn a_slow_first_try_is_hedged_and_the_first_answer_counts() {
    let first = Arc::new(AtomicUsize::new(0));
    let mut apps = Vec::new();
    for _ in 0..2 {
        let first = Arc::clone(&first);
        apps.push(
            App::replying(move |asked| {
                let slow = asked.path == "/slow" && first.fetch_add(1, Ordering::SeqCst) == 0;
                Reply::new(200, "").after(Duration::from_secs(if slow { 20 } else { 0 }))
            })
            .await,
        );
    }
    let spec = "  hedge: {after: 100ms, maxPercent: 100}";
    let mesh = Mesh::start(&policy(spec), &apps).await;
    let started = Instant::now();
    assert_eq!(http::get(mesh.outbound(), "web", "/slow").await.status(), 200);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!(first.load(Ordering::SeqCst), 2);
    assert!(mesh.actions("hedge_won").await >= 1.0);
    // A POST is not sent twice.
    first.store(0, Ordering::SeqCst);
    let post = http::request(&client(), Method::POST, mesh.outbound(), "web", "/slow");
    let timed_out = post.timeout(Duration::from_secs(1)).send().await.unwrap_err();
    assert!(timed_out.is_timeout());
    assert_eq!(first.load(Ordering::SeqCst), 1);
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

/// Names of the applications that answered.
async fn answers(mesh: &Mesh, headers: &[(&str, &str)], times: usize) -> Vec<String> {
    let mut names = Vec::new();
    for _ in 0..times {
        let request = http::request(&client(), Method::GET, mesh.outbound(), "web", "/");
        let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
        names.push(request.send().await.unwrap().text().await.unwrap());
    }
    names
}

async fn named_apps(count: usize) -> Vec<App> {
    let mut apps = Vec::new();
    for number in 0..count {
        apps.push(App::replying(move |_| Reply::new(200, &number.to_string())).await);
    }
    apps
}

#[tokio::test]
async fn balancers_do_as_they_are_called() {
    let apps = named_apps(4).await;
    let spec = "  loadBalancer: {type: Maglev, hashOn: {header: x-user}}";
    let mesh = Mesh::start(&policy(spec), &apps).await;
    let mut used = std::collections::BTreeSet::new();
    for user in 0..20 {
        let user = user.to_string();
        let names = answers(&mesh, &[("x-user", &user)], 4).await;
        assert!(names.windows(2).all(|pair| pair[0] == pair[1]), "{names:?}");
        used.extend(names);
    }
    assert!(used.len() >= 3, "{used:?}");
    mesh.control_plane.write("web.yaml", &policy("  loadBalancer: {type: RoundRobin}"));
    eventually("round robin is in use", SOON, || async {
        let names = answers(&mesh, &[("x-user", "1")], 8).await;
        (0..4)
            .all(|n| names.iter().filter(|name| **name == n.to_string()).count() == 2)
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn sessions_stay_at_their_endpoint_by_cookie_and_by_header() {
    let apps = named_apps(4).await;
    let route = |session: &str| {
        format!(
            "{SERVICE}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web}}\n\
             spec:\n  parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n  - backendRefs: \
             [{{name: web, port: 80}}]\n    sessionPersistence: {session}\n"
        )
    };
    let mesh = Mesh::start(&route("{sessionName: s}"), &apps).await;
    let first = eventually("a cookie is given", SOON, || async {
        let response = http::get(mesh.outbound(), "web", "/").await;
        let cookie = response.headers().get("set-cookie")?.to_str().ok()?.to_owned();
        Some((cookie, response.text().await.unwrap()))
    })
    .await;
    let cookie = first.0.split(';').next().unwrap();
    assert!(answers(&mesh, &[("cookie", cookie)], 20).await.iter().all(|name| *name == first.1));
    mesh.control_plane.write("web.yaml", &route("{type: Header, sessionName: x-session}"));
    let first = eventually("a header is given", SOON, || async {
        let response = http::get(mesh.outbound(), "web", "/").await;
        let session = response.headers().get("x-session")?.to_str().ok()?.to_owned();
        Some((session, response.text().await.unwrap()))
    })
    .await;
    let again = answers(&mesh, &[("x-session", &first.0)], 20).await;
    assert!(again.iter().all(|name| *name == first.1));
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
