//! Flags and environment, parsed once into a checked [`Config`].

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};

/// What people give: flags, or `DUET_…` environment variables.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Service that the application beside this sidecar is a replica of (repeatable). None: a pure client.
    #[arg(long, env = "DUET_SERVICE", value_delimiter = ',')]
    pub service: Vec<String>,
    /// Namespace of the service.
    #[arg(long, env = "DUET_NAMESPACE", default_value = duet_api::DEFAULT_NAMESPACE)]
    pub namespace: String,
    /// Unique name of this replica (default: `<service>-<host name>-<pid>`).
    #[arg(long, env = "DUET_INSTANCE")]
    pub instance: Option<String>,
    /// The control plane's gRPC address, host:port.
    #[arg(long, env = "DUET_CONTROL_PLANE", default_value = "127.0.0.1:15012")]
    pub control_plane: String,
    /// Join token; needed until this replica has a certificate in its state folder.
    #[arg(long, env = "DUET_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    pub token: Option<String>,
    /// File that holds the join token.
    #[arg(long, env = "DUET_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// Folder for the certificate and the outbox.
    #[arg(long, env = "DUET_STATE", default_value = ".duet/sidecar")]
    pub state: PathBuf,
    /// Most bytes of events that wait in the outbox while a bus is away, such as 256Mi; what does not fit is refused.
    #[arg(long, env = "DUET_OUTBOX_CAPACITY", default_value = "256Mi", value_parser = duet_api::quantity::parse)]
    pub outbox_capacity: u64,
    /// A port of the application, `[NAME=]PORT[/PROTOCOL]` (repeatable); PROTOCOL is http, h2c or grpc.
    #[arg(long, env = "DUET_APP_PORT", value_delimiter = ',')]
    pub app_port: Vec<String>,
    /// Address of the application.
    #[arg(long, env = "DUET_APP_HOST", default_value = "127.0.0.1")]
    pub app_host: IpAddr,
    /// Where the application's outgoing calls come in.
    #[arg(long, env = "DUET_OUTBOUND_LISTEN", default_value = "127.0.0.1:15001")]
    pub outbound_listen: SocketAddr,
    /// Where other sidecars' calls come in (mTLS).
    #[arg(long, env = "DUET_INBOUND_LISTEN", default_value = "0.0.0.0:15006")]
    pub inbound_listen: SocketAddr,
    /// Dapr-compatible HTTP API for the application.
    #[arg(long, env = "DUET_API_LISTEN", default_value = "127.0.0.1:3500")]
    pub api_listen: SocketAddr,
    /// Dapr-compatible gRPC API for the application. (The port of --api-listen serves it too.)
    #[arg(long, env = "DUET_GRPC_API_LISTEN", default_value = "127.0.0.1:50001")]
    pub grpc_api_listen: SocketAddr,
    /// Admin API; keep it on loopback.
    #[arg(long, env = "DUET_ADMIN_LISTEN", default_value = "127.0.0.1:15000")]
    pub admin_listen: SocketAddr,
    /// /metrics, /live and /ready.
    #[arg(long, env = "DUET_METRICS_LISTEN", default_value = "0.0.0.0:15020")]
    pub metrics_listen: SocketAddr,
    /// `IP` or `IP:PORT` under which other sidecars reach the inbound port (default: found out).
    #[arg(long, env = "DUET_ADVERTISE")]
    pub advertise: Option<String>,
    /// Zone of this replica.
    #[arg(long, env = "DUET_ZONE", default_value = "")]
    pub zone: String,
    /// Worker threads for calls: a number, or `auto` for one per CPU.
    #[arg(long, env = "DUET_WORKERS", default_value = "1")]
    pub workers: String,
    /// JSON access log: off, stdout or a file.
    #[arg(long, env = "DUET_ACCESS_LOG", default_value = "off")]
    pub access_log: String,
    /// How long a drain may take.
    #[arg(long, env = "DUET_DRAIN_TIMEOUT", default_value = "30s", value_parser = duet_api::duration::parse)]
    pub drain_timeout: Duration,
    /// File to write the chosen ports to, as JSON, once everything is bound.
    #[arg(long, env = "DUET_PORTS_FILE")]
    pub ports_file: Option<PathBuf>,
    /// Stop when the parent process dies.
    #[arg(long, env = "DUET_EXIT_WITH_PARENT")]
    pub exit_with_parent: bool,
    /// Log format: text or json [default: text on a terminal, else json].
    #[arg(long, env = "DUET_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Log filter, such as `info` or `duet_proxy=debug`.
    #[arg(long, env = "DUET_LOG", default_value = "info")]
    pub log_level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What the application speaks on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppProtocol {
    /// As the caller speaks.
    Auto,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    H2c,
    /// gRPC; what is not gRPC reaches it by Dapr's callbacks.
    Grpc,
}

