//! Which endpoint a call goes to, through two real sidecars: outliers, slow endpoints, hedges, balancers, sessions, zones.

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

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use duet_tests::app::{App, Reply};
use duet_tests::http::{self, client};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::web::{Mesh, SERVICE, answers, load, named_apps, percentile, policy};
use duet_tests::{SOON, eventually, metrics};
use reqwest::Method;

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
    let measure = async |is_slow| {
        slow.store(is_slow, Ordering::SeqCst);
        percentile(times(load(mesh.outbound(), 200, Duration::from_secs(4)).await), 99)
    };
    // What else this machine does slows down either of them.
    let mut tries = Vec::new();
    for _ in 0..3 {
        let (healthy, with_slow) = (measure(false).await, measure(true).await);
        if with_slow.as_secs_f64() < healthy.as_secs_f64() * 1.5 {
            return;
        }
        tries.push((healthy, with_slow));
    }
    panic!("p99 without and with a slow endpoint: {tries:?}");
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
async fn the_own_zone_comes_first_and_others_take_over() {
    let apps = named_apps(3).await;
    let yaml = policy("  loadBalancer: {zone: Prefer}");
    let control_plane = ControlPlane::start(&[("web.yaml", &yaml)]).await;
    let mut servers = Vec::new();
    for (number, app) in apps.iter().enumerate() {
        let zone = if number == 0 { "near" } else { "far" };
        let options = Options::service("web", app.port()).instance(&format!("web-{number}"));
        servers.push(Sidecar::ready(&control_plane, options.flags(&["--zone", zone])).await);
    }
    let caller = Options::client("caller").flags(&["--zone", "near"]);
    let caller = Sidecar::ready(&control_plane, caller).await;
    let mut mesh = Mesh { control_plane, servers, caller };
    eventually("every endpoint is known", SOON, || async {
        http::get(mesh.outbound(), "web", "/warm-up").await;
        let known = metrics::sum(mesh.caller.ports.metrics, "duet_endpoints", &[]).await;
        (known >= 3.0).then_some(())
    })
    .await;
    let near = answers(&mesh, &[], 30).await;
    assert!(near.iter().all(|name| name == "0"), "{near:?}");
    mesh.servers[0].process.kill();
    eventually("the other zone takes over", SOON, || async {
        let response = http::get(mesh.outbound(), "web", "/").await;
        (response.status() == 200 && response.text().await.unwrap() != "0").then_some(())
    })
    .await;
}
