//! Echo backends: pods that note each request that they get and answer it, or do what a case says of them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::case::Behavior;
use super::websocket;

/// Carries the id of a client's request to every pod that it reaches, copies and retries too.
pub(crate) const REQUEST_ID: &str = "x-conformance-request-id";
/// Of an answer: the number of the arrival, from 0, that it answers.
pub(crate) const ANSWERED: &str = "x-conformance-arrival";
/// An empty gRPC message.
pub(crate) const EMPTY_MESSAGE: Bytes = Bytes::from_static(&[0; 5]);

/// Which replica of which Deployment.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) namespace: String,
    pub(crate) deployment: String,
    pub(crate) pod: String,
    /// Stands behind a re-parented service, where only a request that no route has caught can come.
    pub(crate) sentinel: bool,
}

/// A request, as a pod saw it.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) at: Arc<Replica>,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) host: String,
    pub(crate) headers: HeaderMap,
}

/// What arrived where, by request.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<HashMap<String, Entry>>);

#[derive(Debug, Default)]
struct Entry {
    behavior: Behavior,
    arrivals: Vec<Arrival>,
}

/// What a pod has to know about an arrival.
struct Noted {
    number: usize,
    /// Earlier arrivals of the same request at the same Deployment.
    tries: usize,
    behavior: Behavior,
}

impl Log {
    /// Says what to do when a request arrives; without that, pods do not answer it.
    pub(crate) fn open(&self, id: &str, behavior: &Behavior) {
        let entry = Entry { behavior: behavior.clone(), arrivals: Vec::new() };
        self.0.lock().unwrap().insert(id.to_owned(), entry);
    }

    /// So far.
    pub(crate) fn arrivals(&self, id: &str) -> Vec<Arrival> {
        self.0.lock().unwrap().get(id).map(|entry| entry.arrivals.clone()).unwrap_or_default()
    }

    fn note(&self, id: &str, arrival: Arrival) -> Option<Noted> {
        let mut log = self.0.lock().unwrap();
        let entry = log.get_mut(id)?;
        let same = |earlier: &&Arrival| {
            (&earlier.at.namespace, &earlier.at.deployment)
                == (&arrival.at.namespace, &arrival.at.deployment)
        };
        let tries = entry.arrivals.iter().filter(same).count();
        let number = entry.arrivals.len();
        entry.arrivals.push(arrival);
        Some(Noted { number, tries, behavior: entry.behavior.clone() })
    }
}

/// What a pod speaks on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    Http1,
    H2c,
    Either,
}

/// A running pod: literal ports on an address of its own, as pods have.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) replica: Arc<Replica>,
    pub(crate) ip: IpAddr,
    pub(crate) ports: Vec<u16>,
    /// Accepts; dropped with the pod, which ends the connections too.
    _serving: JoinSet<()>,
}

impl Pod {
    pub(crate) async fn start(replica: Replica, ports: &[(u16, Speaks)], log: &Arc<Log>) -> Self {
        let replica = Arc::new(replica);
        let numbers: Vec<u16> = ports.iter().map(|(port, _)| *port).collect();
        let (ip, listeners) = bind(&numbers).await;
        let mut serving = JoinSet::new();
        for (listener, (_, speaks)) in listeners.into_iter().zip(ports) {
            let echo = Echo { replica: Arc::clone(&replica), log: Arc::clone(log) };
            serving.spawn(accept(listener, *speaks, Arc::new(echo)));
        }
        Self { replica, ip, ports: numbers, _serving: serving }
    }
}

/// The same ports may be in use on one address and free on another of 127.0.0.0/8.
async fn bind(ports: &[u16]) -> (IpAddr, Vec<TcpListener>) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Runs at the same time start in different places.
    let start = 0x7f40_0001 + (std::process::id() % 64) * 0x1_0000;
    for _ in 0..1000 {
        let ip = IpAddr::from(Ipv4Addr::from(start + NEXT.fetch_add(1, Ordering::Relaxed)));
        let mut listeners = Vec::new();
        for port in ports {
            listeners.extend(TcpListener::bind(SocketAddr::new(ip, *port)).await);
        }
        if listeners.len() == ports.len() {
            return (ip, listeners);
        }
    }
    panic!("the ports {ports:?} are free together on no address of 127.64.0.0/10");
}

async fn accept(listener: TcpListener, speaks: Speaks, echo: Arc<Echo>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve(stream, speaks, Arc::clone(&echo)));
        while connections.try_join_next().is_some() {}
    }
}

