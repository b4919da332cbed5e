//! The operator port: one request on a connection of its own. Blocking, since a command does one thing after the other.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::run::find_mesh;
use crate::up::state;

/// A control plane that was started without saying where.
const DEFAULT_OPERATOR: &str = "http://127.0.0.1:15016";
/// Bound on one answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer that is read.
const MAX_BYTES: u64 = 256 << 20;

#[derive(Debug)]
pub(super) struct Client {
    /// `host:port`.
    address: String,
    /// What is there, and how people say where.
    server: (&'static str, &'static str),
}

impl Client {
    /// From what the user says, else from a mesh that runs here, else the default port.
    pub(super) fn find(operator: Option<&str>, mesh: Option<&Path>) -> anyhow::Result<Self> {
        let url = match (operator, mesh) {
            (Some(url), _) => url.to_owned(),
            (None, Some(folder)) => state::read(folder)?.control_plane.operator_url,
            (None, None) => match find_mesh() {
                Ok(folder) => state::read(&folder)?.control_plane.operator_url,
                Err(_none) => DEFAULT_OPERATOR.to_owned(),
            },
        };
        Self::at(&url, ("control plane", "--operator URL, or --mesh DIR of a `duet up`,"))
    }

    /// A sidecar's admin port.
    pub(super) fn of_sidecar(url: &str) -> anyhow::Result<Self> {
        Self::at(url, ("sidecar", "--sidecar URL|REPLICA"))
    }

    fn at(url: &str, server: (&'static str, &'static str)) -> anyhow::Result<Self> {
        let address = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
        if address.is_empty() || address.contains('/') {
            bail!("{url:?} is not an address such as {DEFAULT_OPERATOR}");
        }
        Ok(Self { address: address.to_owned(), server })
    }

    pub(super) fn get(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<Value> {
        let path = with_query(path, query);
        self.exchange("GET", &path, "application/json", &[])
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.exchange("POST", path, "application/json", body.to_string().as_bytes())
    }

    /// With everything in the query.
    pub(super) fn post_query(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<Value> {
        self.exchange("POST", &with_query(path, query), "application/json", &[])
    }

    /// A `CloudEvent` in JSON.
    pub(super) fn publish(&self, query: &[(&str, &str)], event: &Value) -> anyhow::Result<Value> {
        let path = with_query("/v1/publish", query);
        let body = event.to_string();
        self.exchange("POST", &path, "application/cloudevents+json", body.as_bytes())
    }

    /// What comes, however long and however late: a copy of a large bus takes its time.
    pub(super) fn download(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> anyhow::Result<http::Response<impl std::io::Read + use<>>> {
        let address = &self.address;
        let path = with_query(path, query);
        let mut answer = self.send("GET", &path, "application/json", &[], None)?;
        if answer.status() == 200 {
            return Ok(answer.map(ureq::Body::into_reader));
        }
        let text = answer.body_mut().with_config().limit(MAX_BYTES).read_to_string()?;
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        match value.get("error").and_then(Value::as_str) {
            Some(error) => bail!("{error}"),
            None => bail!("http://{address} answered {}", answer.status()),
        }
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> anyhow::Result<Value> {
        let address = &self.address;
        let mut answer = self.send(method, path, content_type, body, Some(TIMEOUT))?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(MAX_BYTES).read_to_string()?;
        let value: Value = serde_json::from_str(&body)
            .with_context(|| format!("http://{address} answered {status}, without JSON"))?;
        match value.get("error").and_then(Value::as_str) {
            Some(error) => bail!("{error}{}", advice(error)),
            None if status != 200 => bail!("http://{address} answered {status}"),
            None => Ok(value),
        }
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
        timeout: Option<Duration>,
    ) -> anyhow::Result<http::Response<ureq::Body>> {
        let address = &self.address;
        let config = ureq::Agent::config_builder().timeout_connect(Some(TIMEOUT));
        // What went wrong is in the body.
        let config = config.timeout_global(timeout).http_status_as_error(false).build();
        let request = http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header("duet-operator", "1")
            .header(http::header::CONTENT_TYPE, content_type)
            .body(body)?;
        let (server, flag) = self.server;
        match ureq::Agent::from(config).run(request) {
            Err(ureq::Error::Timeout(_)) => {
                bail!(
                    "no answer of the {server} at http://{address} within {TIMEOUT:?}: it hangs, or is elsewhere; \
                     {flag} says where it is"
                )
            }
            answer => answer.with_context(|| {
                format!("no {server} answers at http://{address}; {flag} says where it is")
            }),
        }
    }
}

/// What to do about a name that the bus does not know.
fn advice(error: &str) -> &'static str {
    if error.starts_with("there is no topic ") {
        "; a topic is there with its first event, and `duet events topics` lists them"
    } else if error.starts_with("there is no subscription ") {
        "; `duet events subscriptions` lists them as <namespace>/<name>"
    } else {
        ""
    }
}

fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    let mut full = path.to_owned();
    for (number, (name, value)) in query.iter().enumerate() {
        full.push(if number == 0 { '?' } else { '&' });
        full.extend([name, "="]);
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                full.push(char::from(byte));
            } else {
                full.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    full
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_encoded() {
        let full = with_query("/v1/events", &[("topic", "a b/ü&c"), ("from", "1")]);
        assert_eq!(full, "/v1/events?topic=a%20b%2F%C3%BC%26c&from=1");
    }

    #[test]
    fn unknown_names_come_with_what_to_do() {
        assert!(advice("there is no topic \"a\"").contains("`duet events topics`"));
        assert!(advice("there is no subscription \"a\"").contains("`duet events subscriptions`"));
        assert_eq!(advice("there is no bus \"a\"; known are: default"), "");
    }

    #[test]
    fn addresses_are_read() {
        let address = |url| Client::find(Some(url), None).map(|client| client.address);
        assert_eq!(address("http://127.0.0.1:1/").unwrap(), "127.0.0.1:1");
        assert_eq!(address("localhost:15016").unwrap(), "localhost:15016");
        assert!(address("http://a/b").is_err() && address("").is_err());
    }
}
