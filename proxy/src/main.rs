//! The lean sidecar binary for containers: `duet proxy` without the rest.

use clap::Parser;

// Measured against glibc's: see docs/performance.md.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Duet's sidecar proxy.
#[derive(Debug, Parser)]
#[command(name = "duet-proxy", version)]
struct Cli {
    #[command(flatten)]
    args: duet_proxy::Args,
}

fn main() -> anyhow::Result<()> {
    duet_proxy::run(Cli::parse().args)
}
