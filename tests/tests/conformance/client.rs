//! The client: one request on a connection of its own, in any of the protocols that the cases use.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::case::Protocol;
use super::echo::{EMPTY_MESSAGE, REQUEST_ID};
use super::websocket;

/// No case takes longer.
const LIMIT: Duration = Duration::from_secs(10);

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// A sidecar's outbound port, or a pod.
    pub(crate) at: SocketAddr,
    /// What is dialled, where that is a service.
    pub(crate) destination: Option<String>,
    pub(crate) id: String,
    pub(crate) protocol: Protocol,
    pub(crate) host: String,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
    /// To send over a WebSocket.
    pub(crate) messages: Vec<String>,
}

/// Its answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) trailers: HeaderMap,
    /// What came back over a WebSocket.
    pub(crate) messages: Vec<String>,
}

impl Reply {
    /// The status of a gRPC call, as a client of gRPC sees it: an answer without one has that of its HTTP status.
    pub(crate) fn grpc_status(&self) -> u16 {
        let told = self.trailers.get("grpc-status").or_else(|| self.headers.get("grpc-status"));
        let told = told.and_then(|status| status.to_str().ok()?.parse().ok());
        told.unwrap_or(match self.status {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502 | 503 | 504 => 14,
            _ => 2,
        })
    }

    /// For people: what it is and, if it says so, why.
    pub(crate) fn describe(&self) -> String {
        let why = ["proxy-status", "grpc-message"].into_iter().find_map(|name| {
            let value = self.headers.get(name).or_else(|| self.trailers.get(name))?;
            Some(format!(" ({})", String::from_utf8_lossy(value.as_bytes())))
        });
        format!("{}{}", self.status, why.unwrap_or_default())
    }
}

/// Sends a request and reads its whole answer.
pub(crate) async fn send(ask: &Ask) -> Result<Reply, String> {
    match tokio::time::timeout(LIMIT, exchange(ask)).await {
        Ok(outcome) => outcome.map_err(|error| format!("no answer: {error}")),
        Err(_elapsed) => Err(format!("no answer within {LIMIT:?}")),
    }
}

async fn exchange(ask: &Ask) -> Result<Reply, Box<dyn std::error::Error + Send + Sync>> {
    let stream = TokioIo::new(TcpStream::connect(ask.at).await?);
    // Ends the connection with the answer.
    let mut connections = JoinSet::new();
    let response = match ask.protocol {
        Protocol::Http1 | Protocol::WebSocket => {
            let (mut sender, connection) = http1::handshake(stream).await?;
            connections.spawn(async { drop(connection.with_upgrades().await) });
            sender.send_request(request(ask)?).await?
        }
        Protocol::H2c | Protocol::Grpc => {
            let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
            connections.spawn(async { drop(connection.await) });
            sender.send_request(request(ask)?).await?
        }
        Protocol::Https => return Err("TLS is not for a mesh's clients".into()),
    };
    read(response, &ask.messages).await
}

async fn read(
    mut response: Response<Incoming>,
    messages: &[String],
) -> Result<Reply, Box<dyn std::error::Error + Send + Sync>> {
    let mut reply = Reply {
        status: response.status().as_u16(),
        headers: response.headers().clone(),
        ..Reply::default()
    };
    if response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
        reply.messages = websocket::talk(&mut response, messages).await?;
    } else {
        let body = response.into_body().collect().await?;
        reply.trailers = body.trailers().cloned().unwrap_or_default();
    }
    Ok(reply)
}

fn request(ask: &Ask) -> http::Result<Request<Full<Bytes>>> {
    let mut request = Request::builder().method(ask.method.as_str());
    request = match ask.protocol {
        Protocol::Http1 | Protocol::WebSocket | Protocol::Https => {
            request.uri(&ask.path).header(header::HOST, &ask.host)
        }
        Protocol::H2c | Protocol::Grpc => request.uri(format!("http://{}{}", ask.host, ask.path)),
    };
    request = request.header(REQUEST_ID, &ask.id);
    if let Some(destination) = &ask.destination {
        request = dial(request, destination);
    }
    for (name, value) in &ask.headers {
        request = request.header(name, value);
    }
    let mut body = Bytes::new();
    if ask.protocol == Protocol::Grpc {
        request = request.header(header::CONTENT_TYPE, "application/grpc");
        request = request.header(header::TE, "trailers");
        body = EMPTY_MESSAGE;
    }
    if ask.protocol == Protocol::WebSocket {
        request = request.header(header::CONNECTION, "Upgrade");
        request = request.header(header::UPGRADE, "websocket");
        request = request.header(header::SEC_WEBSOCKET_VERSION, "13");
        request = request.header(header::SEC_WEBSOCKET_KEY, websocket::KEY);
    }
    request.body(Full::new(body))
}

/// Says what is dialled. In a cluster that is the address of the connection, a service's cluster IP, and `Host` is
/// another matter; here every connection goes to the sidecar's own port.
fn dial(request: http::request::Builder, destination: &str) -> http::request::Builder {
    request.header("duet-destination", destination)
}
