//! From publishing an event until an application has it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::consumer::{DeliverPolicy, PullConsumer, pull};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at, timeout};

use crate::publish::{Sidecar, percentiles, println};

/// Publishers that share the rate, so that one slow acknowledgement does not hold up the next event.
const PUBLISHERS: u32 = 16;
/// How long the last events may take.
const TAIL: Duration = Duration::from_secs(10);
/// Subscriptions and connections come up first.
const WARM_UP: Duration = Duration::from_secs(30);

/// How much.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) topic: String,
    pub(crate) rate: u32,
    pub(crate) size: usize,
    pub(crate) time: Duration,
}

/// When an event was published, as its data says: nanoseconds since the start of this process.
#[derive(Clone)]
struct Arrivals {
    start: Instant,
    sender: mpsc::UnboundedSender<(u64, Instant)>,
}

impl Arrivals {
    /// Data starts with the publishing time as decimal digits and a space.
    fn note(&self, data: &str) {
        let arrived = Instant::now();
        let number = data.split(' ').next().and_then(|number| number.parse().ok());
        if let Some(nanos) = number {
            // The receiver ends with the measurement.
            self.sender.send((nanos, arrived)).unwrap_or_default();
        }
    }

    fn data(&self, size: usize) -> String {
        let nanos = self.start.elapsed().as_nanos();
        format!("{nanos:<size$}")
    }
}

pub(crate) async fn run(to: &str, listen: Option<SocketAddr>, load: Load) -> anyhow::Result<()> {
    let (sender, mut arrived) = mpsc::unbounded_channel();
    let arrivals = Arrivals { start: Instant::now(), sender };
    let publisher = if to.starts_with("nats://") {
        subscribe_to_jetstream(to, &load.topic, arrivals.clone()).await?;
        Publisher::NatsClient(async_nats::connect(to).await?)
    } else {
        let listener = TcpListener::bind(listen.context("--listen is missing")?).await?;
        tokio::spawn(serve(listener, arrivals.clone()));
        Publisher::Sidecar(to.to_owned())
    };
    warm_up(&publisher, &arrivals, &load, &mut arrived).await?;
    let published = Arc::new(AtomicU64::new(0));
    let start = tokio::time::Instant::now();
    let mut publishers = JoinSet::new();
    for number in 0..PUBLISHERS {
        let (publisher, arrivals) = (publisher.clone(), arrivals.clone());
        // One after the other: together they would be a burst each time.
        let first = start + Duration::from_secs(1) * number / load.rate;
        let (load, published) = (load.clone(), Arc::clone(&published));
        publishers.spawn(publisher.publish(first, arrivals, load, published));
    }
    let mut took = Vec::new();
    let start = arrivals.start;
    let mut collect = async |count: Option<u64>| {
        while count.is_none_or(|count| (took.len() as u64) < count) {
            let Some((nanos, at)) = arrived.recv().await else { return };
            took.push(at.duration_since(start + Duration::from_nanos(nanos)));
        }
    };
    let all = async {
        while let Some(ended) = publishers.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        () = collect(None) => {}
        ended = all => ended?,
    }
    let count = published.load(Ordering::Relaxed);
    let complete = timeout(TAIL, collect(Some(count))).await.is_ok();
    ensure!(complete, "not all of {count} events arrived");
    println(&serde_json::json!({"events": count, "ms": percentiles(took)}))
}

/// Publishes until something arrives, and swallows what does.
async fn warm_up(
    publisher: &Publisher,
    arrivals: &Arrivals,
    load: &Load,
    arrived: &mut mpsc::UnboundedReceiver<(u64, Instant)>,
) -> anyhow::Result<()> {
    let until = Instant::now() + WARM_UP;
    loop {
        ensure!(Instant::now() < until, "nothing arrives");
        let mut one = load.clone();
        one.time = Duration::from_millis(200);
        // The sidecar may not be there yet.
        let now = tokio::time::Instant::now();
        let published = publisher.clone().publish(now, arrivals.clone(), one, Arc::default()).await;
        let first = timeout(Duration::from_millis(500), arrived.recv()).await;
        if published.is_ok() && first.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    while timeout(Duration::from_millis(500), arrived.recv()).await.is_ok() {}
    Ok(())
}

#[derive(Clone)]
enum Publisher {
    NatsClient(async_nats::Client),
    Sidecar(String),
}

impl Publisher {
    async fn publish(
        self,
        first: tokio::time::Instant,
        arrivals: Arrivals,
        load: Load,
        published: Arc<AtomicU64>,
    ) -> anyhow::Result<()> {
        let mut tick = interval_at(first, Duration::from_secs(1) * PUBLISHERS / load.rate);
        tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let until = Instant::now() + load.time;
        let path = format!("/v1.0/publish/default/{}", load.topic);
        let mut way = match &self {
            Self::NatsClient(client) => Way::JetStream(async_nats::jetstream::new(client.clone())),
            Self::Sidecar(api) => Way::Sidecar(Sidecar::connect(api).await?),
        };
        while Instant::now() < until {
            tick.tick().await;
            let data = arrivals.data(load.size);
            match &mut way {
                Way::JetStream(stream) => {
                    drop(stream.publish(load.topic.clone(), data.into()).await?.await?);
                }
                Way::Sidecar(sidecar) => sidecar.post(&path, "text/plain", data).await?,
            }
            published.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

enum Way {
    JetStream(async_nats::jetstream::Context),
    Sidecar(Sidecar),
}

/// As a NATS application does: a durable pull consumer, acknowledging every event.
async fn subscribe_to_jetstream(to: &str, topic: &str, arrivals: Arrivals) -> anyhow::Result<()> {
    let context = async_nats::jetstream::new(async_nats::connect(to).await?);
    let stream = context.stream_by_subject(topic.to_owned()).await?;
    let stream = context.get_stream(stream).await?;
    let config = pull::Config {
        durable_name: Some("bench".to_owned()),
        deliver_policy: DeliverPolicy::New,
        ..pull::Config::default()
    };
    let consumer: PullConsumer = stream.create_consumer(config).await?;
    let mut messages = consumer.messages().await?;
    tokio::spawn(async move {
        while let Some(Ok(message)) = messages.next().await {
            arrivals.note(&String::from_utf8_lossy(&message.payload));
            if message.ack().await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// The application that a sidecar delivers to.
async fn serve(listener: TcpListener, arrivals: Arrivals) {
    while let Ok((stream, _peer)) = listener.accept().await {
        stream.set_nodelay(true).unwrap_or_default();
        let arrivals = arrivals.clone();
        let service = service_fn(move |request| answer(request, arrivals.clone()));
        let connection = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection);
    }
}

async fn answer(
    request: Request<Incoming>,
    arrivals: Arrivals,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let known = request.uri().path() == "/bench";
    if let Ok(body) = request.into_body().collect().await
        && known
        && let Ok(event) = serde_json::from_slice::<serde_json::Value>(&body.to_bytes())
    {
        arrivals.note(event.get("data").and_then(serde_json::Value::as_str).unwrap_or_default());
    }
    let mut response = Response::new(Full::default());
    *response.status_mut() = if known { StatusCode::OK } else { StatusCode::NOT_FOUND };
    Ok(response)
}