/// Serves a connection until its end, or resets it.
async fn serve(stream: TcpStream, speaks: Speaks, echo: Arc<Echo>) {
    let socket = stream.as_fd().try_clone_to_owned().unwrap();
    let reset = Arc::new(Notify::new());
    let service = service_fn(|request| {
        let (echo, reset) = (Arc::clone(&echo), Arc::clone(&reset));
        async move { Ok::<_, Infallible>(echo.answer(request, &reset).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let builder = match speaks {
        Speaks::Http1 => builder.http1_only(),
        Speaks::H2c => builder.http2_only(),
        Speaks::Either => builder,
    };
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::select! {
        // A client that goes away is no failure of the backend.
        _ended = connection => {}
        () = reset.notified() => {
            // Nothing left to linger for: closing sends RST.
            socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
}

type Body = BoxBody<Bytes, Infallible>;

fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).boxed()
}

#[derive(Debug)]
struct Echo {
    replica: Arc<Replica>,
    log: Arc<Log>,
}

impl Echo {
    async fn answer(&self, request: Request<Incoming>, reset: &Notify) -> Response<Body> {
        let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let arrival = self.arrival(&request);
        let noted = id.and_then(|id| self.log.note(id, arrival.clone()));
        let Some(noted) = noted else {
            // Not of a case: a sidecar that asks its application for subscriptions.
            return plain(StatusCode::NOT_FOUND);
        };
        let mut response = self.act(request, &arrival, &noted, reset).await;
        response.headers_mut().insert(ANSWERED, HeaderValue::from(noted.number));
        response
    }

    async fn act(
        &self,
        mut request: Request<Incoming>,
        arrival: &Arrival,
        noted: &Noted,
        reset: &Notify,
    ) -> Response<Body> {
        let behavior = &noted.behavior;
        let simulation = behavior.retry_simulation.as_ref();
        if let Some(simulation) = simulation.filter(|s| noted.tries < s.fail_first_attempts) {
            tokio::time::sleep(simulation.delay_before_failure.unwrap_or_default()).await;
            if simulation.failure.tcp_reset {
                reset.notify_one();
                return std::future::pending().await;
            }
            let status = simulation.failure.status.and_then(|code| StatusCode::from_u16(code).ok());
            return plain(status.expect("a simulated failure is a status or a reset"));
        }
        tokio::time::sleep(behavior.delay.unwrap_or_default()).await;
        let mut response = if websocket::is_asked(request.headers()) {
            websocket::echo(hyper::upgrade::on(&mut request));
            websocket::accepted().map(|()| full(Bytes::new()))
        } else if arrival.is_grpc() {
            grpc(arrival, request.into_body()).await
        } else {
            let mut response = Response::new(full(arrival.json().to_string()));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        };
        for (name, value) in &behavior.set_response_headers {
            let name: header::HeaderName = name.parse().unwrap();
            response.headers_mut().append(name, value.parse().unwrap());
        }
        response
    }

    fn arrival(&self, request: &Request<Incoming>) -> Arrival {
        let (uri, headers) = (request.uri(), request.headers());
        let host = headers.get(header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()));
        let authority = uri.authority().map(|authority| authority.as_str().into());
        Arrival {
            at: Arc::clone(&self.replica),
            method: request.method().to_string(),
            path: uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            host: authority.or(host).unwrap_or_default().into_owned(),
            headers: headers.clone(),
        }
    }
}

impl Arrival {
    fn is_grpc(&self) -> bool {
        let kind = self.headers.get(header::CONTENT_TYPE);
        kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
    }

    /// As upstream's echo server reports it, for people who look at the traffic.
    fn json(&self) -> serde_json::Value {
        let mut headers: HashMap<&str, Vec<String>> = HashMap::new();
        for (name, value) in &self.headers {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            headers.entry(name.as_str()).or_default().push(value);
        }
        json!({
            "method": self.method,
            "path": self.path,
            "host": self.host,
            "headers": headers,
            "pod": self.at.pod,
            "namespace": self.at.namespace,
        })
    }
}

fn plain(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = status;
    response
}

async fn grpc(arrival: &Arrival, asked: Incoming) -> Response<Body> {
    // A unary method reads its message before it answers; one that does not come in full is the client's affair.
    asked.collect().await.ok();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = Full::new(EMPTY_MESSAGE).with_trailers(async { Some(Ok(trailers)) }).boxed();
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let json = HeaderValue::from_bytes(arrival.json().to_string().as_bytes()).unwrap();
    headers.insert("x-conformance-echo", json);
    response
}
