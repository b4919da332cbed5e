//! `duet.yaml`: what a mesh on this machine is made of. Strict: unknown fields are errors with their place.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;

/// A mesh.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Mesh {
    /// Default: the folder's name.
    pub(crate) name: Option<String>,
    /// Of all services.
    #[serde(default = "default_namespace")]
    pub(crate) namespace: String,
    #[serde(default = "default_trust_domain")]
    pub(crate) trust_domain: String,
    /// Run once before the start, by `sh -c`.
    pub(crate) build: Option<String>,
    /// Files and folders of resources, relative to `duet.yaml`.
    #[serde(default)]
    pub(crate) resources: Vec<String>,
    /// By service name.
    pub(crate) apps: BTreeMap<String, App>,
}

/// A service.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct App {
    pub(crate) command: Command,
    #[serde(default)]
    pub(crate) port: Port,
    /// `http`, `h2c` or `grpc`; default: as callers speak.
    pub(crate) protocol: Option<String>,
    #[serde(default = "one")]
    pub(crate) replicas: u32,
    /// `$NAME` and `${NAME}` are expanded.
    #[serde(default)]
    pub(crate) env: BTreeMap<String, String>,
    /// Path that answers 2xx when the service is ready; default: its port accepts.
    pub(crate) readiness: Option<String>,
    /// Services that have to be ready first.
    #[serde(default)]
    pub(crate) depends_on: Vec<String>,
    #[serde(default)]
    pub(crate) sidecar: Sidecar,
}

/// Settings of a service's sidecars.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Sidecar {
    /// Worker threads; a number or `auto`.
    pub(crate) workers: Option<String>,
    /// `off`, `stdout` or a file.
    pub(crate) access_log: Option<String>,
}

/// A list of arguments, or a string for `sh -c`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "a command is a list of arguments, or a string for the shell")]
pub(crate) enum Command {
    Shell(String),
    Arguments(Vec<String>),
}

impl Command {
    /// Program and arguments.
    pub(crate) fn arguments(&self) -> Vec<String> {
        match self {
            Self::Shell(text) => {
                // A single command takes the shell's place, so that signals reach it and not a shell before it.
                let single = !text.contains([';', '|', '&', '(', '<', '>', '\n', '=', '`']);
                let text = if single { format!("exec {text}") } else { text.clone() };
                vec!["sh".to_owned(), "-c".to_owned(), text]
            }
            Self::Arguments(arguments) => arguments.clone(),
        }
    }
}

/// Where a service listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawPort")]
pub(crate) enum Port {
    /// A free one, given as `$PORT`.
    #[default]
    Auto,
    Fixed(u16),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a port is a number of 1 to 65535, or `auto`")]
enum RawPort {
    Number(u16),
    Word(String),
}

impl TryFrom<RawPort> for Port {
    type Error = String;

    fn try_from(raw: RawPort) -> Result<Self, String> {
        match raw {
            RawPort::Number(port @ 1..) => Ok(Self::Fixed(port)),
            RawPort::Word(word) if word == "auto" => Ok(Self::Auto),
            RawPort::Number(0) => {
                Err("a port is 1 to 65535; write `auto` for a free one".to_owned())
            }
            RawPort::Word(word) => {
                Err(format!("{word:?} is not a port: a number of 1 to 65535, or `auto`"))
            }
        }
    }
}

fn default_namespace() -> String {
    duet_api::DEFAULT_NAMESPACE.to_owned()
}

fn default_trust_domain() -> String {
    "duet.local".to_owned()
}

fn one() -> u32 {
    1
}

impl Mesh {
    /// Reads and checks a `duet.yaml`.
    pub(crate) fn load(file: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("{}: a mesh is described by a duet.yaml", file.display()))?;
        Self::parse(&file.display().to_string(), &text)
    }

    fn parse(file: &str, text: &str) -> anyhow::Result<Self> {
        let yaml = serde_yaml::Deserializer::from_str(text);
        let mesh: Self = serde_path_to_error::deserialize(yaml).map_err(|error| {
            let field = error.path().to_string();
            let inner = error.into_inner();
            let place = inner.location().map_or((1, 1), |at| (at.line(), at.column()));
            let text = inner.to_string();
            let text = text.split(" at line ").next().unwrap_or(&text).to_owned();
            anyhow::anyhow!("{file}:{}:{}: {field}: {text}", place.0, place.1)
        })?;
        mesh.validate().with_context(|| file.to_owned())?;
        Ok(mesh)
    }

