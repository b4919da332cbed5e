//! The operator's hands: `duet events` of one control plane, and what the tests wait for.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use duet_tests::app::{App, Reply};
use duet_tests::mesh::ControlPlane;
use duet_tests::process::program;
use duet_tests::{SOON, eventually};
use serde_json::{Value, json};

/// Services `reader`, with a replica, and `absent`, without one.
pub(crate) const SERVICES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: reader}
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: absent}
spec: {ports: [{port: 80, targetPort: http}]}
";

pub(crate) fn subscription(name: &str, service: &str, more: &str) -> String {
    format!(
        "\
---
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {{name: {name}}}
spec:
  topic: news
  subscriber: {{service: {service}, path: /{name}}}
{more}
"
    )
}

/// Two attempts, shortly after each other.
pub(crate) const TWICE: &str = "  retry: {maxAttempts: 2, backoff: 20ms, maxBackoff: 50ms}\n";

/// `duet events` of one control plane.
pub(crate) struct Operator(pub(crate) String);

impl Operator {
    pub(crate) fn of(control_plane: &ControlPlane) -> Self {
        Self(format!("http://{}", control_plane.operator))
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("duet"));
        command.args(["events", "--operator", &self.0]).args(arguments);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // Commands that do not read it may be gone already.
        child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
        child.wait_with_output().unwrap()
    }

    /// What a command says to people.
    pub(crate) fn text(&self, arguments: &[&str]) -> String {
        self.text_of(arguments, "")
    }

    pub(crate) fn text_of(&self, arguments: &[&str], input: &str) -> String {
        let output = self.run(arguments, input);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && error.is_empty(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says to tools.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.text(&[arguments, &["--output", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The same, a value on each line.
    pub(crate) fn json_lines(&self, arguments: &[&str]) -> Vec<Value> {
        let text = self.text(&[arguments, &["--output", "json"]].concat());
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Why a command fails: with an exit code, and nothing where answers are looked for.
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments, "");
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Publishes an event that is its number.
    pub(crate) fn publish(&self, id: &str, number: u32) {
        let data = json!({ "n": number }).to_string();
        self.text(&["publish", "news", &data, "--id", id, "--type", "story"]);
    }

    pub(crate) fn status(&self, subscription: &str) -> Value {
        let all = self.json(&["subscriptions"])["subscriptions"].clone();
        let mut all = all.as_array().unwrap().iter();
        all.find(|status| status["name"] == subscription).cloned().unwrap_or_default()
    }

    /// Waits for a subscription to be so.
    pub(crate) async fn becomes(&self, subscription: &str, field: &str, value: Value) -> Value {
        eventually(&format!("{subscription} has {field} {value}"), SOON, || async {
            Some(self.status(subscription)).filter(|status| status[field] == value)
        })
        .await
    }
}

/// The cells of a printed table, without its head.
pub(crate) fn cells(table: &str) -> Vec<Vec<&str>> {
    table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect()
}

pub(crate) fn ids(app: &App, path: &str) -> Vec<String> {
    let asked = app.asked().into_iter().filter(|asked| asked.path == path);
    asked.map(|asked| asked.json()["id"].as_str().unwrap().to_owned()).collect()
}

pub(crate) async fn arrives(app: &App, path: &str, id: &str) {
    eventually(&format!("{id} arrives at {path}"), SOON, || async {
        ids(app, path).iter().any(|seen| seen == id).then_some(())
    })
    .await;
}

pub(crate) async fn arrive(app: &App, path: &str, count: usize) {
    eventually(&format!("{count} deliveries to {path}"), SOON, || async {
        (ids(app, path).len() >= count).then_some(())
    })
    .await;
}

/// An application that handles everything.
pub(crate) async fn willing() -> App {
    App::replying(|asked| Reply::new(if asked.path == "/dapr/subscribe" { 404 } else { 200 }, ""))
        .await
}
