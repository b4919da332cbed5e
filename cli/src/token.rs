//! `duet token`: join tokens, made on a control plane's state folder.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use duet_control_plane::token::{TokenRequest, create, list, revoke};

use crate::output;

/// Make, list and revoke join tokens.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet token create --state /var/lib/duet --namespace shop --service-account orders
  duet token create --state /var/lib/duet --namespace shop --service-account ci --single-use --lifetime 10m
  duet token list --state /var/lib/duet
  duet token revoke --state /var/lib/duet 3f0c…

The state folder is the control plane's (--state); it need not be running.")]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a token and print it.
    Create {
        /// The control plane's state folder.
        #[arg(long, env = "DUET_STATE")]
        state: PathBuf,
        /// Namespace of the workload.
        #[arg(long, default_value = duet_api::DEFAULT_NAMESPACE)]
        namespace: String,
        /// Service account of the workload; usually named like its service.
        #[arg(long)]
        service_account: String,
        /// How long the token can be used.
        #[arg(long, default_value = "24h", value_parser = duet_api::duration::parse)]
        lifetime: Duration,
        /// The token can be used once only.
        #[arg(long)]
        single_use: bool,
        /// Trust domain of the mesh.
        #[arg(long, default_value = "duet.local")]
        trust_domain: String,
    },
    /// List the tokens that were made.
    List {
        /// The control plane's state folder.
        #[arg(long, env = "DUET_STATE")]
        state: PathBuf,
    },
    /// Make a token useless from now on. Certificates that it gave stay valid until they expire.
    Revoke {
        /// The control plane's state folder.
        #[arg(long, env = "DUET_STATE")]
        state: PathBuf,
        /// The token's id, as `list` prints it.
        id: String,
    },
}

/// Does what was asked.
pub(crate) fn token(args: Args) -> anyhow::Result<()> {
    match args.action {
        Action::Create {
            state,
            namespace,
            service_account,
            lifetime,
            single_use,
            trust_domain,
        } => {
            let request =
                TokenRequest { namespace, service_account, lifetime, single_use, trust_domain };
            output::answer(&create(&state, &request)?)?;
        }
        Action::List { state } => {
            for token in list(&state)? {
                let flags = [
                    (token.claims.single_use, "single-use"),
                    (token.used, "used"),
                    (token.revoked, "revoked"),
                    (token.expired, "expired"),
                ];
                let flags: Vec<&str> =
                    flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
                let claims = &token.claims;
                output::answer(&format!("{}  {}  {}", claims.jti, claims.sub, flags.join(",")))?;
            }
        }
        Action::Revoke { state, id } => revoke(&state, &id)?,
    }
    Ok(())
}
