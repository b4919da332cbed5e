//! The case files, as they are read: what is asked, and what is expected. Fields that only explain are not read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

/// Everything below one folder of case files.
#[derive(Debug)]
pub(crate) struct Suite {
    /// In the order of their names.
    pub(crate) tests: Vec<Test>,
    /// Where the tests come from, if the index that lies beside the folder is of these very files.
    pub(crate) index: Option<Index>,
    /// Folder that the tests' `base` is relative to.
    pub(crate) root: PathBuf,
}

/// One file: a conformance test.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Test {
    #[serde(skip)]
    pub(crate) file: String,
    pub(crate) name: String,
    pub(crate) features: Vec<String>,
    pub(crate) base: String,
    pub(crate) setup: Vec<Value>,
    pub(crate) resources: Vec<Value>,
    pub(crate) synthesized_resources: Vec<Value>,
    pub(crate) route_conditions: Vec<Condition>,
    /// Read one by one, so that one that says something new fails alone.
    cases: Vec<Value>,
}

/// A status that the control plane must report of a route, `namespace/name`.
#[derive(Debug, Deserialize)]
pub(crate) struct Condition {
    pub(crate) route: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) status: String,
    pub(crate) reason: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    #[serde(default)]
    pub(crate) before: Vec<Value>,
    pub(crate) request: Request,
    #[serde(default)]
    pub(crate) backend_behavior: Behavior,
    pub(crate) applies_to_mesh: Option<bool>,
    pub(crate) expect: Expect,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    pub(crate) from_namespace: Option<String>,
    pub(crate) from_workload: Option<String>,
    pub(crate) to: To,
    pub(crate) protocol: Protocol,
    pub(crate) host: String,
    pub(crate) method: String,
    pub(crate) path: String,
    #[serde(default, rename = "path_is_free")]
    _path_is_free: IgnoredAny,
    #[serde(default)]
    pub(crate) headers: BTreeMap<String, String>,
    #[serde(default, rename = "grpc")]
    _grpc: IgnoredAny,
    pub(crate) websocket: Option<Value>,
}

/// What is dialled.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct To {
    pub(crate) service: Option<String>,
    pub(crate) pod_of: Option<String>,
    pub(crate) gateway: Option<String>,
    pub(crate) namespace: String,
    pub(crate) port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    Http1,
    H2c,
    Grpc,
    WebSocket,
    Https,
}

