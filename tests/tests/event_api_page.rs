//! docs/event-api.md, run: its resources are the mesh's, its commands are run in their order, and what the application is
//! sent is what the page says. `DUET_UPDATE_DOCS=1` writes the page anew.

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

use std::io::ErrorKind::WouldBlock;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use duet_tests::app::{App, Asked, Reply};
use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, eventually, http, tools};
use futures::StreamExt as _;
use regex::Regex;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

/// What the page leaves to the reader: the service of its application.
const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: shop}
spec: {ports: [{port: 80, targetPort: http}]}
";

/// As the page has the sidecar.
const SIDECAR: &str = "http://127.0.0.1:3500";
/// JSON that is longer is broken into lines.
const MAX_COLUMNS: usize = 110;

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/event-api.md")
}

/// The blocks of a page in this language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    let blocks = text.split(&fence).skip(1).filter_map(|rest| rest.split_once("```"));
    blocks.map(|(block, _)| block.to_owned()).collect()
}

/// A block's command, as the page has it, up to the end of its quotes and continued lines.
fn command(block: &str) -> String {
    let mut command = String::new();
    for line in block.lines() {
        command.push_str(line);
        command.push('\n');
        let open = command.matches('\'').count() % 2 == 1;
        if !open && !line.ends_with('\\') {
            break;
        }
    }
    command
}

