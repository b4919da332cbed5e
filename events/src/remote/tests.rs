//! Against a real gRPC server on loopback, which serves an embedded bus.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use duet_api::proto::event_bus_server::{EventBus as Service, EventBusServer};
use duet_api::proto::{
    self, ConsumeRequest, ConsumeResponse, PublishRequest, PublishResponse, consume_request,
    consume_response,
};
use futures::stream::{Stream, StreamExt};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::bus::ManagedBus as _;
use crate::bus::{Settle, Start};
use crate::embedded::EmbeddedBus;
use crate::log::LogOptions;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The least that a bus service can be.
struct TestService(Arc<EmbeddedBus>);

#[tonic::async_trait]
impl Service for TestService {
    type PublishStream = Answers<PublishResponse>;
    type ConsumeStream = Answers<ConsumeResponse>;

    async fn publish(
        &self,
        requests: Request<Streaming<PublishRequest>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        let bus = Arc::clone(&self.0);
        let answers = requests.into_inner().map(move |request| {
            let bus = Arc::clone(&bus);
            async move { Ok(answer(&bus, request?).await) }
        });
        Ok(Response::new(answers.buffer_unordered(64).boxed()))
    }

    async fn consume(
        &self,
        requests: Request<Streaming<ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let mut requests = requests.into_inner();
        let Some(ConsumeRequest { kind: Some(consume_request::Kind::Open(raw)) }) =
            requests.message().await?
        else {
            return Err(Status::invalid_argument("not opened"));
        };
        let spec = SubscriptionSpec::try_from(raw);
        let spec = spec.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut consumer = self.0.consume(spec).await.unwrap();
        let (sender, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            let opened = consume_response::Kind::Opened(proto::Opened {});
            let mut next = Some(opened);
            loop {
                if let Some(kind) = next.take()
                    && sender.send(Ok(ConsumeResponse { kind: Some(kind) })).await.is_err()
                {
                    return;
                }
                tokio::select! {
                    delivery = consumer.next() => {
                        let Some(Ok(delivery)) = delivery else { return };
                        next = Some(consume_response::Kind::Delivery(proto::Delivery {
                            delivery: delivery.id,
                            position: delivery.position,
                            attempt: delivery.attempt,
                            generation: delivery.generation,
                            event: Some(delivery.event.into()),
                            path: String::new(),
                        }));
                    }
                    request = requests.message() => match request {
                        Ok(Some(ConsumeRequest { kind: Some(consume_request::Kind::Settle(settle)) })) => {
                            let outcome = settle.outcome.unwrap().into();
                            consumer.settler().settle(settle.delivery, outcome);
                        }
                        Ok(Some(_)) => {}
                        Ok(None) | Err(_) => return,
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers).boxed()))
    }
}

async fn answer(bus: &EmbeddedBus, request: PublishRequest) -> PublishResponse {
    let events = request.events.decode().unwrap();
    let events: Result<Vec<Event>, _> = events.into_iter().map(Event::try_from).collect();
    let result = match events {
        _ if request.bus != "default" => {
            Err(PublishError::new(PublishErrorKind::UnknownBus, "no such bus"))
        }
        Err(error) => Err(PublishError::new(PublishErrorKind::Invalid, error.to_string())),
        Ok(events) => bus.publish(&request.topic, events).await,
    };
    let (events, error) = match result {
        Ok(published) => (published.into_iter().map(Into::into).collect(), None),
        Err(error) => (Vec::new(), Some(error.into())),
    };
    PublishResponse { correlation: request.correlation, events, error }
}

struct Fixture {
    _dir: TempDir,
    bus: Arc<EmbeddedBus>,
    address: SocketAddr,
    server: AbortHandle,
    channel: watch::Sender<Option<Channel>>,
}

impl Fixture {
    async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let registry = prometheus::Registry::new();
        let bus = EmbeddedBus::open("default", dir.path(), LogOptions::default(), &registry);
        let bus = Arc::new(bus.await.unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = serve(listener, Arc::clone(&bus));
        let (channel, _) = watch::channel(Some(connect(address)));
        Self { _dir: dir, bus, address, server, channel }
    }

