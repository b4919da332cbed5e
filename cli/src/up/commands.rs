//! How each process of a mesh is started: command lines and environments.
//!
//! Ports are chosen by the processes at their first start; after a crash each gets the ones that it had, so the
//! command lines are made anew from `state.json` before each start.

use std::path::Path;
use std::rc::Rc;

use anyhow::Context as _;

use super::config::{App, Mesh, expand};
use super::state::{Folder, Replica};
use crate::process::Spec;

const ANY: &str = "127.0.0.1:0";

/// The control plane.
pub(crate) fn control_plane(
    mesh: &Mesh,
    folder: &Path,
    state: &Rc<Folder>,
    ports_file: &Path,
) -> anyhow::Result<impl Fn() -> Spec + use<>> {
    let mut command = vec![program()?, "control-plane".to_owned(), "--exit-with-parent".to_owned()];
    for path in &mesh.resources {
        command.extend(["--config".to_owned(), folder.join(path).display().to_string()]);
    }
    let settings = [
        ("--state", state.join("control-plane").display().to_string()),
        ("--trust-domain", mesh.trust_domain.clone()),
        ("--log-format", "text".to_owned()),
    ];
    flags(&mut command, &settings);
    let (folder, state, tell) = (folder.to_owned(), Rc::clone(state), telling(ports_file));
    Ok(move || {
        let known = state.state().control_plane;
        let admin = known.admin_url.strip_prefix("http://").unwrap_or_default();
        let mut command = command.clone();
        let operator = known.operator_url.strip_prefix("http://").unwrap_or_default();
        let ports = [
            ("--listen", at(&known.grpc)),
            ("--admin-listen", at(admin)),
            ("--operator-listen", at(operator)),
        ];
        flags(&mut command, &ports);
        tell(&mut command, &known.grpc);
        Spec { command, env: Vec::new(), folder: folder.clone() }
    })
}

/// A sidecar. The last argument: its ports file and its token.
pub(crate) fn sidecar(
    mesh: &Mesh,
    folder: &Path,
    state: &Rc<Folder>,
    (index, replica): (usize, &Replica),
    (ports_file, token): (&Path, &Path),
) -> anyhow::Result<impl Fn() -> Spec + use<>> {
    let app = mesh.apps.get(&replica.service).context("no such app")?;
    let protocol = app.protocol.as_ref().map(|name| format!("/{name}")).unwrap_or_default();
    let own = state.join("sidecars").join(&replica.instance);
    let mut command = vec![program()?, "proxy".to_owned(), "--exit-with-parent".to_owned()];
    let settings = [
        ("--service", replica.service.clone()),
        ("--namespace", mesh.namespace.clone()),
        ("--instance", replica.instance.clone()),
        ("--control-plane", state.state().control_plane.grpc),
        ("--token-file", token.display().to_string()),
        ("--state", own.display().to_string()),
        ("--app-port", format!("http={}{protocol}", replica.app.port)),
        ("--advertise", "127.0.0.1".to_owned()),
        ("--workers", app.sidecar.workers.clone().unwrap_or_else(|| "1".to_owned())),
        ("--access-log", app.sidecar.access_log.clone().unwrap_or_else(|| "off".to_owned())),
        ("--log-format", "text".to_owned()),
    ];
    flags(&mut command, &settings);
    let (folder, state, tell) = (folder.to_owned(), Rc::clone(state), telling(ports_file));
    Ok(move || {
        let known = state.state().apps.get(index).map(|replica| replica.sidecar.clone());
        let known = known.unwrap_or_default();
        let mut command = command.clone();
        let ports = [
            ("--outbound-listen", at(&known.outbound)),
            ("--inbound-listen", at(&known.inbound)),
            ("--api-listen", at(&known.api)),
            ("--grpc-api-listen", at(&known.grpc_api)),
            ("--admin-listen", at(&known.admin)),
            ("--metrics-listen", at(&known.metrics)),
        ];
        flags(&mut command, &ports);
        tell(&mut command, &known.outbound);
        Spec { command, env: Vec::new(), folder: folder.clone() }
    })
}

/// Has a process say its ports, as long as they are not known: on a full disk it could not, and would not start again.
fn telling(ports_file: &Path) -> impl Fn(&mut Vec<String>, &str) + use<> {
    let file = ports_file.display().to_string();
    move |command, known| {
        if known.is_empty() {
            flags(command, &[("--ports-file", file.clone())]);
        }
    }
}

fn at(known: &str) -> String {
    if known.is_empty() { ANY.to_owned() } else { known.to_owned() }
}

