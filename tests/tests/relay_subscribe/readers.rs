//! Readers of server-sent events: one that does not read, and where each starts.

use std::collections::BTreeSet;

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::nats::Backend;
use duet_tests::{SOON, http, on_both_buses};
use futures::StreamExt as _;
use serde_json::{Value, json};

use super::{publish, subscription};

on_both_buses!(a_reader_starts_where_it_says_and_resumes_where_it_was);

/// The data of the first events of a stream, with their ids.
async fn first_events(url: &str, last: Option<&str>, count: usize) -> Vec<(String, u64)> {
    let mut request = http::client().get(url);
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200, "{url}");
    events(answer, count).await
}

/// Reads until that many different events have come.
async fn events(answer: reqwest::Response, count: usize) -> Vec<(String, u64)> {
    let mut stream = answer.bytes_stream();
    let (mut text, mut found) = (String::new(), Vec::new());
    let mut ids = BTreeSet::new();
    while ids.len() < count {
        let piece = tokio::time::timeout(SOON, stream.next()).await.expect("in time");
        text.push_str(std::str::from_utf8(&piece.expect("the stream goes on").unwrap()).unwrap());
        while let Some(end) = text.find("\n\n") {
            let frame: String = text.drain(..end + 2).collect();
            let field = |name| frame.lines().find_map(|line| line.strip_prefix(name));
            if let (Some(id), Some(data)) = (field("id: "), field("data: ")) {
                let event: Value = serde_json::from_str(data).unwrap();
                let data = &event["data"];
                let number = data.as_u64().or_else(|| data["number"].as_u64());
                ids.insert(id.to_owned());
                found.push((id.to_owned(), number.unwrap()));
            }
        }
    }
    found
}

#[tokio::test]
async fn a_reader_that_stalls_holds_up_nobody_and_misses_nothing() {
    const EVENTS: u32 = 400;
    let mut control_plane = ControlPlane::start(&[]).await;
    let client = Sidecar::ready(&control_plane, Options::client("page")).await;
    let api = client.ports.api;
    let url = format!("http://{api}/v1.0/subscribe/default/wide");
    // More altogether than what lies between a sidecar and a reader that does not read.
    let publish = async |number: u32| {
        let event = json!({
            "specversion": "1.0", "id": number.to_string(), "source": "/test", "type": "t",
            "data": {"number": number, "pad": "x".repeat(60_000)},
        });
        let request = http::client().post(format!("http://{api}/v1.0/publish/default/wide"));
        let request = request.header("content-type", "application/cloudevents+json");
        assert_eq!(request.body(event.to_string()).send().await.unwrap().status(), 204);
    };
    let open = async || http::client().get(&url).send().await.unwrap();
    let (stalled, lively) = (open().await, open().await);
    let lively = tokio::spawn(events(lively, EVENTS as usize));
    for number in 0..EVENTS / 2 {
        publish(number).await;
    }
    control_plane.restart().await;
    for number in EVENTS / 2..EVENTS {
        publish(number).await;
    }
    // What was taken just before the control plane died comes again, with the same id.
    let numbers = |found: Vec<(String, u64)>| {
        let mut seen = BTreeSet::new();
        let first = found.into_iter().map(|(_, number)| number).filter(|n| seen.insert(*n));
        first.collect::<Vec<_>>()
    };
    let all: Vec<u64> = (0..EVENTS.into()).collect();
    assert_eq!(numbers(lively.await.unwrap()), all);
    assert_eq!(numbers(events(stalled, EVENTS as usize).await), all);
}

async fn a_reader_starts_where_it_says_and_resumes_where_it_was(backend: &Backend) {
    let resources = subscription("") + &backend.yaml();
    let control_plane = ControlPlane::start(&[("news.yaml", &resources)]).await;
    let client = Sidecar::ready(&control_plane, Options::client("page")).await;
    let api = client.ports.api;
    for number in 0..6 {
        let kind = if number % 2 == 0 { "even" } else { "odd" };
        assert_eq!(publish(api, "news", kind, number).await.status(), 204);
    }
    let url = format!("http://{api}/v1.0/subscribe/default/news");
    let all = first_events(&format!("{url}?start=earliest"), None, 6).await;
    let numbers: Vec<u64> = all.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5]);
    let seen = all[2].0.as_str();
    let rest = first_events(&format!("{url}?start=earliest"), Some(seen), 3).await;
    assert_eq!(rest, all[3..]);
    let from = first_events(&format!("{url}?start={}", all[4].0), None, 2).await;
    assert_eq!(from, all[4..]);
    let filter = "start=1970-01-01T00:00:00Z&filter=event.type%20%3D%3D%20%22odd%22";
    let odd = first_events(&format!("{url}?{filter}"), None, 3).await;
    assert_eq!(odd.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [1, 3, 5]);
    let bad = http::client().get(format!("{url}?filter=%29")).send().await.unwrap();
    assert!(bad.status().is_client_error(), "{}", bad.status());
}
