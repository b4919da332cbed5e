//! Publishers that wait for every acknowledgement.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use duet_api::dapr::runtime::v1::PublishEventRequest;
use duet_api::dapr::runtime::v1::dapr_client::DaprClient;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

/// How much.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) topic: String,
    pub(crate) in_flight: usize,
    pub(crate) batch: usize,
    pub(crate) size: usize,
    pub(crate) time: Duration,
}

pub(crate) async fn run(to: &str, load: Load) -> anyhow::Result<()> {
    let started = Instant::now();
    let until = started + load.time;
    let mut publishers = JoinSet::new();
    if to.starts_with("nats://") {
        let client = async_nats::connect(to).await.context("connect to NATS")?;
        let stream = async_nats::jetstream::new(client);
        for _ in 0..load.in_flight {
            publishers.spawn(to_jetstream(stream.clone(), load.clone(), until));
        }
    } else if let Some(authority) = to.strip_prefix("grpc://") {
        let endpoint = Endpoint::try_from(format!("http://{authority}"))?;
        let channel = endpoint.connect().await.context("connect to the sidecar")?;
        let client = DaprClient::new(channel);
        for _ in 0..load.in_flight {
            publishers.spawn(over_grpc(client.clone(), load.clone(), until));
        }
    } else {
        for number in 0..load.in_flight.div_ceil(load.batch) {
            let sidecar = Sidecar::connect(to).await?;
            publishers.spawn(to_sidecar(sidecar, number, load.clone(), until));
        }
    }
    let mut took = Vec::new();
    while let Some(times) = publishers.join_next().await {
        took.extend(times??);
    }
    let events = took.len() * load.batch;
    let seconds = started.elapsed().as_secs_f64();
    let times = percentiles(took);
    println(
        &serde_json::json!({"per_second": events as f64 / seconds, "events": events, "ms": times}),
    )
}

pub(crate) async fn make_stream(to: &str, name: String, subject: String) -> anyhow::Result<()> {
    let context = async_nats::jetstream::new(async_nats::connect(to).await?);
    let config = async_nats::jetstream::stream::Config {
        name,
        subjects: vec![subject],
        ..async_nats::jetstream::stream::Config::default()
    };
    context.create_stream(config).await?;
    Ok(())
}

async fn to_jetstream(
    stream: async_nats::jetstream::Context,
    load: Load,
    until: Instant,
) -> anyhow::Result<Vec<Duration>> {
    let payload = Bytes::from(vec![b'x'; load.size]);
    let mut took = Vec::new();
    while Instant::now() < until {
        let started = Instant::now();
        stream.publish(load.topic.clone(), payload.clone()).await?.await?;
        took.push(started.elapsed());
    }
    Ok(took)
}

/// All publishers share one connection, as with Dapr's SDKs.
async fn over_grpc(
    mut client: DaprClient<Channel>,
    load: Load,
    until: Instant,
) -> anyhow::Result<Vec<Duration>> {
    let mut took = Vec::new();
    let data = Bytes::from(vec![b'x'; load.size]);
    while Instant::now() < until {
        let started = Instant::now();
        let request = PublishEventRequest {
            pubsub_name: "default".to_owned(),
            topic: load.topic.clone(),
            data: data.clone(),
            data_content_type: "text/plain".to_owned(),
            ..PublishEventRequest::default()
        };
        client.publish_event(request).await?;
        took.push(started.elapsed());
    }
    Ok(took)
}

async fn to_sidecar(
    mut sidecar: Sidecar,
    publisher: usize,
    load: Load,
    until: Instant,
) -> anyhow::Result<Vec<Duration>> {
    let mut took = Vec::new();
    let data = "x".repeat(load.size);
    let path = format!("/v1.0/publish/default/{}", load.topic);
    // Another run of this program publishes other events.
    let run = std::process::id();
    let mut number = 0_u64;
    while Instant::now() < until {
        let started = Instant::now();
        let (content_type, body) = if load.batch == 1 {
            ("text/plain", data.clone())
        } else {
            let mut body = "[".to_owned();
            for at in 0..load.batch {
                let comma = if at == 0 { "" } else { "," };
                write!(
                    body,
                    r#"{comma}{{"specversion":"1.0","id":"{run}-{publisher}-{number}-{at}","source":"/bench","type":"t","datacontenttype":"text/plain","data":"{data}"}}"#
                )?;
            }
            body.push(']');
            ("application/cloudevents-batch+json", body)
        };
        sidecar.post(&path, content_type, body).await?;
        number += 1;
        took.push(started.elapsed());
    }
    Ok(took)
}

/// One connection to a sidecar's API.
pub(crate) struct Sidecar {
    sender: SendRequest<Full<Bytes>>,
    authority: String,
}

impl Sidecar {
    pub(crate) async fn connect(api: &str) -> anyhow::Result<Self> {
        let authority = api.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let stream = TcpStream::connect(&authority).await.context("connect to the sidecar")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, authority })
    }

    /// Posts, and is content with 204 only.
    pub(crate) async fn post(
        &mut self,
        path: &str,
        content_type: &str,
        body: impl Into<Bytes>,
    ) -> anyhow::Result<()> {
        let request = Request::post(path)
            .header("host", &self.authority)
            .header("content-type", content_type)
            .body(Full::new(body.into()))?;
        self.sender.ready().await?;
        let answer = self.sender.send_request(request).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        ensure!(status == StatusCode::NO_CONTENT, "{status}: {}", String::from_utf8_lossy(&body));
        Ok(())
    }
}

/// Milliseconds at p50, p99 and p99.9, and the longest.
pub(crate) fn percentiles(mut took: Vec<Duration>) -> serde_json::Value {
    took.sort_unstable();
    let at = |per_mille: usize| {
        let index = took.len() * per_mille / 1000;
        let time = took.get(index.min(took.len().saturating_sub(1)));
        time.copied().unwrap_or_default().as_secs_f64() * 1000.0
    };
    serde_json::json!({"p50": at(500), "p99": at(990), "p99.9": at(999), "max": at(1000)})
}

pub(crate) fn println(value: &serde_json::Value) -> anyhow::Result<()> {
    use std::io::Write as _;
    writeln!(std::io::stdout(), "{value}")?;
    Ok(())
}
