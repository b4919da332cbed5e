//! The `duet` command: what it starts it ends, and what is wrong it names.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::path::Path;
use std::process::{Command, Output};

use duet_tests::port::free_port;
use duet_tests::process::{Process, exists, program, send};
use duet_tests::up::Up;
use duet_tests::{SOON, eventually, http, tools};
use rustix::process::Signal;

fn duet(arguments: &[&str]) -> Output {
    Command::new(program("duet")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One service that needs nothing: the sidecar's own program, as an application that serves HTTP on `$PORT`.
fn small(command: &str) -> String {
    format!("name: small\napps:\n  web:\n    command: {command}\n")
}

/// The shop's notifications answer HTTP and need nobody.
fn web() -> String {
    small(&format!("[{}, notifications]", program("shop").display()))
}

async fn all_gone(pids: &[u32]) {
    eventually("every process is gone", SOON, || async {
        pids.iter().all(|pid| !exists(*pid)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn ctrl_c_ends_everything_in_order_and_kill_9_leaves_no_orphan() {
    let mut up = Up::start(tempfile::tempdir().unwrap(), &web()).await;
    let pids = up.pids();
    assert!(pids.iter().all(|pid| exists(*pid)));
    assert_eq!(up.stop(), Some(0), "{}", up.process.log());
    all_gone(&pids).await;
    assert!(!up.state_folder().join("state.json").exists());

    let mut up = Up::start(tempfile::tempdir().unwrap(), &web()).await;
    let pids = up.pids();
    up.process.kill();
    all_gone(&pids).await;
}

#[tokio::test]
async fn two_meshes_run_side_by_side_and_a_state_folder_has_one_owner() {
    let mut one = Up::start(tempfile::tempdir().unwrap(), &web()).await;
    let two = Up::start(tempfile::tempdir().unwrap(), &web()).await;
    assert_ne!(one.url("web-1"), two.url("web-1"));
    let again = duet(&["up", one.folder.path().to_str().unwrap()]);
    assert!(!again.status.success());
    let said = text(&again.stderr);
    assert!(said.contains("in use by `duet up`") && said.contains("--state"), "{said}");

    let port = |up: &Up| up.replica("web-1")["app"]["port"].clone();
    let (before, pid) = (port(&one), one.replica("web-1")["app"]["pid"].as_u64().unwrap());
    send(u32::try_from(pid).unwrap(), Signal::KILL);
    eventually("the crashed service is back", SOON, || async {
        let replica = one.replica("web-1");
        let now = replica["app"]["pid"].as_u64().unwrap();
        (now != pid && now != 0 && replica["app"]["restarts"] == 1).then_some(())
    })
    .await;
    assert_eq!(port(&one), before, "on the same port");
    assert_eq!(one.stop(), Some(0));
}

#[tokio::test]
async fn run_puts_a_sidecar_beside_one_process_and_passes_its_exit_code_on() {
    let (Some(curl), up) =
        (tools::find("curl"), Up::start(tempfile::tempdir().unwrap(), &web()).await)
    else {
        return;
    };
    let mesh = up.state_folder();
    let mesh = mesh.to_str().unwrap();
    // A pure client: it calls the mesh by its environment, and its exit code is curl's.
    let call = |url: &str| {
        let mut command = Command::new(program("duet"));
        command.args(["run", "--mesh", mesh, "--service", "client", "--"]);
        command.arg(&curl).args(["--silent", "--show-error", "--fail", "--retry", "20"]);
        command.args(["--retry-all-errors", "--retry-delay", "0", "--max-time", "20", url]);
        command.env_remove("NO_PROXY").env_remove("no_proxy").output().unwrap()
    };
    let output = call("http://web/healthz");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = duet(&["run", "--mesh", mesh, "--service", "client", "--", "sh", "-c", "exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    // What Dapr's SDKs look for besides the sidecar's ports.
    let told = |more: &[&str]| {
        let run = [&["run", "--mesh", mesh, "--service", "client"], more, &["--", "env"]].concat();
        let mut command = Command::new(program("duet"));
        command.args(run).env_remove("PORT").env_remove("APP_PORT");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let told = text(&output.stdout);
        let of =
            |name: &str| told.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
        (of("APP_ID="), of("APP_PORT="), of("PORT="))
    };
    let id = Some("client".to_owned());
    assert_eq!(told(&[]), (id.clone(), None, None));
    // An argument counts over the environment.
    let mut topics = Command::new(program("duet"));
    topics.args(["events", "topics", "--mesh", mesh]).env("DUET_OPERATOR", "http://127.0.0.1:1");
    let output = topics.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    // A sidecar is found by the name that `duet up` prints.
    let outbox =
        |replica| duet(&["events", "outbox", "list", "--mesh", mesh, "--sidecar", replica]);
    let output = outbox("web-1");
    assert!(output.status.success() && text(&output.stdout).starts_with("TOPIC"), "{output:?}");
    let output = outbox("web-9");
    assert!(text(&output.stderr).contains("no replica \"web-9\"; known are web-1"), "{output:?}");
    let port = free_port().to_string();
    assert_eq!(told(&["--port", &port]), (id, Some(port.clone()), Some(port)));

    // A service: reachable by its name from the mesh.
    let port = free_port().to_string();
    let mut command = Command::new(program("duet"));
    command.args(["run", "--mesh", mesh, "--service", "beside", "--port", &port, "--"]);
    command.arg(program("shop")).arg("notifications").env("PORT", &port);
    let _beside = Process::start("beside", command, up.folder.path());
    let outbound = up.replica("web-1")["sidecar"]["outbound"].as_str().unwrap().parse().unwrap();
    eventually("the process is callable through the mesh", SOON, || async {
        (http::get(outbound, "beside", "/healthz").await.status() == 200).then_some(())
    })
    .await;
}

#[test]
fn mistakes_are_named_with_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name)
    };
    let up = |yaml: &str| {
        file("duet.yaml", yaml);
        let output = duet(&["up", folder.path().to_str().unwrap()]);
        assert!(!output.status.success());
        text(&output.stderr)
    };
    let unknown = up("apps:\n  web:\n    command: x\n    portt: 1\n");
    assert!(unknown.contains("duet.yaml:4:") && unknown.contains("portt"), "{unknown}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let said = up(&format!("apps:\n  web: {{command: x, port: {port}}}\n"));
    assert!(said.contains(&format!("{port} is taken")), "{said}");
    let said = duet(&["up", "/nonexistent"]);
    assert!(text(&said.stderr).contains("duet.yaml"), "{}", text(&said.stderr));

    let policy = file(
        "policy.yaml",
        "apiVersion: duet.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: a}\nspec:\n  targetRefs: [{kind: Service, name: a}]\n  timeouts: {request: soon}\n",
    );
    let check = duet(&["check", policy.to_str().unwrap()]);
    assert_eq!(check.status.code(), Some(1));
    let said = text(&check.stdout);
    assert!(
        said.contains("policy.yaml:6:14: spec.timeouts.request") || said.contains("policy.yaml:6:"),
        "{said}"
    );
    let shop = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/shop");
    for path in [shop.join("mesh"), shop] {
        let check = duet(&["check", path.to_str().unwrap()]);
        let said = text(&check.stdout);
        assert!(check.status.success() && said.contains("0 warnings"), "{said}");
    }
}

/// Whoever copies a folder of Dapr over learns what it does not do, from whatever reads it.
#[tokio::test]
async fn resources_of_dapr_are_named_with_what_to_write_instead() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = folder.path().join("mesh");
    std::fs::create_dir(&mesh).unwrap();
    let subscription = "apiVersion: dapr.io/v2alpha1
kind: Subscription
metadata: {name: order}
spec: {pubsubname: default, topic: orders, routes: {default: /orders}}
scopes: [web]
";
    std::fs::write(mesh.join("dapr.yaml"), subscription).unwrap();
    let check = |more: &[&str]| {
        let check = duet(&[&["check", mesh.to_str().unwrap()], more].concat());
        assert!(check.status.success(), "{}", text(&check.stderr));
        text(&check.stdout)
    };
    let said = check(&[]);
    let instead = "dapr.yaml:2:7: kind: a Subscription of Dapr is not read; ";
    assert!(said.starts_with("warning: ") && said.contains(instead), "{said}");
    assert!(said.ends_with("0 resources, 0 errors, 1 warnings\n"), "{said}");
    let json: serde_json::Value = serde_json::from_str(&check(&["--json"])).unwrap();
    let finding = &json["findings"][0];
    assert_eq!((&finding["severity"], &finding["line"]), (&"warning".into(), &2.into()), "{json}");

    // With what it says instead, the subscription is there.
    let message = finding["message"].as_str().unwrap();
    let (start, end) = (message.find('{').unwrap(), message.rfind('}').unwrap());
    std::fs::write(mesh.join("mine.yaml"), &message[start..=end]).unwrap();
    let up = Up::start(folder, &format!("{}resources: [mesh]\n", web())).await;
    let log = up.process.log();
    let told = |by: &str| log.lines().any(|line| line.contains(by) && line.contains(instead));
    assert!(told("duet: warning: ") && told("control-plane "), "{log}");
    let state = up.state_folder();
    let listed = duet(&["events", "subscriptions", "--mesh", state.to_str().unwrap()]);
    let listed = text(&listed.stdout);
    let there = |line: &str| line.split_whitespace().take(2).eq(["default/order", "orders"]);
    assert!(listed.lines().any(there), "{listed}");
}

#[test]
fn help_version_and_completion_are_there() {
    for command in ["up", "run", "control-plane", "proxy", "check", "explain", "token"] {
        let help = duet(&[command, "--help"]);
        assert!(help.status.success() && text(&help.stdout).contains("Example"), "{command}");
    }
    assert!(text(&duet(&["version"]).stdout).starts_with("duet 0."));
    assert!(text(&duet(&["completion", "bash"]).stdout).contains("_duet"));
}
