//! What a test runs in: a control plane with the test's objects, pods with a sidecar each, and clients' sidecars.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::process::program;
use serde_json::Value;

use super::case::{Case, Request, Suite, Test};
use super::check::Outcome;
use super::client::{Ask, send};
use super::echo::{Log, Pod, Replica};
use super::objects::{Key, Objects, Workload, key};

/// Something that `duet check` says.
#[derive(Debug)]
pub(crate) struct Finding {
    /// Name of the object's file; see [`file_name`].
    pub(crate) file: String,
    pub(crate) text: String,
}

impl Finding {
    /// Whether it is of this route, `namespace/name`, of whatever kind.
    pub(crate) fn is_of_route(&self, route: &str) -> bool {
        self.file.ends_with(&format!("Route.{}.yaml", route.replace('/', ".")))
    }
}

/// Namespace and workload.
type ClientKey = (String, String);

#[derive(Debug)]
pub(crate) struct Cluster {
    control_plane: ControlPlane,
    pub(crate) log: Arc<Log>,
    pods: Vec<Pod>,
    /// In front of the pods.
    _sidecars: Vec<Sidecar>,
    clients: BTreeMap<ClientKey, Sidecar>,
}

impl Cluster {
    /// Starts everything that a test needs and waits until each part is ready.
    pub(crate) async fn start(suite: &Suite, test: &Test) -> Result<Self, String> {
        let mut objects = Objects::of(suite, test);
        for step in &test.setup {
            let object = resource(step).ok_or_else(|| format!("unknown set-up step: {step}"))?;
            objects.all.insert(key(object), object.clone());
        }
        let files: Vec<(String, String)> = objects
            .all
            .iter()
            .map(|(key, object)| (file_name(key), serde_yaml::to_string(object).unwrap()))
            .collect();
        let files: Vec<(&str, &str)> =
            files.iter().map(|(name, yaml)| (name.as_str(), yaml.as_str())).collect();
        let control_plane = ControlPlane::start(&files).await;
        let log = Arc::new(Log::default());
        let (mut pods, mut starting) = (Vec::new(), Vec::new());
        for workload in objects.workloads(test) {
            let token = token(&control_plane, &workload);
            for number in 0..workload.deployment.replicas {
                let pod = pod(&workload, number, &log).await;
                starting.extend(options(&workload, &pod, &token));
                pods.push(pod);
            }
        }
        let start = |options| Sidecar::ready(&control_plane, options);
        let sidecars = futures::future::join_all(starting.into_iter().map(start)).await;
        let clients = clients(test).map(|(namespace, workload)| {
            let options = Options::client(&workload)
                .namespace(&namespace)
                .instance(&format!("{namespace}-{workload}-client"));
            let control_plane = &control_plane;
            async move { ((namespace, workload), Sidecar::ready(control_plane, options).await) }
        });
        let clients = futures::future::join_all(clients).await.into_iter().collect();
        Ok(Self { control_plane, log, pods, _sidecars: sidecars, clients })
    }

    /// A case's request, made anew.
    pub(crate) fn ask(&self, case: &Case) -> Result<Ask, String> {
        let request = &case.request;
        let mut ask = Ask {
            at: (Ipv4Addr::UNSPECIFIED, 0).into(),
            destination: None,
            id: uuid::Uuid::new_v4().to_string(),
            protocol: request.protocol,
            host: request.host.clone(),
            method: request.method.clone(),
            path: String::new(),
            headers: request.headers.clone().into_iter().collect(),
            messages: request.messages(&case.expect),
        };
        ask.path = ask.told_apart(&request.path, &case.expect);
        let to = &request.to;
        if let Some(service) = &to.service {
            ask.at = self.clients[&client(request)].ports.outbound;
            ask.destination = Some(format!("{service}.{}:{}", to.namespace, to.port));
            return Ok(ask);
        }
        // A pod's own address has no route: it is dialled as it is.
        let deployment = to.pod_of.as_ref().ok_or("nothing that a mesh dials")?;
        let is_meant = |pod: &&Pod| {
            pod.replica.deployment == *deployment && pod.replica.namespace == to.namespace
        };
        let pod = self.pods.iter().find(is_meant).ok_or_else(|| format!("no pod {deployment}"))?;
        ask.at = (pod.ip, to.port).into();
        ask.host = ask.host.replace("<pod-ip>", &pod.ip.to_string());
        Ok(ask)
    }

