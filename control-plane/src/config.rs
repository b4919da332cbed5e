//! Flags and environment, as people give them. Imports [`crate::telemetry`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::telemetry::LogFormat;

/// Default lease of a registration: the contract's 15 s.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(15);

/// What people give: flags, or `DUET_…` environment variables.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// File or folder of resources, watched for changes (repeatable).
    #[arg(long, env = "DUET_CONFIG", value_name = "PATH", value_delimiter = ',')]
    pub config: Vec<PathBuf>,
    /// Folder for the mesh CA, the event bus and the registrations.
    #[arg(long, env = "DUET_STATE", value_name = "DIR", default_value = ".duet/control-plane")]
    pub state: PathBuf,
    /// Trust domain of the mesh; fixed once the CA exists.
    #[arg(long, env = "DUET_TRUST_DOMAIN", default_value = "duet.local")]
    pub trust_domain: String,
    /// Where sidecars connect (gRPC over TLS 1.3).
    #[arg(long, env = "DUET_LISTEN", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// /metrics, /live and /ready.
    #[arg(long, env = "DUET_ADMIN_LISTEN", default_value = "0.0.0.0:15014")]
    pub admin_listen: SocketAddr,
    /// What `duet events` talks to: reads and changes topics, without asking who it is. On loopback only.
    #[arg(long, env = "DUET_OPERATOR_LISTEN", default_value = "127.0.0.1:15016")]
    pub operator_listen: SocketAddr,
    /// Let --operator-listen be an address that other machines reach. Whoever reaches it can read and drop every event.
    #[arg(long, env = "DUET_OPERATOR_ANYWHERE")]
    pub operator_anywhere: bool,
    /// How long a registration lasts that is not renewed.
    #[arg(long, env = "DUET_LEASE", default_value = "15s", value_parser = lease)]
    pub lease: Duration,
    /// Threads that serve sidecars: 1 to 256, or auto for half the processors (each embedded bus has a thread of its own
    /// besides).
    #[arg(long, env = "DUET_CONTROL_PLANE_WORKERS", default_value = "auto", value_parser = workers)]
    pub workers: usize,
    /// Let routes send to other namespaces only where a grant says so (a mesh does not need grants:
    /// GEP-1294).
    #[arg(long, env = "DUET_REQUIRE_REFERENCE_GRANTS")]
    pub require_reference_grants: bool,
    /// File to write the chosen ports to, as JSON, once everything is bound.
    #[arg(long, env = "DUET_PORTS_FILE", value_name = "FILE")]
    pub ports_file: Option<PathBuf>,
    /// Stop when the parent process dies.
    #[arg(long, env = "DUET_EXIT_WITH_PARENT")]
    pub exit_with_parent: bool,
    /// Log format: text or json [default: text on a terminal, else json].
    #[arg(long, env = "DUET_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Log filter, such as `info` or `duet_control_plane=debug`.
    #[arg(long, env = "DUET_LOG", default_value = "info")]
    pub log_level: String,
}

fn workers(text: &str) -> Result<usize, String> {
    if text == "auto" {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        return Ok(processors.div_ceil(2));
    }
    match text.parse() {
        Ok(workers @ 1..=256) => Ok(workers),
        _ => Err("give a number of 1 to 256, or auto".to_owned()),
    }
}

/// A lease must leave room for a few renewals and must end within a day.
fn lease(text: &str) -> Result<Duration, String> {
    let lease = duet_api::duration::parse(text).map_err(|error| error.to_string())?;
    if (Duration::from_millis(500)..=Duration::from_secs(86_400)).contains(&lease) {
        Ok(lease)
    } else {
        Err(format!("a lease must be 500ms to 1d, not {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_a_number_or_auto() {
        assert!(workers("auto").unwrap() >= 1);
        assert_eq!(workers("2"), Ok(2));
        assert!(workers("0").is_err() && workers("257").is_err() && workers("many").is_err());
    }

    #[test]
    fn a_lease_has_bounds() {
        assert_eq!(lease("15s"), Ok(DEFAULT_LEASE));
        assert!(lease("0s").unwrap_err().contains("500ms to 1d"));
        assert!(lease("2d").is_err());
        assert!(lease("15").is_err());
    }
}
