//! One pod: its volumes as folders, its containers as processes, its probes as the kubelet makes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use duet_tests::eventually;
use duet_tests::process::{Process, program};
use serde_json::Value;

use super::network::Network;

/// Folders for volumes.
pub(crate) struct Volumes {
    folder: PathBuf,
    configs: BTreeMap<String, Value>,
}

impl Volumes {
    pub(crate) fn new(folder: &Path, configs: BTreeMap<String, Value>) -> Self {
        Self { folder: folder.to_owned(), configs }
    }

    /// Puts a key into a Secret.
    pub(crate) fn secret(&mut self, name: &str, key: &str, value: &str) {
        let folder = self.folder.join("secret").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(key), value).unwrap();
    }

    /// The folder of a volume of a pod.
    fn folder(&self, pod: &str, volume: &Value) -> PathBuf {
        let name = |value: &Value| value.as_str().unwrap().to_owned();
        if let Some(map) = volume.get("configMap") {
            let folder = self.folder.join("config").join(name(&map["name"]));
            fs::create_dir_all(&folder).unwrap();
            for (key, text) in self.configs[&name(&map["name"])].as_object().unwrap() {
                fs::write(folder.join(key), text.as_str().unwrap()).unwrap();
            }
            return folder;
        }
        let folder = if let Some(secret) = volume.get("secret") {
            self.folder.join("secret").join(name(&secret["secretName"]))
        } else if let Some(claim) = volume.get("persistentVolumeClaim") {
            self.folder.join("claim").join(name(&claim["claimName"]))
        } else {
            assert!(
                volume.get("emptyDir").is_some() || volume.get("template").is_some(),
                "{volume}"
            );
            self.folder.join("pod").join(pod).join(name(&volume["name"]))
        };
        fs::create_dir_all(&folder).unwrap();
        folder
    }
}

pub(crate) struct Pod<'n> {
    name: String,
    workload: Value,
    network: &'n Network,
    logs: PathBuf,
    /// Volume name to folder.
    volumes: BTreeMap<String, PathBuf>,
    processes: Vec<Process>,
}

impl<'n> Pod<'n> {
    pub(crate) fn new(
        name: &str,
        workload: &Value,
        network: &'n Network,
        volumes: &mut Volumes,
    ) -> Self {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let spec = &workload["spec"];
        let mut all = list(&spec["template"]["spec"]["volumes"]);
        // Each replica of a StatefulSet has a volume of its own.
        all.extend(list(&spec["volumeClaimTemplates"]).iter().map(
            |template| serde_json::json!({"name": template["metadata"]["name"], "template": true}),
        ));
        let folders = all.iter().map(|volume| {
            (volume["name"].as_str().unwrap().to_owned(), volumes.folder(name, volume))
        });
        Self {
            name: name.to_owned(),
            workload: workload.clone(),
            network,
            logs: volumes.folder.clone(),
            volumes: folders.collect(),
            processes: Vec::new(),
        }
    }

    fn template(&self) -> &Value {
        &self.workload["spec"]["template"]
    }

    fn containers(&self, kind: &str) -> Vec<Value> {
        self.template()["spec"][kind].as_array().cloned().unwrap_or_default()
    }

    /// The folder that is mounted at a path.
    pub(crate) fn mounted(&self, path: &str) -> PathBuf {
        let containers =
            [self.containers("containers"), self.containers("initContainers")].concat();
        let mounts =
            containers.iter().flat_map(|one| one["volumeMounts"].as_array().into_iter().flatten());
        let mount = mounts.into_iter().find(|mount| mount["mountPath"] == path).unwrap();
        self.volumes[mount["name"].as_str().unwrap()].clone()
    }

    /// Starts the native sidecars, each after the former's startup probe.
    pub(crate) async fn start_sidecars(&mut self, limit: Duration) {
        for container in self.containers("initContainers") {
            assert_eq!(container["restartPolicy"], "Always", "a native sidecar");
            self.start(&container);
            self.probe(&container, "startupProbe", limit).await;
        }
    }

    pub(crate) fn start_containers(&mut self) {
        for container in self.containers("containers") {
            self.start(&container);
        }
    }

    /// Waits for every readiness probe.
    pub(crate) async fn wait_ready(&self, limit: Duration) {
        for container in [self.containers("initContainers"), self.containers("containers")].concat()
        {
            self.probe(&container, "readinessProbe", limit).await;
        }
    }

    async fn probe(&self, container: &Value, kind: &str, limit: Duration) {
        let Some(get) = container.get(kind).map(|probe| &probe["httpGet"]) else { return };
        let ports = container["ports"].as_array().unwrap();
        let port =
            ports.iter().find(|port| port["name"] == get["port"]).unwrap()["containerPort"].clone();
        let address = self.network.address(&self.name);
        let url = format!("http://{address}:{port}{}", get["path"].as_str().unwrap());
        let what = format!("{kind} of {} in {}: {url}", container["name"], self.name);
        eventually(&what, limit, || async { self.network.curl(&self.name, &[&url]).map(drop) })
            .await;
    }

    fn start(&mut self, container: &Value) {
        let image = container["image"].as_str().unwrap();
        // The image's entry point is the program that it is named after.
        let program = program(image.split(':').next().unwrap());
        let mut command = self.network.command(&self.name);
        command.arg(program).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        for argument in container["args"].as_array().into_iter().flatten() {
            command.arg(self.in_folders(container, argument.as_str().unwrap()));
        }
        for variable in container["env"].as_array().into_iter().flatten() {
            let value = match variable.get("valueFrom") {
                Some(from) => self.field(from["fieldRef"]["fieldPath"].as_str().unwrap()),
                None => self.in_folders(container, variable["value"].as_str().unwrap_or_default()),
            };
            command.env(variable["name"].as_str().unwrap(), value);
        }
        let log = format!("{}-{}", self.name, container["name"].as_str().unwrap());
        self.processes.push(Process::start(&log, command, &self.logs));
    }

    /// Mount paths replaced by the folders that are mounted there.
    fn in_folders(&self, container: &Value, text: &str) -> String {
        let mut text = text.to_owned();
        for mount in container["volumeMounts"].as_array().into_iter().flatten() {
            let path = mount["mountPath"].as_str().unwrap();
            let folder = &self.volumes[mount["name"].as_str().unwrap()];
            text = text.replace(path, &folder.display().to_string());
        }
        text
    }

    /// The downward API.
    fn field(&self, path: &str) -> String {
        let metadata = &self.template()["metadata"];
        let key = path.split_once("['").map(|(_, key)| key.trim_end_matches("']"));
        match (path, key) {
            ("metadata.name", _) => self.name.clone(),
            ("metadata.namespace", _) => {
                self.workload["metadata"]["namespace"].as_str().unwrap().to_owned()
            }
            ("status.podIP", _) => self.network.address(&self.name).to_owned(),
            (path, Some(key)) if path.starts_with("metadata.labels") => {
                metadata["labels"][key].as_str().unwrap().to_owned()
            }
            (path, Some(key)) if path.starts_with("metadata.annotations") => {
                metadata["annotations"][key].as_str().unwrap().to_owned()
            }
            _ => panic!("the downward API has no {path}"),
        }
    }
}