    /// Makes a request, and checks all that its answer must be.
    pub(crate) async fn exchange(&self, case: &Case, ask: &Ask) -> Result<Outcome, String> {
        self.log.open(&ask.id, &case.backend_behavior);
        let reply = send(ask).await?;
        let outcome = Outcome { reply, arrivals: self.log.arrivals(&ask.id) };
        outcome.check(&case.expect, ask)?;
        Ok(outcome)
    }

    /// Removes objects, as `before` of a case says. The control plane sees it by itself.
    pub(crate) fn before(&self, step: &Value) -> Result<(), String> {
        let config = self.config();
        let given = &step["delete"];
        let named = |part: &str| given[part].as_str().unwrap_or_default().to_owned();
        let key = match given.as_str() {
            Some(text) => parse_key(text),
            None if given.get("metadata").is_some() => Some(key(given)),
            None => Some((named("kind"), named("namespace"), named("name"))),
        };
        let key = key.ok_or_else(|| format!("unknown step: {step}"))?;
        std::fs::remove_file(config.join(file_name(&key)))
            .map_err(|error| format!("{key:?} cannot be deleted: {error}"))
    }

    fn config(&self) -> PathBuf {
        self.control_plane.folder.path().join("config")
    }

    /// What `duet check` finds in the objects of the test, by file.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let output = Command::new(program("duet"))
            .args(["check", "-o", "json"])
            .arg(self.config())
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let findings = report["findings"].as_array().unwrap();
        let finding = |finding: &Value| {
            let text = |name: &str| finding[name].as_str().unwrap_or_default();
            let file = Path::new(text("file")).file_name().unwrap_or_default();
            Finding {
                file: file.to_string_lossy().into_owned(),
                text: format!("{}: {}: {}", text("severity"), text("field"), text("message")),
            }
        };
        findings.iter().map(finding).collect()
    }
}

/// Every object has a file of its own, so that one can be deleted, and a finding is of one.
pub(crate) fn file_name((kind, namespace, name): &Key) -> String {
    format!("{kind}.{namespace}.{name}.yaml")
}

/// `Kind/namespace/name`.
fn parse_key(text: &str) -> Option<Key> {
    let parts: Vec<&str> = text.split(['/', ' ']).collect();
    match parts.as_slice() {
        [kind, namespace, name] => {
            Some(((*kind).to_owned(), (*namespace).to_owned(), (*name).to_owned()))
        }
        _ => None,
    }
}

/// The object that a set-up step applies: the step itself, or what it holds.
fn resource(step: &Value) -> Option<&Value> {
    let is_object = |value: &&Value| value["apiVersion"].is_string() && value["kind"].is_string();
    let held = || step.as_object().and_then(|step| step.values().find(is_object));
    Some(step).filter(is_object).or_else(held)
}

/// A pod's account is called like its Deployment.
fn token(control_plane: &ControlPlane, workload: &Workload) -> String {
    control_plane.token(&workload.deployment.namespace, &workload.deployment.name, &[])
}

async fn pod(workload: &Workload, number: usize, log: &Arc<Log>) -> Pod {
    let deployment = &workload.deployment;
    let replica = Replica {
        namespace: deployment.namespace.clone(),
        deployment: deployment.name.clone(),
        pod: format!("{}-{number}", deployment.name),
        sentinel: deployment.sentinel,
    };
    Pod::start(replica, &workload.ports, log).await
}

/// Of the sidecar in front of a pod, if there is a Service that leads to it.
fn options(workload: &Workload, pod: &Pod, token: &str) -> Option<Options> {
    let (namespace, ip) = (&workload.deployment.namespace, pod.ip.to_string());
    let ports: Vec<String> = pod.ports.iter().map(ToString::to_string).collect();
    if workload.services.is_empty() || ports.is_empty() {
        return None;
    }
    let mut options = Options::client(&workload.services.join(","))
        .namespace(namespace)
        .instance(&format!("{namespace}-{}", pod.replica.pod))
        .flags(&["--app-host", &ip, "--app-port", &ports.join(",")]);
    options.token = Some(token.to_owned());
    Some(options)
}

/// Where a request comes from: a workload that the case names, or any of the namespace.
fn client(request: &Request) -> ClientKey {
    let namespace = request.from_namespace.as_ref().unwrap_or(&request.to.namespace);
    let workload = request.from_workload.as_deref().unwrap_or("client");
    (namespace.clone(), workload.to_owned())
}

fn clients(test: &Test) -> impl Iterator<Item = ClientKey> {
    let cases = test.cases().into_iter().filter_map(|(_, case)| case.ok());
    let scored = cases.filter(Case::is_scored);
    let clients: BTreeSet<ClientKey> = scored.map(|case| client(&case.request)).collect();
    clients.into_iter()
}
