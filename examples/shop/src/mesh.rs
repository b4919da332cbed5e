//! Outgoing HTTP: calls to other services, and publishing. All that makes this a mesh is outside: `HTTP_PROXY`
//! names the sidecar, and names such as `http://orders` mean something to it. Imports [`crate::web`] and
//! [`crate::settings`].

use std::time::Duration;

use anyhow::Context;
use axum::http::StatusCode;
use axum::http::header::{ACCEPT, HeaderMap};
use reqwest::{Client, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::settings::{Settings, Urls};
use crate::web::{Problem, Trace};

/// Longer than the mesh's own bound of 15 s, whose answer says more than a timeout of ours.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The way out of an app.
#[derive(Debug, Clone)]
pub(crate) struct Mesh {
    /// Goes through `HTTP_PROXY`.
    calls: Client,
    /// Goes to the loopback, never through a proxy.
    publisher: Client,
    publish_url: String,
    /// Where the services are.
    pub(crate) urls: Urls,
}

/// The attributes that a `CloudEvent` of the shop has, and its data.
#[derive(Debug)]
pub(crate) struct Event<'a, T> {
    pub(crate) id: &'a str,
    pub(crate) source: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) partition_key: &'a str,
    pub(crate) data: &'a T,
}

impl Mesh {
    pub(crate) fn new(settings: &Settings) -> anyhow::Result<Self> {
        Self::with(Client::builder(), settings)
    }

    fn with(calls: reqwest::ClientBuilder, settings: &Settings) -> anyhow::Result<Self> {
        let bounded = |client: reqwest::ClientBuilder| {
            let client = client.timeout(CALL_TIMEOUT).connect_timeout(CONNECT_TIMEOUT);
            client.build().context("cannot make an HTTP client")
        };
        Ok(Self {
            calls: bounded(calls)?,
            publisher: bounded(Client::builder().no_proxy())?,
            publish_url: format!("http://127.0.0.1:{}/v1.0/publish/default", settings.sidecar_port),
            urls: settings.urls.clone(),
        })
    }

    /// A mesh without a proxy, for tests on a machine that may have one.
    #[cfg(test)]
    pub(crate) fn direct(settings: &Settings) -> Self {
        Self::with(Client::builder().no_proxy(), settings).unwrap()
    }

    /// `GET url`, and its JSON.
    ///
    /// # Errors
    /// What `service` answered if it was no success; 502 if it gave no answer that can be used.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        service: &str,
        url: &str,
        trace: &Trace,
    ) -> Result<T, Problem> {
        answer(service, self.calls.get(url).headers(trace.0.clone())).await
    }

    /// `POST url` with an idempotency key: the mesh may then send it again when an answer is lost.
    ///
    /// # Errors
    /// As [`Mesh::get`].
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        service: &str,
        url: &str,
        body: &impl Serialize,
        (key, trace): (&str, &Trace),
    ) -> Result<T, Problem> {
        let request = self.calls.post(url).headers(trace.0.clone()).json(body);
        answer(service, request.header("idempotency-key", key)).await
    }

    /// Publishes an event (CloudEvents 1.0, HTTP binary mode) and returns once the sidecar has it on disk.
    ///
    /// # Errors
    /// If the sidecar did not say so; the event may then be published or not.
    pub(crate) async fn publish<T: Serialize>(
        &self,
        topic: &str,
        event: &Event<'_, T>,
        trace: &Trace,
    ) -> Result<(), Problem> {
        let request = self.publisher.post(format!("{}/{topic}", self.publish_url));
        let request = request
            .headers(trace.0.clone())
            .header("ce-specversion", "1.0")
            .header("ce-id", event.id)
            .header("ce-source", event.source)
            .header("ce-type", event.kind)
            .header("ce-partitionkey", event.partition_key)
            .json(event.data);
        success("the sidecar", request).await.map(drop)
    }
}

async fn answer<T: DeserializeOwned>(service: &str, request: RequestBuilder) -> Result<T, Problem> {
    let response = success(service, request).await?;
    response.json().await.map_err(|error| unusable(service, error))
}

async fn success(service: &str, request: RequestBuilder) -> Result<Response, Problem> {
    let request = request.header(ACCEPT, "application/json, application/problem+json");
    let response = request.send().await.map_err(|error| unusable(service, error))?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let headers = response.headers().clone();
    let body = response.text().await.unwrap_or_default();
    Err(Problem::new(status, reason(service, status, &headers, &body)))
}

fn unusable(service: &str, error: reqwest::Error) -> Problem {
    // The service's name says where; the address that the name stands for would only be noise.
    let error = error.without_url();
    let mut text = format!("{service}: {error}");
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    Problem::new(StatusCode::BAD_GATEWAY, text)
}

/// Why it failed, in words: problem+json's sentence, else the mesh's `Proxy-Status`, else the body, else the status.
fn reason(service: &str, status: StatusCode, headers: &HeaderMap, body: &str) -> String {
    let json: Option<Value> = serde_json::from_str(body).ok();
    let said = |field: &str| json.as_ref()?.get(field)?.as_str().map(str::to_owned);
    let proxy = || Some(headers.get("proxy-status")?.to_str().ok()?.to_owned());
    let plain =
        || Some(body.trim().chars().take(200).collect()).filter(|text: &String| !text.is_empty());
    let reason = said("detail").or_else(proxy).or_else(|| said("title")).or_else(plain);
    // A message that an app passed on already names the service that failed.
    match reason {
        Some(reason) if reason.contains(": ") => reason,
        Some(reason) => format!("{service}: {reason}"),
        None => format!("{service} answered {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_reason_there_is_gets_told() {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let mut headers = HeaderMap::new();
        let check = |body: &str, expected: &str| {
            assert_eq!(reason("payments", status, &headers, body), expected);
        };
        check("", "payments answered 503 Service Unavailable");
        check("no\n", "payments: no");
        check(r#"{"title":"Busy"}"#, "payments: Busy");
        check(r#"{"title":"Busy","detail":"try later"}"#, "payments: try later");
        check(r#"{"detail":"bank: try later"}"#, "bank: try later");
        headers.insert("proxy-status", "duet; error=connection_refused".parse().unwrap());
        assert_eq!(
            reason("payments", status, &headers, "x"),
            "payments: duet; error=connection_refused"
        );
    }
}
