//! The application.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::header::{CONNECTION, CONTENT_TYPE, HeaderValue, UPGRADE};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Messages in the answer to a streaming call.
const STREAMED: usize = 100;
const MESSAGE_BYTES: u8 = 100;

pub(crate) async fn run(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (stream, _from) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let connection = auto::Builder::new(TokioExecutor::new());
            let service = service_fn(answer);
            // The load generators drop their connections at the end of a run.
            connection.serve_connection_with_upgrades(TokioIo::new(stream), service).await.ok();
        });
    }
}

async fn answer(mut request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    if request.headers().contains_key(UPGRADE) {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            if let Ok(stream) = upgrade.await {
                let (mut from, mut to) = tokio::io::split(TokioIo::new(stream));
                tokio::io::copy(&mut from, &mut to).await.ok();
            }
        });
        return Ok(switched());
    }
    let messages = if request.uri().path().ends_with("/Stream") { STREAMED } else { 1 };
    let is_grpc = request.headers().contains_key("te");
    // The request is read to its end, as an application would.
    request.into_body().collect().await.ok();
    Ok(if is_grpc { grpc(messages) } else { plain() })
}

fn plain() -> Response<Body> {
    Response::new(Full::new(message()).boxed_unsync())
}

/// Length-prefixed messages, and the status in trailers.
fn grpc(messages: usize) -> Response<Body> {
    let frames = stream::iter(0..messages).map(|_| Ok(Frame::data(message())));
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let end = stream::iter([Ok(Frame::trailers(trailers))]);
    let mut response = Response::new(StreamBody::new(frames.chain(end)).boxed_unsync());
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// A gRPC message: not compressed, its length, its bytes.
fn message() -> Bytes {
    let mut message = vec![0, 0, 0, 0, MESSAGE_BYTES];
    message.resize(5 + usize::from(MESSAGE_BYTES), b'x');
    message.into()
}

fn switched() -> Response<Body> {
    let mut response = Response::new(Full::default().boxed_unsync());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    // To the key that the tunnel client sends: the example of RFC 6455 section 1.3.
    let accept = HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    headers.insert("sec-websocket-accept", accept);
    response
}
