//! `duet`: the one command people type.
//!
//! - [`up`] runs a whole mesh on this machine from a `duet.yaml`; [`run`] puts a sidecar beside one process.
//! - [`check`] validates resources, [`explain`] says what they mean for one request; [`token`] makes join tokens;
//!   [`events`] looks after what waits on the buses.
//! - `control-plane` and `proxy` are the two servers themselves, from their own crates.
//!
//! [`process`] starts, watches and ends child processes; [`resources`] finds what commands are given to read;
//! [`output`] is the only place that prints.

mod check;
mod events;
mod exec_app;
mod explain;
mod output;
mod process;
mod resources;
mod run;
mod token;
mod up;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

// Measured against glibc's: see docs/performance.md.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Duet: a service mesh for calls and events.
#[derive(Debug, Parser)]
#[command(name = "duet", version, propagate_version = true)]
#[command(after_help = "\
Examples:
  duet up examples/shop                     run a mesh with all its services on this machine
  duet run --service web --port 8000 -- python3 -m http.server 8000
  duet check examples/shop                  find mistakes in resources before they are applied
  duet explain --config examples/shop --from orders http://inventory/stock
  duet completion bash > /etc/bash_completion.d/duet")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a mesh on this machine: control plane, services, and a sidecar beside each.
    Up(up::Args),
    /// Put a sidecar beside one process, in a mesh that runs already.
    Run(run::Args),
    /// Run the control plane.
    #[command(after_help = "Example:\n  duet control-plane --config mesh/ --state /var/lib/duet")]
    ControlPlane(Box<duet_control_plane::Args>),
    /// Run a sidecar proxy.
    #[command(after_help = "Example:\n  duet proxy --service web --app-port http=8000 \\\n    \
        --control-plane 10.0.0.1:15012 --token-file web.token --state /var/lib/duet")]
    Proxy(Box<duet_proxy::Args>),
    /// Validate resource files without applying them.
    Check(check::Args),
    /// Say how a request would be treated, without sending it.
    Explain(explain::Args),
    /// See what waits on the buses; publish, replay, deal with dead letters.
    Events(events::Args),
    /// Make, list and revoke join tokens, and revoke identities.
    Token(token::Args),
    /// Print a shell completion script.
    Completion {
        /// bash, elvish, fish, powershell or zsh.
        shell: clap_complete::Shell,
    },
    /// Print the version.
    Version,
    #[command(hide = true)]
    ExecApp(exec_app::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Up(args) => up::up(args),
        Command::Run(args) => run::run(&args),
        Command::ControlPlane(args) => duet_control_plane::run(*args).map(|()| ExitCode::SUCCESS),
        Command::Proxy(args) => duet_proxy::run(*args).map(|()| ExitCode::SUCCESS),
        Command::Check(args) => check::check(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Events(args) => events::events(args).map(|()| ExitCode::SUCCESS),
        Command::Token(args) => token::token(args).map(|()| ExitCode::SUCCESS),
        Command::Completion { shell } => {
            output::completion(shell, &mut Cli::command()).map(|()| ExitCode::SUCCESS)
        }
        Command::Version => {
            let version = format!("duet {}", env!("CARGO_PKG_VERSION"));
            output::answer(&version).map(|()| ExitCode::SUCCESS)
        }
        Command::ExecApp(args) => exec_app::exec(&args),
    };
    outcome.unwrap_or_else(|error| output::failed(&error))
}
