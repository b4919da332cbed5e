//! What every part of a NATS bus uses: the connection, what is known of topics, and the bucket of state.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::context::{ContextBuilder, CreateKeyValueError};
use async_nats::jetstream::{AckKind, Context, kv};
use async_nats::{Client, ConnectOptions, Event as ConnectionEvent, Subject};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::login::NatsLogin;
use super::metrics::NatsMetrics;
use super::room::Counts;
use super::stream::Topic;
use super::wanted::Wanted;

/// Bound on one request, and on the acknowledgement of a publish.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the server is asked whether it is still there.
const PING: Duration = Duration::from_secs(5);

/// How to reach a NATS cluster, and what to keep there.
#[derive(Clone, Debug)]
pub struct NatsOptions {
    /// `nats://host:port` or `tls://host:port`; any that answers is used.
    pub servers: Vec<String>,
    /// Copies of each stream: 1, 3 or 5.
    pub replicas: usize,
    /// What the names of streams, and the subjects, start with.
    pub stream_prefix: String,
    /// Who the control plane is there.
    pub login: NatsLogin,
    /// TLS.
    pub tls: Option<NatsTls>,
}

/// TLS to the cluster.
#[derive(Clone, Debug, Default)]
pub struct NatsTls {
    /// PEM of what signed the servers' certificates; `None` for the machine's own roots.
    pub ca_file: Option<PathBuf>,
    /// PEM of the client's certificate and key.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// Why something on the cluster did not work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NatsError {
    /// The settings cannot be used.
    #[error("{0}")]
    Settings(String),
    /// No connection, or no answer in time.
    #[error("the NATS cluster is away: {0}")]
    Away(String),
    /// It will never work.
    #[error("{0}")]
    Refused(String),
    /// The cluster has no room.
    #[error("the NATS cluster is full: {0}")]
    Full(String),
    /// Workloads have made as many without a resource as they may.
    #[error(
        "there are too many {0} that no resource declares, and no more are made: declare this one"
    )]
    TooMany(&'static str),
    /// The cluster said no.
    #[error("{0}")]
    Failed(String),
    /// The bus was closed.
    #[error("the bus is closed")]
    Closed,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) options: NatsOptions,
    pub(super) client: Client,
    pub(super) js: Context,
    pub(super) metrics: NatsMetrics,
    /// A cache: short, and never held across an await.
    pub(super) topics: Mutex<HashMap<String, Topic>>,
    /// What is to be there. Short, and never held across an await.
    pub(super) wanted: Mutex<Wanted>,
    /// Likewise.
    pub(super) counts: Mutex<Counts>,
    /// The bucket of state, as far as it is known to be there. Short, and never held across an await.
    state: Mutex<Option<Arc<kv::Store>>>,
    /// Counts connections.
    pub(super) connects: watch::Receiver<u64>,
    pub(super) closed: watch::Sender<bool>,
}

impl Shared {
    pub(super) async fn connect(
        name: &str,
        options: NatsOptions,
        metrics: NatsMetrics,
    ) -> Result<Self, NatsError> {
        let (count, connects) = watch::channel(0_u64);
        let (bus, counter) = (name.to_owned(), metrics.connects.clone());
        let connect = connect_options(&options)?
            .name(format!("duet bus {name}"))
            .retry_on_initial_connect()
            .request_timeout(Some(REQUEST_TIMEOUT))
            // A machine that vanishes says nothing: it is gone when three of these have no answer.
            .ping_interval(PING)
            .client_capacity(65_536)
            .event_callback(move |event| {
                if matches!(event, ConnectionEvent::Connected) {
                    counter.inc();
                    count.send_modify(|count| *count += 1);
                    tracing::info!(bus, "connected to NATS");
                } else {
                    tracing::warn!(bus, %event, "NATS connection");
                }
                std::future::ready(())
            });
        let client = connect.connect(options.servers.clone()).await;
        let client = client.map_err(|error| NatsError::Settings(format!("nats: {error}")))?;
        let js = ContextBuilder::new()
            .timeout(REQUEST_TIMEOUT)
            .max_ack_inflight(65_536)
            .build(client.clone());
        Ok(Self {
            name: name.to_owned(),
            options,
            client,
            js,
            metrics,
            topics: Mutex::default(),
            wanted: Mutex::default(),
            counts: Mutex::default(),
            state: Mutex::default(),
            connects,
            closed: watch::Sender::new(false),
        })
    }

    /// Fails at once while there is no connection.
    pub(super) fn connected(&self) -> Result<(), NatsError> {
        if *self.closed.borrow() {
            return Err(NatsError::Closed);
        }
        match self.client.connection_state() {
            State::Connected => Ok(()),
            State::Pending | State::Disconnected => Err(NatsError::Away(format!(
                "not connected to {}",
                self.options.servers.join(", ")
            ))),
        }
    }