/// A port of the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppPort {
    /// As a Service's `targetPort` may name it; may be empty.
    pub name: String,
    /// Number.
    pub port: u16,
    /// What is spoken there.
    pub protocol: AppProtocol,
}

/// Where the access log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// Nowhere.
    Off,
    /// Standard output.
    Stdout,
    /// A file, appended to.
    File(PathBuf),
}

/// The checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The flags whose values need no check.
    pub args: Args,
    /// Unique name of this replica.
    pub instance: String,
    /// The application's ports.
    pub app_ports: Vec<AppPort>,
    /// What to advertise: address, and the port unless it is the inbound port.
    pub advertise: Option<(IpAddr, Option<u16>)>,
    /// At least 1.
    pub workers: usize,
    /// Where the access log goes.
    pub access_log: AccessLogTarget,
    /// The join token, read from wherever it was given.
    pub token: Option<String>,
}

impl TryFrom<Args> for Config {
    type Error = anyhow::Error;

    fn try_from(args: Args) -> anyhow::Result<Self> {
        let app_ports =
            args.app_port.iter().map(|text| parse_app_port(text)).collect::<anyhow::Result<_>>()?;
        if !args.admin_listen.ip().is_loopback() {
            bail!("--admin-listen {}: the admin API must stay on loopback", args.admin_listen);
        }
        let token = match &args.token_file {
            Some(file) => {
                let token = std::fs::read_to_string(file)
                    .with_context(|| format!("--token-file {}", file.display()))?;
                Some(token.trim().to_owned())
            }
            None => args.token.clone(),
        };
        Ok(Self {
            instance: instance(&args),
            advertise: args.advertise.as_deref().map(parse_advertise).transpose()?,
            workers: parse_workers(&args.workers)?,
            access_log: match args.access_log.as_str() {
                "off" | "none" => AccessLogTarget::Off,
                "stdout" | "-" => AccessLogTarget::Stdout,
                file => AccessLogTarget::File(file.into()),
            },
            app_ports,
            token,
            args,
        })
    }
}

fn instance(args: &Args) -> String {
    args.instance.clone().unwrap_or_else(|| {
        let service = args.service.first().map_or("client", String::as_str);
        let host = rustix::system::uname().nodename().to_string_lossy().to_lowercase();
        format!("{service}-{host}-{}", std::process::id())
    })
}

fn parse_workers(text: &str) -> anyhow::Result<usize> {
    if text == "auto" {
        return Ok(std::thread::available_parallelism().map_or(1, Into::into));
    }
    match text.parse() {
        Ok(n @ 1..=256) => Ok(n),
        _ => bail!("--workers {text}: give a number of 1 to 256, or auto"),
    }
}

fn parse_advertise(text: &str) -> anyhow::Result<(IpAddr, Option<u16>)> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok((address.ip(), Some(address.port())));
    }
    let ip = text.parse().with_context(|| format!("--advertise {text}: give IP or IP:PORT"))?;
    Ok((ip, None))
}

fn parse_app_port(text: &str) -> anyhow::Result<AppPort> {
    let (name, rest) = text.split_once('=').unwrap_or(("", text));
    let (port, protocol) = rest.split_once('/').unwrap_or((rest, ""));
    let Ok(port @ 1..=65535) = port.parse() else {
        bail!("--app-port {text}: {port:?} is not a port of 1 to 65535");
    };
    let protocol = match protocol {
        "" => AppProtocol::Auto,
        "http" | "http1" => AppProtocol::Http1,
        "h2c" => AppProtocol::H2c,
        "grpc" => AppProtocol::Grpc,
        other => bail!("--app-port {text}: {other:?} is not http, h2c or grpc"),
    };
    Ok(AppPort { name: name.to_owned(), port, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_ports_take_a_name_and_a_protocol() {
        let port = parse_app_port("http=8080/h2c").unwrap();
        assert_eq!((port.name.as_str(), port.port), ("http", 8080));
        assert_eq!(port.protocol, AppProtocol::H2c);
        for bad in ["", "0", "a=", "70000", "80/quic", "x=y"] {
            assert!(parse_app_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn workers_are_a_number_or_auto() {
        assert!(parse_workers("auto").unwrap() >= 1);
        assert_eq!(parse_workers("2").unwrap(), 2);
        assert!(parse_workers("0").is_err() && parse_workers("many").is_err());
    }
}
