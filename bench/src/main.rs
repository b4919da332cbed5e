//! What the benchmark needs and no packaged tool is: an application that answers gRPC and accepts upgrades, and a
//! client that measures how fast bytes go through an upgraded connection. One thread each, so that they can be kept
//! on one processor.

mod serve;
mod tunnel;

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "bench-peer")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The application: HTTP/1.1 and HTTP/2 by prior knowledge on one port.
    Serve {
        /// Where.
        listen: SocketAddr,
    },
    /// Sends bytes through upgraded connections that echo them; prints bytes a second as JSON.
    Tunnel {
        /// Where.
        address: SocketAddr,
        /// Value of the Host header.
        #[arg(long)]
        host: String,
        /// How long.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
        /// How many at once.
        #[arg(long, default_value_t = 4)]
        connections: usize,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Serve { listen } => serve::run(listen).await,
        Command::Tunnel { address, host, seconds, connections } => {
            let time = Duration::from_secs(seconds);
            tunnel::run(address, &host, time, connections).await
        }
    }
}
