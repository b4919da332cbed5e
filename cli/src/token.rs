//! `duet token`: join tokens and revoked identities, on a control plane's state folder.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use duet_control_plane::revoked::{self, Identity};
use duet_control_plane::token::{TokenRequest, create, list, revoke};

use crate::output;

/// Make, list and revoke join tokens, and revoke identities.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet token create --state /var/lib/duet --namespace shop --service-account orders
  duet token create --state /var/lib/duet --namespace shop --service-account ci --single-use --lifetime 10m
  duet token list --state /var/lib/duet
  duet token revoke --state /var/lib/duet 3f0c…
  duet token revoke --state /var/lib/duet --identity shop/orders
  duet token restore --state /var/lib/duet --identity shop/orders

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
    /// List the tokens that were made, and the identities that are revoked.
    List {
        /// The control plane's state folder.
        #[arg(long, env = "DUET_STATE")]
        state: PathBuf,
    },
    /// Make a token useless from now on, or shut an identity out.
    ///
    /// Who joined with a token keeps its certificate, and renews it for ever. With --identity, the control plane renews no
    /// certificate of that identity, takes no token for it, and cuts its connections within seconds: it gets no
    /// configuration and no events, and its replicas are forgotten when their leases end. The other sidecars are told,
    /// and cut its connections as well. One that the control plane cannot reach learns it when it is back.
    Revoke {
        /// The control plane's state folder.
        #[arg(long, env = "DUET_STATE")]
        state: PathBuf,
        /// The token's id, as `list` prints it.
        #[arg(required_unless_present = "identity")]
        id: Option<String>,
        /// The identity to shut out.
        #[arg(long, value_name = "NAMESPACE/SERVICE_ACCOUNT", conflicts_with = "id")]
        identity: Option<Identity>,
    },
    /// Let an identity in again that was revoked.
    ///
    /// Certificates that it got before are good again, also a stolen one: wait until they have expired, 24 hours after
    /// the identity was revoked.
    Restore {
        /// The control plane's state folder.
        #[arg(long, env = "DUET_STATE")]
        state: PathBuf,
        /// The identity.
        #[arg(long, value_name = "NAMESPACE/SERVICE_ACCOUNT")]
        identity: Identity,
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
            for identity in revoked::list(&state)? {
                output::answer(&format!("identity {identity}  revoked"))?;
            }
        }
        Action::Revoke { state, id, identity } => {
            id.map_or(Ok(()), |id| revoke(&state, &id))?;
            identity.map_or(Ok(()), |identity| revoked::revoke(&state, &identity))?;
        }
        Action::Restore { state, identity } => revoked::restore(&state, &identity)?,
    }
    Ok(())
}
