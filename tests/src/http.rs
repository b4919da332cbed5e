//! An HTTP client.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use reqwest::{Client, Method, RequestBuilder, Response};

/// A client that ignores the environment's proxies and gives up after 30 s.
#[must_use]
pub fn client() -> Client {
    Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().unwrap()
}

/// `GET` over HTTP/2 with prior knowledge, with `authority` as `:authority`.
pub async fn get_h2(address: SocketAddr, authority: &str, path: &str) -> http::Response<Bytes> {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .unwrap();
    let connection = tokio::spawn(connection);
    let uri = format!("http://{authority}{path}");
    let request = http::Request::get(uri).body(Empty::<Bytes>::new()).unwrap();
    let (head, body) = sender.send_request(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    connection.abort();
    http::Response::from_parts(head, body)
}

/// A client that uses a sidecar as its HTTP proxy, as `HTTP_PROXY` makes it.
#[must_use]
pub fn client_through(outbound: SocketAddr) -> Client {
    let proxy = reqwest::Proxy::http(format!("http://{outbound}")).unwrap();
    Client::builder().proxy(proxy).timeout(Duration::from_secs(30)).build().unwrap()
}

/// A request to `address` for `host`: routing by the Host header.
pub fn request(
    client: &Client,
    method: Method,
    address: SocketAddr,
    host: &str,
    path: &str,
) -> RequestBuilder {
    client.request(method, format!("http://{address}{path}")).header("host", host)
}

/// `GET`, by the Host header.
pub async fn get(address: SocketAddr, host: &str, path: &str) -> Response {
    request(&client(), Method::GET, address, host, path).send().await.unwrap()
}

/// `Some` when a `GET` is answered with 2xx.
pub async fn is_ok(address: SocketAddr, path: &str) -> Option<()> {
    let response = client().get(format!("http://{address}{path}")).send().await.ok()?;
    response.status().is_success().then_some(())
}

/// The body of a `GET`.
pub async fn text(address: SocketAddr, path: &str) -> String {
    client().get(format!("http://{address}{path}")).send().await.unwrap().text().await.unwrap()
}
