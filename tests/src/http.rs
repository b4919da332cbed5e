//! An HTTP client.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, Response};

/// A client that ignores the environment's proxies and gives up after 30 s.
#[must_use]
pub fn client() -> Client {
    Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(30))
        .build()
        .unwrap()
}

/// A client that speaks HTTP/2 with prior knowledge.
#[must_use]
pub fn client_h2() -> Client {
    let builder = Client::builder().no_proxy().http2_prior_knowledge();
    builder.timeout(Duration::from_secs(30)).build().unwrap()
}

/// A client that uses a sidecar as its HTTP proxy, as `HTTP_PROXY` makes it.
#[must_use]
pub fn client_through(outbound: SocketAddr) -> Client {
    let proxy = reqwest::Proxy::http(format!("http://{outbound}")).unwrap();
    Client::builder()
        .proxy(proxy)
        .timeout(Duration::from_secs(30))
        .build()
        .unwrap()
}

/// A request to `address` for `host`: routing by the Host header.
#[must_use]
pub fn request(
    client: &Client,
    method: Method,
    address: SocketAddr,
    host: &str,
    path: &str,
) -> RequestBuilder {
    client
        .request(method, format!("http://{address}{path}"))
        .header("host", host)
}

/// `GET`, by the Host header.
pub async fn get(address: SocketAddr, host: &str, path: &str) -> Response {
    request(&client(), Method::GET, address, host, path)
        .send()
        .await
        .unwrap()
}

/// `Some` when a `GET` is answered with 2xx.
pub async fn is_ok(address: SocketAddr, path: &str) -> Option<()> {
    let response = client()
        .get(format!("http://{address}{path}"))
        .send()
        .await
        .ok()?;
    response.status().is_success().then_some(())
}

/// The body of a `GET`.
pub async fn text(address: SocketAddr, path: &str) -> String {
    client()
        .get(format!("http://{address}{path}"))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap()
}
