//! The objects of a test: base and own, and which pods of the base's Deployments are needed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::case::{Suite, Test};
use super::echo::Speaks;

/// Of the Service that stands for a Gateway; selects no pod of the base.
const SENTINEL: &str = "parent-sentinel";
/// Lists the accounts whose replicas may serve a Service.
const ACCOUNTS: &str = "duet.dev/service-accounts";

/// Kind, namespace and name.
pub(crate) type Key = (String, String, String);

/// What a test applies.
#[derive(Debug)]
pub(crate) struct Objects {
    pub(crate) all: BTreeMap<Key, Value>,
    deployments: Vec<Deployment>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Deployment {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) replicas: usize,
    labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) sentinel: bool,
}

/// A Deployment whose pods are needed.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) deployment: Deployment,
    /// Of its namespace: those that select its pods.
    pub(crate) services: Vec<String>,
    pub(crate) ports: Vec<(u16, Speaks)>,
}

/// `topology.json`, by base.
type Topology = BTreeMap<String, Placed>;

#[derive(Debug, Deserialize)]
struct Placed {
    deployments: Vec<Deployment>,
}

pub(crate) fn key(object: &Value) -> Key {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    (text(&object["kind"]), text(&metadata["namespace"]), text(&metadata["name"]))
}

impl Objects {
    /// Those of a test, in which Services allow the Deployments that they select to serve them: in a cluster the
    /// selector says that.
    pub(crate) fn of(suite: &Suite, test: &Test) -> Self {
        let base = suite.root.join(&test.base);
        let text = std::fs::read_to_string(&base).unwrap();
        let base_objects = serde_yaml::Deserializer::from_str(&text)
            .map(|one| Value::deserialize(one).unwrap())
            .filter(|one| !one.is_null());
        let own = test.synthesized_resources.iter().chain(&test.resources).cloned();
        let all = base_objects.chain(own).map(|object| (key(&object), object)).collect();
        let mut objects = Self { all, deployments: deployments(&base) };
        for object in &test.synthesized_resources {
            let (_, namespace, name) = key(object);
            objects.deployments.push(Deployment {
                namespace,
                name: format!("{name}-sentinel"),
                replicas: 1,
                labels: BTreeMap::from([("app".to_owned(), SENTINEL.to_owned())]),
                sentinel: true,
            });
        }
        objects.allow_accounts();
        objects
    }

    fn allow_accounts(&mut self) {
        let selected = |service: &Value| -> Vec<&str> {
            let by = self.deployments.iter().filter(|deployment| deployment.is_behind(service));
            by.map(|deployment| deployment.name.as_str()).collect()
        };
        for object in self.all.values_mut().filter(|object| object["kind"] == "Service") {
            let accounts = selected(object).join(",");
            object["metadata"]["annotations"][ACCOUNTS] = json!(accounts);
        }
    }

    fn services(&self) -> impl Iterator<Item = &Value> {
        self.all.values().filter(|object| object["kind"] == "Service")
    }

    /// The Deployments that a test may reach: behind each Service that its resources or its cases name.
    pub(crate) fn workloads(&self, test: &Test) -> Vec<Workload> {
        let mut named = BTreeSet::new();
        for object in test.resources.iter().chain(&test.synthesized_resources) {
            names(object, &key(object).1, &mut named);
        }
        for (_, case) in test.cases() {
            let Ok(case) = case else { continue };
            let to = case.request.to;
            named.extend(to.service.or(to.pod_of).map(|name| (to.namespace, name)));
        }
        let is_named = |service: &Value| {
            let (_, namespace, name) = key(service);
            named.contains(&(namespace, name))
        };
        let needed = |deployment: &&Deployment| {
            named.contains(&(deployment.namespace.clone(), deployment.name.clone()))
                || self.services().any(|service| is_named(service) && deployment.is_behind(service))
        };
        let needed = self.deployments.iter().filter(needed);
        needed.map(|deployment| self.workload(deployment)).collect()
    }

    fn workload(&self, deployment: &Deployment) -> Workload {
        let selecting = || self.services().filter(|service| deployment.is_behind(service));
        let mut ports = BTreeMap::new();
        for port in selecting().flat_map(|service| service["spec"]["ports"].as_array()).flatten() {
            let target = port.get("targetPort").unwrap_or(&port["port"]);
            let target = target.as_u64().and_then(|target| u16::try_from(target).ok());
            let spoken = target.and_then(|target| Some((target, deployment.speaks(target)?)));
            ports.extend(spoken);
        }
        Workload {
            deployment: deployment.clone(),
            services: selecting().map(|service| key(service).2).collect(),
            ports: ports.into_iter().collect(),
        }
    }
}

fn deployments(base: &Path) -> Vec<Deployment> {
    let topology = std::fs::read(base.with_file_name("topology.json")).unwrap();
    let mut topology: Topology = serde_json::from_slice(&topology).unwrap();
    let name = base.file_stem().unwrap().to_string_lossy();
    topology.remove(name.as_ref()).unwrap().deployments
}

/// Everything that an object refers to by a name, whatever it is.
fn names(value: &Value, namespace: &str, found: &mut BTreeSet<(String, String)>) {
    if let Some(name) = value.get("name").and_then(Value::as_str) {
        let namespace = value.get("namespace").and_then(Value::as_str).unwrap_or(namespace);
        found.insert((namespace.to_owned(), name.to_owned()));
    }
    let children: Vec<&Value> = match value {
        Value::Array(list) => list.iter().collect(),
        Value::Object(map) => map.values().collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => return,
    };
    for child in children {
        names(child, namespace, found);
    }
}

impl Deployment {
    fn is_behind(&self, service: &Value) -> bool {
        let selector = service["spec"]["selector"].as_object();
        service["metadata"]["namespace"] == self.namespace.as_str()
            && selector.is_some_and(|selector| {
                let fits = |(label, value): (&String, &Value)| {
                    self.labels.get(label).map(String::as_str) == value.as_str()
                };
                !selector.is_empty() && selector.iter().all(fits)
            })
    }

    /// What its pods speak on a port, as the README of the cases has it; TLS, TCP and UDP are left out.
    fn speaks(&self, port: u16) -> Option<Speaks> {
        match port {
            _ if self.sentinel => Some(Speaks::Either),
            3000 if self.name.starts_with("grpc-") => Some(Speaks::H2c),
            3000 => Some(Speaks::Http1),
            3001 | 7070 => Some(Speaks::H2c),
            8080 => Some(Speaks::Either),
            _ => None,
        }
    }
}
