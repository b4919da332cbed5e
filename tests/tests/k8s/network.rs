//! A network for pods: one network namespace each, joined by a bridge in a namespace of its own. Nothing of the host's
//! network is touched, and everything is removed at the end.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

pub(crate) struct Network {
    prefix: String,
    /// Pod name to (namespace, address).
    pods: BTreeMap<String, (String, String)>,
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Network {
    pub(crate) fn make<'p>(pods: impl Iterator<Item = &'p str>) -> Self {
        let prefix = format!("duet{}", std::process::id());
        let mut network = Self { prefix: prefix.clone(), pods: BTreeMap::new() };
        let fabric = format!("{prefix}-fabric");
        ip(&["netns", "add", &fabric]);
        ip(&["-n", &fabric, "link", "add", "bridge", "type", "bridge"]);
        ip(&["-n", &fabric, "link", "set", "bridge", "up"]);
        for (number, pod) in pods.enumerate() {
            let (namespace, address) =
                (format!("{prefix}-{number}"), format!("10.231.0.{}", number + 10));
            network.pods.insert(pod.to_owned(), (namespace.clone(), address.clone()));
            ip(&["netns", "add", &namespace]);
            let port = format!("pod{number}");
            // Made inside the two namespaces, so that the host never sees it.
            let peer = ["peer", "name", "eth0", "netns", &namespace];
            ip(&[&["-n", &fabric, "link", "add", &port, "type", "veth"][..], &peer[..]].concat());
            ip(&["-n", &fabric, "link", "set", &port, "master", "bridge"]);
            ip(&["-n", &fabric, "link", "set", &port, "up"]);
            ip(&["-n", &namespace, "address", "add", &format!("{address}/24"), "dev", "eth0"]);
            ip(&["-n", &namespace, "link", "set", "eth0", "up"]);
            ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        }
        network
    }

    /// Makes a name known in every pod, as the cluster's DNS would. `ip netns exec` puts the file over `/etc/hosts`.
    pub(crate) fn name(&self, name: &str, pod: &str) {
        let hosts = format!("127.0.0.1 localhost\n{} {name}\n", self.address(pod));
        for (namespace, _) in self.pods.values() {
            let folder = PathBuf::from("/etc/netns").join(namespace);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("hosts"), &hosts).unwrap();
        }
    }

    pub(crate) fn address(&self, pod: &str) -> &str {
        &self.pods[pod].1
    }

    /// A command that runs in a pod's network.
    pub(crate) fn command(&self, pod: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.pods[pod].0]);
        command
    }

    /// What `curl` gets in a pod's network; `None` unless 2xx.
    pub(crate) fn curl(&self, pod: &str, arguments: &[&str]) -> Option<String> {
        let mut command = self.command(pod);
        command.args(["curl", "--silent", "--fail", "--max-time", "20", "--noproxy", "*"]);
        let output = command.args(arguments).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let namespaces = self.pods.values().map(|(namespace, _)| namespace.clone());
        for namespace in namespaces.chain([format!("{}-fabric", self.prefix)]) {
            Command::new("ip").args(["netns", "delete", &namespace]).output().ok();
            fs::remove_dir_all(PathBuf::from("/etc/netns").join(&namespace)).ok();
        }
        // Goes only when nobody else has anything there.
        fs::remove_dir("/etc/netns").ok();
    }
}