/// What the echo backends do when a request of the case arrives.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Behavior {
    pub(crate) set_response_headers: BTreeMap<String, String>,
    #[serde(deserialize_with = "duet_api::duration::option")]
    pub(crate) delay: Option<Duration>,
    pub(crate) retry_simulation: Option<RetrySimulation>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RetrySimulation {
    pub(crate) fail_first_attempts: usize,
    pub(crate) failure: SimulatedFailure,
    #[serde(default, deserialize_with = "duet_api::duration::option")]
    pub(crate) delay_before_failure: Option<Duration>,
    #[serde(rename = "attempt_counter_key")]
    _attempt_counter_key: IgnoredAny,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SimulatedFailure {
    pub(crate) status: Option<u16>,
    #[serde(default)]
    pub(crate) tcp_reset: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Expect {
    pub(crate) status: Vec<u16>,
    pub(crate) status_lenient: Vec<u16>,
    pub(crate) grpc_status: Option<u16>,
    #[serde(rename = "http_alternatives")]
    _http_alternatives: IgnoredAny,
    pub(crate) reaches_backend: Option<bool>,
    pub(crate) backend: Option<String>,
    pub(crate) namespace: Option<String>,
    pub(crate) method_seen: Option<String>,
    pub(crate) path_seen: Option<String>,
    pub(crate) host_seen: Option<String>,
    pub(crate) request_headers_seen: BTreeMap<String, String>,
    pub(crate) absent_request_headers: Vec<String>,
    pub(crate) response_headers: BTreeMap<String, String>,
    pub(crate) response_headers_any_of: BTreeMap<String, Vec<String>>,
    pub(crate) ignore_header_whitespace: bool,
    pub(crate) absent_response_headers: Vec<String>,
    pub(crate) redirect: Option<Redirect>,
    pub(crate) mirrored_to: Vec<Mirror>,
    pub(crate) mirror_distribution: Option<Distribution>,
    pub(crate) distribution: Option<Distribution>,
    pub(crate) repeat: Option<usize>,
    pub(crate) each_response: Option<EachResponse>,
    pub(crate) websocket_replies: Vec<Value>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Redirect {
    pub(crate) scheme: String,
    pub(crate) host: Option<String>,
    pub(crate) port_any_of: Vec<String>,
    pub(crate) path: String,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Mirror {
    pub(crate) backend: String,
    pub(crate) namespace: String,
    /// Of the requests, where not each of them is mirrored.
    pub(crate) percent: Option<f64>,
}

/// Shares of many requests by Deployment.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Distribution {
    pub(crate) requests: usize,
    pub(crate) tolerance_abs: f64,
    #[serde(default = "ten")]
    pub(crate) max_rounds: usize,
    #[serde(default)]
    pub(crate) weights: BTreeMap<String, f64>,
}

fn ten() -> usize {
    10
}

/// What holds for every response to a repeated request.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum EachResponse {
    Whoever(Box<Expect>),
    /// By the Deployment that answered.
    ByBackend(BTreeMap<String, Expect>),
}

/// The index of all files, by which none can be missed.
#[derive(Debug, Deserialize)]
pub(crate) struct Index {
    pub(crate) source: String,
    pub(crate) commit: String,
    pub(crate) commit_date: String,
    pub(crate) nearest_release: String,
    totals: Totals,
    tests: Vec<Listed>,
}

#[derive(Debug, Deserialize)]
struct Totals {
    tests: usize,
    cases: usize,
}

#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
    file: String,
    cases: usize,
    mesh_cases: usize,
}

impl Suite {
    /// Reads a folder. Panics where a file cannot be read, or is another than its index says.
    pub(crate) fn read(folder: &Path) -> Self {
        let root = folder.parent().unwrap().to_owned();
        let mut tests: Vec<Test> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .map(|path| {
                let file = path.strip_prefix(&root).unwrap().display().to_string();
                Test { file, ..json(&path) }
            })
            .collect();
        tests.sort_by(|a, b| a.name.cmp(&b.name));
        let index = root.join("index.json");
        let index: Option<Index> = index.exists().then(|| json(&index));
        let index = index.filter(|index| index.lists(&tests));
        if let Some(index) = &index {
            index.verify(&tests);
        }
        Self { tests, index, root }
    }
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Index {
    /// Whether it is the index of these files, and not of others that lie beside them.
    fn lists(&self, tests: &[Test]) -> bool {
        let listed: std::collections::BTreeSet<&str> =
            self.tests.iter().map(|listed| listed.file.as_str()).collect();
        listed == tests.iter().map(|test| test.file.as_str()).collect()
    }

    fn verify(&self, tests: &[Test]) {
        for test in tests {
            let listed = self.tests.iter().find(|listed| listed.file == test.file).unwrap();
            let scored = test.cases().iter().filter(|(_, case)| !is_left_out(case)).count();
            assert_eq!(
                (test.name.as_str(), test.cases.len(), scored),
                (listed.name.as_str(), listed.cases, listed.mesh_cases),
                "{}: name, cases and cases for a mesh are those of the index",
                test.file
            );
        }
        let cases: usize = tests.iter().map(|test| test.cases.len()).sum();
        assert_eq!((tests.len(), cases), (self.totals.tests, self.totals.cases), "the totals");
    }
}

fn is_left_out(case: &Result<Case, String>) -> bool {
    case.as_ref().is_ok_and(|case| !case.is_scored())
}

impl Test {
    /// Its cases by name, or why one cannot be read.
    pub(crate) fn cases(&self) -> Vec<(String, Result<Case, String>)> {
        let read = |value: &Value| {
            let name = value["name"].as_str().unwrap_or("a case without a name").to_owned();
            let case = Case::deserialize(value);
            (name, case.map_err(|error| format!("cannot be read: {error}")))
        };
        self.cases.iter().map(read).collect()
    }
}

impl Case {
    /// Whether a mesh has to pass it: what is about a gateway's listeners is not for it.
    pub(crate) fn is_scored(&self) -> bool {
        self.applies_to_mesh != Some(false) && self.request.to.gateway.is_none()
    }
}

impl Request {
    /// What to send over a WebSocket: as the case says, else what is to come back from a backend that echoes.
    pub(crate) fn messages(&self, expect: &Expect) -> Vec<String> {
        let given = self.websocket.as_ref();
        let given = given.and_then(|given| given.get("messages").or_else(|| given.get("send")));
        given
            .and_then(Value::as_array)
            .unwrap_or(&expect.websocket_replies)
            .iter()
            .map(text)
            .collect()
    }
}

impl Expect {
    pub(crate) fn replies(&self) -> Vec<String> {
        self.websocket_replies.iter().map(text).collect()
    }
}

fn text(message: &Value) -> String {
    message.as_str().map_or_else(|| message.to_string(), str::to_owned)
}
