//! A mesh with one service, `web`, of several replicas, and a caller.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use reqwest::Method;

use crate::app::{App, Reply};
use crate::http::{self, client};
use crate::mesh::{ControlPlane, Options, Sidecar};
use crate::{SOON, eventually, metrics};

/// The service `web`, without any policy.
pub const SERVICE: &str =
    "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 80}]}}";

/// The same with a policy; `spec` is indented by two.
#[must_use]
pub fn policy(spec: &str) -> String {
    format!(
        "{SERVICE}\n---\napiVersion: duet.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: web}}\n\
         spec:\n  targetRefs: [{{kind: Service, name: web}}]\n{spec}\n"
    )
}

/// A mesh with one service `web` of these applications, and a caller.
#[derive(Debug)]
pub struct Mesh {
    /// Of the mesh.
    pub control_plane: ControlPlane,
    /// In front of the applications.
    pub servers: Vec<Sidecar>,
    /// Of a workload that only calls.
    pub caller: Sidecar,
}

impl Mesh {
    /// Starts all of it, and waits until the caller knows every endpoint.
    pub async fn start(yaml: &str, apps: &[App]) -> Self {
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

    /// Where the caller's application sends its calls.
    #[must_use]
    pub fn outbound(&self) -> SocketAddr {
        self.caller.ports.outbound
    }

    /// How often the caller's policies did something.
    pub async fn actions(&self, action: &str) -> f64 {
        let labels = [("action", action)];
        metrics::sum(self.caller.ports.metrics, "duet_policy_actions_total", &labels).await
    }
}

/// What came of a steady load: for each request when it was sent (since the start), the status, and how long it took.
pub async fn load(
    address: SocketAddr,
    per_second: u64,
    time: Duration,
) -> Vec<(Duration, u16, Duration)> {
    // One load at a time: several would measure each other.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _alone = ALONE.lock().await;
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

/// Of some times.
#[must_use]
pub fn percentile(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

/// Names of the applications that answered.
pub async fn answers(mesh: &Mesh, headers: &[(&str, &str)], times: usize) -> Vec<String> {
    let mut names = Vec::new();
    for _ in 0..times {
        let request = http::request(&client(), Method::GET, mesh.outbound(), "web", "/");
        let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
        names.push(request.send().await.unwrap().text().await.unwrap());
    }
    names
}

/// Applications that answer with their number.
pub async fn named_apps(count: usize) -> Vec<App> {
    let mut apps = Vec::new();
    for number in 0..count {
        apps.push(App::replying(move |_| Reply::new(200, &number.to_string())).await);
    }
    apps
}