    fn validate(&self) -> anyhow::Result<()> {
        let mut ports = BTreeMap::new();
        for (name, app) in &self.apps {
            duet_api::spiffe::SpiffeId::new(&self.trust_domain, &self.namespace, name)
                .with_context(|| format!("apps.{name}"))?;
            if app.replicas == 0 || app.replicas > 100 {
                bail!("apps.{name}.replicas: {} is not 1 to 100", app.replicas);
            }
            if let Port::Fixed(port) = app.port {
                if app.replicas > 1 {
                    bail!("apps.{name}.port: {} replicas need `port: auto`", app.replicas);
                }
                if let Some(other) = ports.insert(port, name) {
                    bail!("apps.{name}.port: {port} is the port of {other} already");
                }
            }
            if !matches!(app.protocol.as_deref(), None | Some("http" | "h2c" | "grpc")) {
                bail!("apps.{name}.protocol: it is http, h2c or grpc");
            }
            if let Some(missing) = app.depends_on.iter().find(|on| !self.apps.contains_key(*on)) {
                bail!("apps.{name}.dependsOn: there is no app {missing:?}");
            }
            if app.readiness.as_ref().is_some_and(|path| !path.starts_with('/')) {
                bail!("apps.{name}.readiness: it is a path such as /healthz");
            }
        }
        self.order().map(drop)
    }

    /// The ports that services ask for.
    pub(crate) fn fixed_ports(&self) -> Vec<u16> {
        let fixed = |app: &App| match app.port {
            Port::Fixed(port) => Some(port),
            Port::Auto => None,
        };
        self.apps.values().filter_map(fixed).collect()
    }

    /// The services in groups: each group depends only on those before it.
    pub(crate) fn order(&self) -> anyhow::Result<Vec<Vec<&str>>> {
        let mut done = BTreeSet::new();
        let mut groups = Vec::new();
        while done.len() < self.apps.len() {
            let free = |(name, app): &(&String, &App)| {
                !done.contains(name.as_str())
                    && app.depends_on.iter().all(|on| done.contains(on.as_str()))
            };
            let group: Vec<&str> =
                self.apps.iter().filter(free).map(|(name, _)| name.as_str()).collect();
            if group.is_empty() {
                let left = self.apps.keys().filter(|name| !done.contains(name.as_str()));
                let left: Vec<&str> = left.map(String::as_str).collect();
                bail!("apps: dependsOn goes in a circle among {}", left.join(", "));
            }
            done.extend(group.iter().copied());
            groups.push(group);
        }
        Ok(groups)
    }
}

/// Expands `$NAME` and `${NAME}` by `lookup`; what is unknown becomes empty, `$$` a dollar sign.
pub(crate) fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = after.strip_prefix('{').and_then(|t| t.split_once('}'))
        {
            out.push_str(&lookup(name).unwrap_or_default());
            rest = after;
        } else {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let (name, after) = after.split_at(end.unwrap_or(after.len()));
            out.push_str(&lookup(name).unwrap_or_default());
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", Mesh::parse("duet.yaml", text).unwrap_err())
    }

    #[test]
    fn a_mesh_parses_with_its_defaults() {
        let mesh = Mesh::parse(
            "duet.yaml",
            "apps:\n  a: {command: [x, y]}\n  b: {command: z, port: 80}\n",
        )
        .unwrap();
        assert_eq!(
            (mesh.namespace.as_str(), mesh.trust_domain.as_str()),
            ("default", "duet.local")
        );
        assert_eq!(mesh.apps["a"].port, Port::Auto);
        assert_eq!(mesh.apps["b"].port, Port::Fixed(80));
        assert_eq!(mesh.apps["b"].command.arguments(), ["sh", "-c", "exec z"]);
    }

    #[test]
    fn mistakes_name_their_place() {
        let unknown = error("apps:\n  a:\n    command: [x]\n    replica: 2\n");
        assert!(unknown.starts_with("duet.yaml:4:"), "{unknown}");
        assert!(unknown.contains("unknown field `replica`"), "{unknown}");
        let port = error("apps:\n  a: {command: x, port: 80}\n  b: {command: x, port: 80}\n");
        assert!(port.contains("apps.b.port: 80 is the port of a"), "{port}");
        let many = error("apps:\n  a: {command: x, port: 80, replicas: 2}\n");
        assert!(many.contains("need `port: auto`"), "{many}");
        assert!(error("apps:\n  A: {command: x}\n").contains("apps.A"));
    }

    #[test]
    fn dependencies_are_ordered_and_circles_refused() {
        let text = "apps:\n  a: {command: x, dependsOn: [b]}\n  b: {command: x}\n  c: {command: x, dependsOn: [a]}\n";
        let mesh = Mesh::parse("duet.yaml", text).unwrap();
        assert_eq!(mesh.order().unwrap(), [["b"], ["a"], ["c"]]);
        assert!(
            error(&text.replace("b: {command: x}", "b: {command: x, dependsOn: [c]}"))
                .contains("circle")
        );
        assert!(error("apps:\n  a: {command: x, dependsOn: [z]}\n").contains("no app \"z\""));
    }

    #[test]
    fn variables_expand() {
        let lookup = |name: &str| (name == "A_1").then(|| "x".to_owned());
        assert_eq!(expand("$A_1/${A_1}/$$A_1/$B", lookup), "x/x/$A_1/");
    }
}