    /// Whether there is a connection, also while closing.
    pub(super) fn connected_now(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// What an error of the client library means.
    pub(super) fn error(&self, what: &str, error: &dyn std::error::Error) -> NatsError {
        let text = format!("{what}: {error}");
        if self.client.connection_state() != State::Connected {
            return NatsError::Away(text);
        }
        if let Some(code) = code(&text) {
            return match code {
                // Not available, no leader, no peers; JetStream is not enabled there, or not for the account.
                10_005 | 10_008 | 10_009 | 10_118 | 10_039 | 10_076 | IN_PROCESS => {
                    NatsError::Away(text)
                }
                // Resources, storage, store failed: no room. Too many requests.
                10_002 | 10_023 | 10_028 | 10_047 | 10_077 | 10_167 => NatsError::Full(text),
                _ => NatsError::Failed(text),
            };
        }
        // Time-outs and missing responders carry no code of the server.
        let words = ["timed out", "no responders", "broken pipe", "JetStream unavailable"];
        if words.iter().any(|word| text.contains(word)) {
            return NatsError::Away(text);
        }
        NatsError::Failed(text)
    }

    /// Tells JetStream what became of a hand-out. While the cluster is away the answer waits in the client.
    pub(super) async fn answer(&self, reply: Subject, kind: AckKind) {
        if let Err(error) = self.client.publish(reply, Bytes::from(kind)).await {
            // The client is gone: JetStream hands the event out again.
            tracing::debug!(bus = self.name, %error, "an answer was not sent");
        }
    }

    /// The bucket of subscriptions and spent attempts.
    pub(super) async fn state(&self) -> Result<Arc<kv::Store>, NatsError> {
        self.connected()?;
        if let Some(store) = self.state.lock().clone() {
            return Ok(store);
        }
        let store = Box::pin(state(&self.js, &self.options)).await;
        let store = store.map_err(|error| self.error("the bucket of state", &error))?;
        let store = Arc::new(store);
        *self.state.lock() = Some(Arc::clone(&store));
        Ok(store)
    }

    /// What an error of the bucket means. It may be gone with all that the servers had: it is made anew when it is next
    /// needed.
    pub(super) fn state_error(&self, what: &str, error: &dyn std::error::Error) -> NatsError {
        *self.state.lock() = None;
        let error = self.error(what, error);
        if let NatsError::Failed(text) = &error
            && code(text) == Some(NO_STREAM)
        {
            return NatsError::Away(text.clone());
        }
        error
    }
}

async fn state(js: &Context, options: &NatsOptions) -> Result<kv::Store, CreateKeyValueError> {
    let config = kv::Config {
        bucket: format!("{}-state", options.stream_prefix),
        description: "Duet: subscriptions and spent attempts".to_owned(),
        history: 1,
        num_replicas: options.replicas,
        ..kv::Config::default()
    };
    js.create_or_update_key_value(config).await
}

/// Whether a bus can be kept on a cluster: it answers, lets us in, and makes what every bus has there.
pub(super) async fn reach(options: &NatsOptions, wait: Duration) -> Result<(), NatsError> {
    let connecting = connect_options(options)?.connect(options.servers.clone());
    let client = match tokio::time::timeout(wait, connecting).await {
        Ok(Ok(client)) => client,
        Ok(Err(error)) => return Err(NatsError::Away(error.to_string())),
        Err(_elapsed) => {
            return Err(NatsError::Away(format!("no server answered within {wait:?}")));
        }
    };
    let js = ContextBuilder::new().timeout(REQUEST_TIMEOUT).build(client.clone());
    let made = state(&js, options).await.map(drop);
    let made = made.map_err(|error| NatsError::Failed(format!("the bucket of state: {error}")));
    // Nobody waits for its end.
    client.drain().await.unwrap_or_default();
    made
}

/// There is no such stream.
const NO_STREAM: u64 = 10_059;
/// The same event is being stored: it is known whether that worked a moment later.
const IN_PROCESS: u64 = 10_158;

/// Somebody else wrote it, or is writing it.
const WRONG_LAST: [u64; 2] = [10_071, 10_164];

/// Whether a publish is refused because the same event is being stored just now.
pub(super) fn is_in_process(error: &dyn std::error::Error) -> bool {
    code(&error.to_string()) == Some(IN_PROCESS)
}

/// Whether what was to be written over has been written over already, or is just now.
pub(super) fn is_overtaken(error: &dyn std::error::Error) -> bool {
    code(&error.to_string()).is_some_and(|code| WRONG_LAST.contains(&code))
}

/// The server's code in an error's text. The library's errors do not all have it as their source, but all say it.
fn code(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once("error code ")?;
    let digits = rest
        .find(|c: char| !c.is_ascii_digit())
        .map_or(rest, |end| rest.get(..end).unwrap_or_default());
    digits.parse().ok()
}

fn connect_options(options: &NatsOptions) -> Result<ConnectOptions, NatsError> {
    let mut connect = options.login.connect_options()?;
    if let Some(tls) = &options.tls {
        connect = connect.require_tls(true);
        if let Some(file) = &tls.ca_file {
            connect = connect.add_root_certificates(file.clone());
        }
        if let Some((certificate, key)) = &tls.client {
            connect = connect.add_client_certificate(certificate.clone(), key.clone());
        }
    }
    Ok(connect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_code_is_found() {
        let text = "the stream: jetstream error: no room (code 500, error code 10047)";
        assert_eq!(code(text), Some(10_047));
        assert_eq!(code("timed out"), None);
        assert_eq!(code("error code x"), None);
    }
}
