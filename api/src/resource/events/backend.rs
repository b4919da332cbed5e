//! What keeps the events of a bus.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

/// What keeps the events of a bus: exactly one of the fields is given.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawBackend")]
pub enum BusBackend {
    /// The control plane's own durable log.
    Embedded(EmbeddedBackend),
    /// A NATS JetStream cluster.
    Nats(Box<NatsBackend>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawBackend {
    embedded: Option<EmbeddedBackend>,
    nats: Option<NatsBackend>,
}

impl TryFrom<RawBackend> for BusBackend {
    type Error = &'static str;

    fn try_from(raw: RawBackend) -> Result<Self, Self::Error> {
        match (raw.embedded, raw.nats) {
            (Some(embedded), None) => Ok(Self::Embedded(embedded)),
            (None, Some(nats)) => Ok(Self::Nats(Box::new(nats))),
            (None, None) => Err("one of embedded and nats must be given"),
            (Some(_), Some(_)) => Err("only one of embedded and nats can be given"),
        }
    }
}

/// The control plane's own durable log; takes no settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddedBackend {}

/// A NATS JetStream cluster. Files are the control plane's; relative paths start at its working folder.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NatsBackend {
    /// `nats://host:port` or `tls://host:port`; at least one.
    #[serde(deserialize_with = "servers")]
    pub servers: Vec<String>,
    /// `http://host:8222`: the servers' monitoring ports, to see whether they flush before they acknowledge.
    #[serde(default, deserialize_with = "monitors")]
    pub monitor_urls: Vec<String>,
    /// Copies of each stream: 1, 3 or 5. Default: 1.
    #[serde(default = "one", deserialize_with = "replicas")]
    pub replicas: u8,
    /// A `.creds` file: a JWT and its key. At most one of this, `tokenFile` and `userFile`.
    pub credentials_file: Option<String>,
    /// A file that holds a token.
    pub token_file: Option<String>,
    /// A file that holds `user:password`.
    pub user_file: Option<String>,
    /// TLS to the servers.
    pub tls: Option<NatsTls>,
    /// What names of streams, and subjects, start with. Default: `duet`.
    #[serde(default = "prefix", deserialize_with = "stream_prefix")]
    pub stream_prefix: String,
}

/// TLS to a NATS cluster: PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NatsTls {
    /// What signed the servers' certificates. Default: the machine's own roots.
    pub ca_file: Option<String>,
    /// The client's certificate; with `keyFile`.
    pub cert_file: Option<String>,
    /// Its key.
    pub key_file: Option<String>,
}

fn servers<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    let servers = Vec::<String>::deserialize(input)?;
    if servers.is_empty() {
        return Err(D::Error::custom("servers: at least one is needed"));
    }
    for server in &servers {
        if !is_server(server) {
            return Err(D::Error::custom(format!(
                "servers: {server:?} is not like nats://host:4222 or tls://host:4222"
            )));
        }
    }
    Ok(servers)
}

fn monitors<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    let urls = Vec::<String>::deserialize(input)?;
    for url in &urls {
        let rest = url.strip_prefix("http://").map(|rest| format!("nats://{rest}"));
        if !rest.is_some_and(|rest| is_server(&rest)) {
            return Err(D::Error::custom(format!(
                "monitorUrls: {url:?} is not like http://host:8222"
            )));
        }
    }
    Ok(urls)
}

/// Without user or password: those belong into a file.
fn is_server(url: &str) -> bool {
    let rest = url.strip_prefix("nats://").or_else(|| url.strip_prefix("tls://"));
    let Some((host, port)) = rest.and_then(|rest| rest.rsplit_once(':')) else { return false };
    let name = |host: &str| {
        !host.is_empty()
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && (host.parse::<Ipv4Addr>().is_ok()
                || !host.bytes().all(|b| b.is_ascii_digit() || b == b'.'))
    };
    let v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host = v6.map_or_else(|| name(host), |host| host.parse::<Ipv6Addr>().is_ok());
    host && port.parse::<u16>().is_ok_and(|port| port > 0)
}

fn replicas<'de, D: Deserializer<'de>>(input: D) -> Result<u8, D::Error> {
    match u8::deserialize(input)? {
        n @ (1 | 3 | 5) => Ok(n),
        n => Err(D::Error::custom(format!("replicas must be 1, 3 or 5, not {n}"))),
    }
}

fn stream_prefix<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let prefix = String::deserialize(input)?;
    let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    if prefix.is_empty() || prefix.len() > 32 || !prefix.bytes().all(fine) {
        return Err(D::Error::custom("streamPrefix must be 1 to 32 letters, digits and hyphens"));
    }
    Ok(prefix)
}

fn one() -> u8 {
    1
}

fn prefix() -> String {
    "duet".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<BusBackend, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn exactly_one_backend_with_its_defaults() {
        assert_eq!(
            read(r#"{"embedded": {}}"#),
            Ok(BusBackend::Embedded(EmbeddedBackend::default()))
        );
        let nats = read(r#"{"nats": {"servers": ["nats://a:4222", "tls://[::1]:4222"]}}"#);
        let Ok(BusBackend::Nats(nats)) = nats else { panic!("{nats:?}") };
        assert_eq!((nats.replicas, nats.stream_prefix.as_str()), (1, "duet"));
    }

    #[test]
    fn bad_settings_are_named() {
        for (json, part) in [
            ("{}", "one of embedded and nats"),
            (r#"{"embedded": {}, "nats": {"servers": ["nats://a:1"]}}"#, "only one"),
            (r#"{"nats": {"servers": []}}"#, "servers"),
            (r#"{"nats": {"servers": ["http://a:1"]}}"#, "http://a:1"),
            (r#"{"nats": {"servers": ["nats://a"]}}"#, "nats://a"),
            (r#"{"nats": {"servers": ["nats://u:p@a:1"]}}"#, "u:p@a"),
            (r#"{"nats": {"servers": ["nats://a:99999"]}}"#, "99999"),
            (r#"{"nats": {"servers": ["nats://a:1"], "replicas": 2}}"#, "replicas"),
            (r#"{"nats": {"servers": ["nats://a:1"], "streamPrefix": "a.b"}}"#, "streamPrefix"),
            (r#"{"nats": {"servers": ["nats://a:1"], "user": "x"}}"#, "user"),
            (r#"{"nats": {"servers": ["nats://a:1"], "monitorUrls": ["a:1"]}}"#, "monitorUrls"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(part), "{json}: {error}");
        }
    }
}
