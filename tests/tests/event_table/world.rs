//! The mesh that all cases share: a control plane, two replicas of a reader in front of one application, a writer, and
//! a stranger in another namespace.

use std::collections::HashMap;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use duet_tests::app::{App, Asked, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::Backend;
use duet_tests::{SOON, eventually, http};
use serde_json::{Value, json};

use super::case::{Case, Names};

/// Answers of the application for one path, in turn; the last goes on.
pub(crate) type Script = Vec<(u16, &'static str)>;

type Scripts = Arc<Mutex<HashMap<String, (usize, Script)>>>;
type Deliveries = Arc<Mutex<HashMap<String, Vec<Asked>>>>;

pub(crate) struct World {
    pub(crate) control_plane: ControlPlane,
    pub(crate) readers: Vec<Sidecar>,
    pub(crate) writer: Sidecar,
    pub(crate) stranger: Sidecar,
    scripts: Scripts,
    deliveries: Deliveries,
    held: Arc<Mutex<HashMap<String, Duration>>>,
    counter: AtomicU64,
    client: reqwest::Client,
    _app: App,
    _backend: Backend,
}

const READER: &str = "\
apiVersion: v1
kind: Service
metadata: {name: reader}
spec: {ports: [{port: 80, targetPort: http}]}
";

/// An answer to a publish.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl World {
    pub(crate) async fn start(backend: Backend, table: &[Case]) -> Self {
        let mut files = vec![("reader.yaml".to_owned(), format!("{READER}{}", backend.yaml()))];
        files.extend(table.iter().map(Case::yaml).enumerate().filter_map(|(number, yaml)| {
            (!yaml.is_empty()).then(|| (format!("case-{number:03}.yaml"), yaml))
        }));
        let files: Vec<(&str, &str)> =
            files.iter().map(|(name, yaml)| (name.as_str(), yaml.as_str())).collect();
        let control_plane = ControlPlane::start(&files).await;
        let (scripts, deliveries) = (Scripts::default(), Deliveries::default());
        let held: Arc<Mutex<HashMap<String, Duration>>> = Arc::default();
        let app = App::replying({
            let (scripts, deliveries) = (Arc::clone(&scripts), Arc::clone(&deliveries));
            let held = Arc::clone(&held);
            move |asked| {
                if asked.path == "/dapr/subscribe" {
                    return Reply::new(404, "");
                }
                deliveries
                    .lock()
                    .unwrap()
                    .entry(asked.path.clone())
                    .or_default()
                    .push(asked.clone());
                let mut scripts = scripts.lock().unwrap();
                let (status, body) =
                    scripts.get_mut(&asked.path).map_or((200, ""), |(at, script)| {
                        let answer = script[(*at).min(script.len() - 1)];
                        *at += 1;
                        answer
                    });
                let delay = held.lock().unwrap().get(&asked.path).copied().unwrap_or_default();
                Reply::new(status, body).after(delay)
            }
        })
        .await;
        let mut readers = Vec::new();
        for instance in ["reader-1", "reader-2"] {
            let options = Options::service("reader", app.port()).instance(instance);
            readers.push(Sidecar::ready(&control_plane, options).await);
        }
        let writer = Sidecar::ready(&control_plane, Options::client("writer")).await;
        let stranger =
            Sidecar::ready(&control_plane, Options::client("stranger").namespace("other")).await;
        Self {
            control_plane,
            readers,
            writer,
            stranger,
            scripts,
            deliveries,
            held,
            counter: AtomicU64::new(0),
            client: http::client(),
            _app: app,
            _backend: backend,
        }
    }

    /// What the application answers on the case's path.
    pub(crate) fn script(&self, path: &str, script: &[(u16, &'static str)]) {
        self.scripts.lock().unwrap().insert(path.to_owned(), (0, script.to_vec()));
    }

    /// How long it takes for each answer.
    pub(crate) fn hold(&self, path: &str, delay: Duration) {
        self.held.lock().unwrap().insert(path.to_owned(), delay);
    }

    /// An id that nobody else has.
    pub(crate) fn id(&self) -> String {
        format!("e{}", self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// Publishes anything.
    pub(crate) async fn post(
        &self,
        path_and_query: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> Answer {
        self.post_by(&self.writer, path_and_query, headers, body).await
    }

    /// The same by another sidecar.
    pub(crate) async fn post_by(
        &self,
        sidecar: &Sidecar,
        path_and_query: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> Answer {
        let mut request =
            self.client.post(format!("http://{}{path_and_query}", sidecar.ports.api)).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::Null) }
    }

    /// Publishes a structured event with these attributes, which may replace the required ones; it must be taken.
    pub(crate) async fn publish(&self, names: &Names, attributes: Value) {
        self.publish_with(names, "", attributes).await;
    }

    /// The same with a query such as `?metadata.ttlInSeconds=1`.
    pub(crate) async fn publish_with(&self, names: &Names, query: &str, attributes: Value) {
        let mut event =
            json!({"specversion": "1.0", "id": self.id(), "source": "/table", "type": "t"});
        for (name, value) in attributes.as_object().unwrap() {
            event[name] = value.clone();
        }
        let path = format!("/v1.0/publish/default/{}{query}", names.topic);
        let headers = [("content-type", "application/cloudevents+json")];
        let answer = self.post(&path, &headers, event.to_string()).await;
        assert_eq!(answer.status, 204, "{event}: {answer:?}");
    }

    /// Everything that was posted to a path so far.
    pub(crate) fn delivered(&self, path: &str) -> Vec<Asked> {
        self.deliveries.lock().unwrap().get(path).cloned().unwrap_or_default()
    }

    /// Ids of the events that were posted to a path, in order.
    pub(crate) fn ids(&self, path: &str) -> Vec<String> {
        let delivered = self.delivered(path);
        delivered.iter().map(|asked| text(&asked.json()["id"])).collect()
    }

    /// Waits for so many deliveries.
    pub(crate) async fn wait(&self, path: &str, count: usize) -> Vec<Asked> {
        eventually(&format!("{count} deliveries to {path}"), SOON, || async {
            let delivered = self.delivered(path);
            (delivered.len() >= count).then_some(delivered)
        })
        .await
    }

    /// Waits until an event of this id was delivered.
    pub(crate) async fn wait_for(&self, path: &str, id: &str) {
        eventually(&format!("{id} is delivered to {path}"), SOON, || async {
            self.ids(path).iter().any(|seen| seen == id).then_some(())
        })
        .await;
    }

    /// Publishes one event more, and waits for it: what comes before it in the topic has had its turn.
    pub(crate) async fn sentinel(&self, names: &Names, attributes: Value) {
        let id = self.id();
        let mut event = attributes;
        event["id"] = json!(id);
        self.publish(names, event).await;
        self.wait_for(&names.path, &id).await;
    }
}

/// A JSON string's text.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// What an operator's commands say, by `duet events … --output json`.
impl World {
    /// Runs `duet events`, which must succeed, and reads its answer.
    pub(crate) fn events(&self, arguments: &[&str]) -> Value {
        let operator = format!("http://{}", self.control_plane.operator);
        let output = Command::new(duet_tests::process::program("duet"))
            .args(["events", "--operator", &operator, "--output", "json"])
            .args(arguments)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "duet events {arguments:?}: {error}");
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        // `{"topics": […]}` and so on: what is listed.
        let list = answer.as_object().and_then(|members| members.values().find(|v| v.is_array()));
        list.cloned().unwrap_or(answer)
    }

    /// A subscription as `duet events subscriptions` has it; null where there is none.
    pub(crate) fn status(&self, subscription: &str) -> Value {
        let all = self.events(&["subscriptions"]);
        let mut all = all.as_array().unwrap().iter();
        all.find(|status| status["name"] == subscription).cloned().unwrap_or_default()
    }

    /// Waits until a subscription that was written after the start exists.
    pub(crate) async fn declared(&self, name: &str) {
        let name = format!("default/{name}");
        eventually(&format!("{name} is declared"), SOON, || async {
            (!self.status(&name).is_null()).then_some(())
        })
        .await;
    }
}