    fn remote(&self) -> RemoteBus {
        RemoteBus::new("default", self.channel.subscribe())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn connect(address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy()
}

fn serve(listener: TcpListener, bus: Arc<EmbeddedBus>) -> AbortHandle {
    let service = EventBusServer::new(TestService(bus));
    let server = Server::builder()
        .add_service(service)
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server).abort_handle()
}

fn events(ids: impl IntoIterator<Item = u32>) -> Vec<Event> {
    ids.into_iter().map(|id| Event::new(id.to_string(), "/test", "t").unwrap()).collect()
}

fn spec() -> SubscriptionSpec {
    SubscriptionSpec {
        start: Start::Earliest,
        max_in_flight: 2,
        ..SubscriptionSpec::new("a/s", "default", "orders").unwrap()
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    timeout(Duration::from_secs(20), consumer.next()).await.unwrap().unwrap().unwrap()
}

use crate::bus::Delivery;

#[tokio::test]
async fn publishes_are_pipelined_and_answered_each() {
    let fixture = Fixture::start().await;
    let remote = Arc::new(fixture.remote());
    let publishers = (0..300).map(|id| {
        let remote = Arc::clone(&remote);
        tokio::spawn(async move { remote.publish("orders", events([id])).await.unwrap()[0] })
    });
    let mut positions = Vec::new();
    for publisher in publishers.collect::<Vec<_>>() {
        positions.push(publisher.await.unwrap().position);
    }
    positions.sort_unstable();
    assert_eq!(positions, (1..=300).collect::<Vec<_>>());
    let again = remote.publish("orders", events([7])).await.unwrap();
    assert!(again[0].duplicate);
}

#[tokio::test]
async fn refusals_keep_their_kind_and_do_not_break_the_stream() {
    let fixture = Fixture::start().await;
    let remote = fixture.remote();
    let error = remote.publish("not a name", events([1])).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Invalid);
    let other = RemoteBus::new("other", fixture.channel.subscribe());
    let error = other.publish("orders", events([1])).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::UnknownBus);
    remote.publish("orders", events([1])).await.unwrap();
}

#[tokio::test]
async fn a_missing_bus_is_unavailable_and_a_returning_one_is_found() {
    let fixture = Fixture::start().await;
    let remote = fixture.remote();
    remote.publish("orders", events([1])).await.unwrap();
    fixture.channel.send_replace(None);
    let error = remote.publish("orders", events([2])).await.unwrap_err();
    assert!(error.is_unavailable());
    assert!(matches!(remote.consume(spec()).await, Err(ConsumeError::Unavailable { .. })));
    fixture.channel.send_replace(Some(connect(fixture.address)));
    remote.publish("orders", events([2])).await.unwrap();
}

#[tokio::test]
async fn a_refused_connection_is_unavailable_at_once_and_later_tries_work() {
    let fixture = Fixture::start().await;
    let spare = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = spare.local_addr().unwrap();
    drop(spare);
    fixture.channel.send_replace(Some(connect(address)));
    let remote = fixture.remote();
    let error = timeout(Duration::from_secs(4), remote.publish("orders", events([1]))).await;
    assert!(error.unwrap().unwrap_err().is_unavailable());
    let listener = TcpListener::bind(address).await.unwrap();
    let server = serve(listener, Arc::clone(&fixture.bus));
    let published = async {
        while remote.publish("orders", events([1])).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), published).await.unwrap();
    server.abort();
}

#[tokio::test]
async fn a_silent_bus_times_out_as_unavailable() {
    // Accepts connections and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (channel, _) = watch::channel(Some(connect(listener.local_addr().unwrap())));
    let remote = RemoteBus::new("default", channel.subscribe());
    tokio::time::pause();
    let error = remote.publish("orders", events([1])).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
}

#[tokio::test]
async fn deliveries_come_as_credit_allows_and_settles_arrive() {
    let fixture = Fixture::start().await;
    let remote = fixture.remote();
    remote.publish("orders", events(1..=5)).await.unwrap();
    let mut consumer = remote.consume(spec()).await.unwrap();
    let first = next(&mut consumer).await;
    let second = next(&mut consumer).await;
    assert_eq!((first.position, second.position), (1, 2));
    assert!(timeout(Duration::from_millis(50), consumer.next()).await.is_err(), "no credit");
    let settler = consumer.settler();
    settler.settle(first.id, Settle::Ack);
    assert_eq!(next(&mut consumer).await.position, 3);
    settler.settle(second.id, Settle::Retry { delay: Duration::from_millis(1) });
    let mut last = next(&mut consumer).await;
    while last.position != 2 {
        settler.settle(last.id, Settle::Ack);
        last = next(&mut consumer).await;
    }
    assert_eq!(last.attempt, 2);
}

#[tokio::test]
async fn the_last_settle_before_the_drop_counts_and_the_rest_goes_back_unspent() {
    let fixture = Fixture::start().await;
    let remote = fixture.remote();
    remote.publish("orders", events(1..=3)).await.unwrap();
    let mut consumer = remote.consume(spec()).await.unwrap();
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, Settle::Ack);
    drop(consumer);
    let mut consumer = remote.consume(spec()).await.unwrap();
    let mut positions = [next(&mut consumer).await, next(&mut consumer).await]
        .map(|delivery| (delivery.position, delivery.attempt));
    positions.sort_unstable();
    assert_eq!(positions, [(2, 1), (3, 1)]);
}

#[tokio::test]
async fn a_consumer_ends_with_an_error_when_the_bus_goes() {
    let fixture = Fixture::start().await;
    let remote = fixture.remote();
    let mut consumer = remote.consume(spec()).await.unwrap();
    fixture.bus.close().await;
    let end = timeout(Duration::from_secs(10), consumer.next()).await.unwrap();
    assert!(matches!(end, Some(Err(ConsumeError::Unavailable { .. }))), "{end:?}");
}

#[tokio::test]
async fn a_bad_subscription_is_refused() {
    let fixture = Fixture::start().await;
    let remote = fixture.remote();
    let bad = SubscriptionSpec { topic: "a b".into(), ..spec() };
    let error = remote.consume(bad).await.unwrap_err();
    assert!(!error.is_retryable(), "{error}");
}
