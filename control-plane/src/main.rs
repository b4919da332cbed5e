//! The lean control-plane binary for containers: `duet control-plane` without the rest.

use clap::Parser;

/// Duet's control plane.
#[derive(Debug, Parser)]
#[command(name = "duet-control-plane", version)]
struct Cli {
    #[command(flatten)]
    args: duet_control_plane::Args,
}

fn main() -> anyhow::Result<()> {
    duet_control_plane::run(Cli::parse().args)
}