/// An application, through `duet exec-app`, which ends with us. `folder` is where it runs, `state` the mesh's.
pub(crate) fn app(
    namespace: &str,
    (folder, state): (&Path, &Path),
    (replica, app): (&Replica, &App),
) -> anyhow::Result<Spec> {
    let command = exec_app(app.command.arguments())?;
    let mut env = app_env(namespace, replica);
    env.push(("DUET_STATE".to_owned(), state.display().to_string()));
    let given = env.clone();
    let lookup = |name: &str| {
        let own = given.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        own.or_else(|| std::env::var(name).ok())
    };
    env.extend(app.env.iter().map(|(key, value)| (key.clone(), expand(value, lookup))));
    Ok(Spec { command, env, folder: folder.to_owned() })
}

/// A command wrapped so that it ends when this process dies.
pub(crate) fn exec_app(arguments: Vec<String>) -> anyhow::Result<Vec<String>> {
    let mut command = vec![program()?, "exec-app".to_owned(), "--parent".to_owned()];
    command.extend([std::process::id().to_string(), "--".to_owned()]);
    command.extend(arguments);
    Ok(command)
}

/// What an application is told of its sidecar.
pub(crate) fn app_env(namespace: &str, replica: &Replica) -> Vec<(String, String)> {
    let proxy = format!("http://{}", replica.sidecar.outbound);
    let local = "localhost,127.0.0.1,::1";
    let (host, api) = replica.sidecar.api.rsplit_once(':').unwrap_or(("127.0.0.1", "3500"));
    let grpc = replica.sidecar.grpc_api.rsplit_once(':').map_or("50001", |(_, port)| port);
    let pairs = [
        ("HTTP_PROXY", proxy.clone()),
        ("http_proxy", proxy),
        ("NO_PROXY", local.to_owned()),
        ("no_proxy", local.to_owned()),
        ("DAPR_HTTP_PORT", api.to_owned()),
        ("DAPR_HTTP_ENDPOINT", format!("http://{host}:{api}")),
        ("DAPR_GRPC_PORT", grpc.to_owned()),
        ("APP_ID", replica.service.clone()),
        ("DUET_OUTBOUND", replica.sidecar.outbound.clone()),
        ("DUET_SERVICE", replica.service.clone()),
        ("DUET_NAMESPACE", namespace.to_owned()),
        ("DUET_REPLICA", replica.replica.to_string()),
    ];
    // A pure client listens nowhere. Dapr's SDKs look for `APP_PORT`.
    let port = Some(replica.app.port).filter(|port| *port != 0).map(|port| port.to_string());
    let ports = ["PORT", "APP_PORT"].into_iter().zip(port.into_iter().cycle());
    pairs.into_iter().chain(ports).map(|(key, value)| (key.to_owned(), value)).collect()
}

/// This program.
pub(crate) fn program() -> anyhow::Result<String> {
    let path = std::env::current_exe().context("finding this program")?;
    Ok(path.display().to_string())
}

pub(crate) fn flags(command: &mut Vec<String>, flags: &[(&str, String)]) {
    for (flag, value) in flags {
        command.extend([(*flag).to_owned(), value.clone()]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::{AppState, SidecarState, State};
    use super::*;

    #[test]
    fn what_starts_again_on_its_ports_needs_no_disk_to_say_them() {
        let folder = tempfile::tempdir().unwrap();
        let replica = Replica {
            service: "a".to_owned(),
            replica: 1,
            instance: "a-1".to_owned(),
            app: AppState { pid: 0, port: 80, url: String::new(), restarts: 0 },
            sidecar: SidecarState::default(),
            ready: false,
        };
        let mesh = serde_yaml::from_str::<Mesh>("apps: {a: {command: x}}").unwrap();
        let initial = State { apps: vec![replica.clone()], ..State::default() };
        let state = Rc::new(Folder::open(folder.path(), initial).unwrap());
        let file = folder.path().join("ports.json");
        let first = control_plane(&mesh, folder.path(), &state, &file).unwrap();
        let files = (file.as_path(), file.as_path());
        let second = sidecar(&mesh, folder.path(), &state, (0, &replica), files).unwrap();
        let say =
            || [first(), second()].map(|spec| spec.command.contains(&"--ports-file".to_owned()));
        assert_eq!(say(), [true, true]);
        let known = |state: &mut State| {
            state.control_plane.grpc = "127.0.0.1:1".to_owned();
            state.apps[0].sidecar.outbound = "127.0.0.1:2".to_owned();
        };
        state.update(known).unwrap();
        assert_eq!(say(), [false, false]);
        assert!(second().command.contains(&"127.0.0.1:2".to_owned()));
    }
}