/// What is another one each time is an example instead, and long JSON is broken into lines.
fn tidy(text: &str) -> String {
    let ids = Regex::new("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").unwrap();
    let times = Regex::new(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z").unwrap();
    let text = ids.replace_all(text, "0b2e9a4c-6f6a-4c44-9d0e-3f8a53d4a1c7");
    let text = times.replace_all(&text, "2026-01-31T12:00:00Z");
    let mut tidy = String::new();
    for line in text.lines() {
        let left_out = ["date: ", "content-length: "].iter().any(|name| line.starts_with(name));
        if left_out {
            continue;
        }
        let broken = (line.len() > MAX_COLUMNS).then(|| serde_json::from_str::<Value>(line).ok());
        match broken.flatten() {
            Some(json) => tidy.push_str(&format!("{json:#}")),
            None => tidy.push_str(line),
        }
        tidy.push('\n');
    }
    // The end of a head without a body.
    tidy.trim_end().to_owned() + "\n"
}

/// A request as the application got it; of its headers those that are about the event.
fn delivered(asked: &Asked) -> String {
    let mut text = format!("{} {}\n", asked.method, asked.path);
    for name in ["content-type", "duet-delivery", "duet-delivery-attempt"] {
        if let Some(value) = asked.headers.get(name) {
            text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
        }
    }
    text.push_str(&format!("\n{}\n", String::from_utf8_lossy(&asked.body)));
    tidy(&text)
}

/// The application of the page.
async fn application(subscriptions: String) -> App {
    App::replying(move |asked| match asked.path.as_str() {
        "/dapr/subscribe" => Reply::new(200, &subscriptions),
        "/events/reports" => Reply::new(200, "").after(Duration::from_secs(600)),
        "/events/clicks" => {
            let entries = asked.json()["entries"].as_array().unwrap().clone();
            let done = |entry: &Value| json!({"entryId": entry["entryId"], "status": "SUCCESS"});
            let statuses: Vec<Value> = entries.iter().map(done).collect();
            Reply::new(200, &json!({ "statuses": statuses }).to_string())
        }
        "/events/orders" if asked.json()["id"] == "14" => Reply::new(200, "{\"status\": \"DROP\"}"),
        _ => Reply::new(200, ""),
    })
    .await
}

/// Waits until every subscription is there, the application's own too, and consumed.
async fn subscribed(control_plane: &ControlPlane, count: usize) {
    let url = format!("http://{}/v1/subscriptions", control_plane.operator);
    let url = url.as_str();
    eventually("the application is subscribed", SOON, || async move {
        let answer = http::client().get(url).header("duet-operator", "1").send().await.ok()?;
        let answer: Value = answer.json().await.ok()?;
        let all = answer["subscriptions"].as_array()?;
        let consumed = all.iter().all(|subscription| subscription["consumers"] == 1);
        (all.len() == count && consumed).then_some(())
    })
    .await;
}

/// The name of a delivery that the application works on.
async fn open_delivery(app: &App, api: &str) -> String {
    let url = format!("{api}/v1.0/publish/default/reports");
    assert_eq!(http::client().post(url).body("long").send().await.unwrap().status(), 204);
    eventually("a report is in work", SOON, || async {
        let asked = app.asked().into_iter().find(|asked| asked.path == "/events/reports")?;
        Some(asked.header("duet-delivery").to_owned())
    })
    .await
}

/// A publish whose last byte does not come.
async fn endless(api: SocketAddr) -> TcpStream {
    const LENGTH: usize = 4 << 20;
    let mut stream = TcpStream::connect(api).await.unwrap();
    let head = format!(
        "POST /v1.0/publish/default/large HTTP/1.1\r\nhost: localhost\r\ncontent-length: {LENGTH}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // One that is refused is closed before its end.
    stream.write_all(&vec![b'x'; LENGTH - 1]).await.ok();
    stream
}

/// As many of them as take all that a sidecar has for publishes.
async fn fill(api: SocketAddr) -> Vec<TcpStream> {
    let mut streams: Vec<TcpStream> =
        futures::stream::iter(0..16).then(|_number| endless(api)).collect().await;
    let started = Instant::now();
    while publish(api).await != 429 {
        assert!(started.elapsed() < SOON, "the sidecar always has room");
        // One that met with a publish of ours has been refused itself.
        for stream in &mut streams {
            let silent = stream.try_read(&mut [0]).is_err_and(|error| error.kind() == WouldBlock);
            if !silent {
                *stream = endless(api).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    streams
}

/// The answer to a small publish.
async fn publish(api: SocketAddr) -> u16 {
    let request = http::client().post(format!("http://{api}/v1.0/publish/default/small"));
    request.body("twenty bytes or more").send().await.unwrap().status().as_u16()
}

async fn run(command: &str, api: &str, delivery: &str) -> String {
    let script = command.strip_prefix("$ ").expect("commands begin with $");
    let output = tokio::process::Command::new("bash")
        .args(["-c", &script.replace(SIDECAR, api)])
        .env("DUET_DELIVERY", delivery)
        .env("NO_PROXY", "*")
        .output()
        .await
        .unwrap();
    assert!(output.stderr.is_empty(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What was delivered to the path of a request of the page: the same, else, after a while, the first.
async fn request(app: &App, block: &str, update: bool) -> String {
    let head = block.lines().next().unwrap();
    let patience = if update { Duration::ZERO } else { Duration::from_secs(10) };
    let started = Instant::now();
    eventually(&format!("the application is sent {head}"), SOON, || async {
        let all: Vec<String> = app.asked().iter().map(delivered).collect();
        let mut here = all.iter().filter(|now| now.lines().next() == Some(head));
        let first = here.clone().next()?;
        let same = here.find(|now| now.trim_end() == block.trim_end());
        same.or(Some(first).filter(|_| started.elapsed() > patience)).cloned()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_is_what_happens() {
    let Some(_curl) = tools::find("curl") else { return };
    let update = std::env::var_os("DUET_UPDATE_DOCS").is_some();
    let text = std::fs::read_to_string(page()).unwrap();
    let resources = blocks(&text, "yaml");
    let programmatic = blocks(&text, "json").remove(0);
    let own: Value = serde_json::from_str(&programmatic).unwrap();
    let yaml = format!("{SERVICE}---\n{}", resources.join("---\n"));
    let control_plane = ControlPlane::start(&[("shop.yaml", &yaml)]).await;
    let app = application(programmatic).await;
    let options = Options::service("inventory", app.port()).namespace("shop");
    let sidecar = Sidecar::ready(&control_plane, options).await;
    let api = format!("http://{}", sidecar.ports.api);
    let declared = resources.iter().filter(|yaml| yaml.contains("kind: Subscription")).count();
    subscribed(&control_plane, declared + own.as_array().unwrap().len()).await;
    let delivery = open_delivery(&app, &api).await;

    let (mut now, mut differences, mut commands, mut requests) = (String::new(), vec![], 0, 0);
    let mut rest = text.as_str();
    while let Some((before, language, block, after)) = next_block(rest) {
        now.push_str(before);
        let is = match language {
            "console" => {
                commands += 1;
                let command = command(block);
                let full = command.contains("64 MiB");
                let others = if full { fill(sidecar.ports.api).await } else { vec![] };
                let output = run(&command, &api, &delivery).await;
                drop(others);
                if full {
                    let room = || async { (publish(sidecar.ports.api).await == 204).then_some(()) };
                    eventually("there is room again", SOON, room).await;
                }
                assert!(!output.is_empty(), "{command}says nothing");
                format!("{command}{}", tidy(&output))
            }
            "http" => {
                requests += 1;
                request(&app, block, update).await
            }
            _ => block.to_owned(),
        };
        if is.trim_end() != block.trim_end() {
            differences.push(format!("the page says\n{block}\nit is\n{is}"));
        }
        now.push_str(&is);
        now.push_str("```");
        rest = after;
    }
    now.push_str(rest);
    assert!(commands >= 12 && requests >= 5, "{commands} commands and {requests} requests only");
    // Published twice, and before others that have arrived.
    let orders = app.asked().into_iter().filter(|asked| asked.path == "/events/orders");
    assert_eq!(orders.filter(|asked| asked.json()["id"] == "12").count(), 1);
    if update {
        std::fs::write(page(), now).unwrap();
        return;
    }
    let how = "DUET_UPDATE_DOCS=1 writes docs/event-api.md anew";
    assert!(differences.is_empty(), "{how}\n{}", differences.join("\n\n"));
}

/// Text up to the inside of the next block, its language, the block, and the rest after its closing fence.
fn next_block(text: &str) -> Option<(&str, &str, &str, &str)> {
    let (_, opened) = text.split_once("```")?;
    let (language, inside) = opened.split_once('\n')?;
    let (block, after) = inside.split_once("```")?;
    let before = &text[..text.len() - inside.len()];
    Some((before, language, block, after))
}
