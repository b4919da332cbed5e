//! The documentation, held to what is true: links lead somewhere, YAML parses, metrics are those that there are.

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

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use duet_tests::app::App;
use duet_tests::http;
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::process::program;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every page: path below the repository, and text.
fn pages() -> Vec<(PathBuf, String)> {
    let folders = ["", "docs", "k8s", "events", "examples/shop"];
    let files = folders.iter().flat_map(|folder| std::fs::read_dir(root().join(folder)).unwrap());
    let files = files.map(|entry| entry.unwrap().path());
    let pages = files.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn every_relative_link_leads_somewhere() {
    let mut links = 0;
    for (page, text) in pages() {
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = page.parent().unwrap().join(target);
            assert!(path.exists(), "{}: {target} does not exist", page.display());
            links += 1;
        }
    }
    assert!(links >= 10, "{links} links only");
}

#[test]
fn every_resource_in_the_pages_parses() {
    let mut resources = 0;
    for (page, text) in pages() {
        for block in text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            if !block.contains("apiVersion") {
                continue;
            }
            let parsed = duet_api::resource::parse(&page.display().to_string(), block);
            assert!(parsed.errors.is_empty(), "{:?}\n{block}", parsed.errors);
            resources += parsed.resources.len();
        }
    }
    assert!(resources >= 8, "{resources} resources only");
}

#[test]
fn every_flag_in_the_readme_exists() {
    let help: String = ["control-plane", "proxy", "up", "run", "check", "explain", "token create"]
        .iter()
        .map(|command| {
            let mut arguments: Vec<&str> = command.split(' ').collect();
            arguments.push("--help");
            let output = Command::new(program("duet")).args(arguments).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        })
        .collect();
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    for line in text.lines().filter(|line| line.trim_start().starts_with("duet ")) {
        for flag in line.split_whitespace().take_while(|word| *word != "--") {
            if flag.starts_with("--") {
                assert!(help.contains(flag), "{flag} in {line:?}");
            }
        }
    }
}

/// The words of a command line, with single quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for (number, part) in line.split('\'').enumerate() {
        let quoted = number % 2 == 1;
        for (number, piece) in part.split(if quoted { '\'' } else { ' ' }).enumerate() {
            if number > 0 {
                words.push(String::new());
            }
            words.last_mut().unwrap().push_str(piece);
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Every example of `duet explain` prints what the page says. `DUET_UPDATE_DOCS=1` writes the page anew.
#[test]
fn explained_calls_are_those_of_the_page() {
    let page = root().join("docs/explain.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let update = std::env::var_os("DUET_UPDATE_DOCS").is_some();
    let mut examples = 0;
    let current: Vec<String> = text
        .split("```console\n")
        .enumerate()
        .map(|(number, part)| {
            let Some((block, rest)) = part.split_once("```").filter(|_| number > 0) else {
                return part.to_owned();
            };
            examples += 1;
            let command = block.lines().next().unwrap();
            let arguments = words(command.strip_prefix("$ duet ").unwrap());
            let mut duet = Command::new(program("duet"));
            let output = duet.args(arguments).current_dir(root()).output().unwrap();
            assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            let now = format!("{command}\n{}", String::from_utf8(output.stdout).unwrap());
            assert!(
                update || block == now,
                "DUET_UPDATE_DOCS=1 writes docs/explain.md anew; it says\n{block}\nnow it is\n{now}"
            );
            format!("{now}```{rest}")
        })
        .collect();
    let current = current.join("```console\n");
    assert!(examples >= 5, "{examples} examples only");
    if update {
        std::fs::write(page, current).unwrap();
    }
}

/// Names of metric families.
fn families(metrics: &str) -> BTreeSet<String> {
    let types = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names = types.filter_map(|line| line.split(' ').next());
    names.filter(|name| name.starts_with("duet_")).map(str::to_owned).collect()
}

/// Every text in a piece of code, with what is before it.
fn texts(code: &str) -> impl Iterator<Item = (&str, &str)> {
    let pieces: Vec<&str> = code.split('"').collect();
    let pairs: Vec<_> = pieces.windows(2).map(|pair| (pair[0], pair[1])).collect();
    pairs.into_iter()
}

/// Names of metric families in the code below a folder, whether or not they have a sample. The control plane's
/// registration adds `duet_` to what it is given.
fn families_in_code(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            families_in_code(&path, found);
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let registers = ["gauge(", "gauges(", "counter(", "counters("];
        let adds = path.ends_with("control-plane/src/telemetry.rs");
        let name = |text: &str| {
            text.contains('_') && text.bytes().all(|b| b == b'_' || b.is_ascii_lowercase())
        };
        for (before, text) in texts(&std::fs::read_to_string(&path).unwrap()) {
            let before = before.trim_end();
            if !name(text) || text.ends_with('_') {
                continue;
            }
            if text.starts_with("duet_") {
                found.insert(text.to_owned());
            } else if adds && registers.iter().any(|call| before.ends_with(call)) {
                found.insert(format!("duet_{text}"));
            }
        }
    }
}

#[test]
fn the_metrics_page_names_every_metric_that_there_may_be_and_no_other() {
    let mut found = BTreeSet::new();
    for folder in ["control-plane", "events", "proxy", "tables"] {
        families_in_code(&root().join(folder).join("src"), &mut found);
    }
    assert!(found.len() > 60, "{found:?}");
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let named: BTreeSet<String> =
        rows.filter_map(|row| row.split('`').next()).map(str::to_owned).collect();
    let (missing, gone): (Vec<_>, Vec<_>) =
        (found.difference(&named).collect(), named.difference(&found).collect());
    assert!(missing.is_empty(), "docs/metrics.md does not name {missing:?}");
    assert!(gone.is_empty(), "docs/metrics.md names {gone:?}, which nothing registers");
    // An alert on a metric that is gone is silent for ever.
    let alerts = std::fs::read_to_string(root().join("k8s/monitoring/alerts.yml")).unwrap();
    let words = alerts.split(|c: char| c != '_' && !c.is_ascii_lowercase());
    let alerted: Vec<&str> = words.filter(|word| word.starts_with("duet_")).collect();
    assert!(alerted.len() > 10, "{alerted:?}");
    for name in alerted {
        assert!(found.contains(name), "k8s/monitoring/alerts.yml: nothing registers {name}");
    }
}

#[tokio::test]
async fn the_metrics_page_names_every_metric() {
    let subscription = "apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: read}
spec: {topic: news, subscriber: {service: web, path: /news}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80, targetPort: http}]}
";
    let control_plane = ControlPlane::start(&[("web.yaml", subscription)]).await;
    let app = App::echo("web").await;
    let server = Sidecar::ready(&control_plane, Options::service("web", app.port())).await;
    http::get(server.ports.outbound, "web", "/").await;
    let publish = format!("http://{}/v1.0/publish/default/news", server.ports.api);
    assert_eq!(http::client().post(publish).body("x").send().await.unwrap().status(), 204);
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let mut found = BTreeSet::new();
    for address in [server.ports.metrics, control_plane.admin] {
        found.extend(families(&http::text(address, "/metrics").await));
    }
    assert!(found.len() > 30, "{found:?}");
    let missing: Vec<&String> =
        found.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/metrics.md does not name {missing:?}");
    for name in &found {
        let ends = ["_total", "_seconds", "_info", "_bytes"];
        let unit = ends.iter().any(|end| name.ends_with(end)) || name.ends_with('s');
        assert!(unit, "{name} ends in no unit");
    }
}
