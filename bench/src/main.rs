//! What the benchmark needs and no packaged tool is: an application that answers gRPC and accepts upgrades, a client
//! that measures how fast bytes go through an upgraded connection, and publishers and subscribers of events, for Duet
//! and for a NATS client. One thread each, so that they can be kept on one processor.

mod deliver;
mod publish;
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
    /// Makes a JetStream stream, on disk.
    Stream {
        /// `nats://…`.
        to: String,
        /// Its name.
        #[arg(long)]
        name: String,
        /// Its subjects.
        #[arg(long)]
        subject: String,
    },
    /// Publishes events and waits for their acknowledgements; prints how many a second, and how long they took, as JSON.
    Publish {
        /// `nats://…` for JetStream, `http://…` for a sidecar's API, `grpc://…` for its gRPC API.
        to: String,
        /// Topic, or subject of a stream that exists.
        #[arg(long)]
        topic: String,
        /// Events without an acknowledgement at a time.
        #[arg(long)]
        in_flight: usize,
        /// Events of one request; more than 1 is a `CloudEvents` batch. For sidecars, over HTTP.
        #[arg(long, default_value_t = 1)]
        batch: usize,
        /// Bytes of data of each.
        #[arg(long, default_value_t = 256)]
        size: usize,
        /// How long.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
    },
    /// Publishes at a steady rate and measures until the application has the event; prints milliseconds as JSON.
    Deliver {
        /// `nats://…` for JetStream, `http://…` for a sidecar's API.
        to: String,
        /// Topic, or subject of a stream that exists.
        #[arg(long)]
        topic: String,
        /// Where the application listens for its sidecar's deliveries. For sidecars.
        #[arg(long)]
        listen: Option<SocketAddr>,
        /// Events a second.
        #[arg(long, default_value_t = 1000)]
        rate: u32,
        /// Bytes of data of each.
        #[arg(long, default_value_t = 256)]
        size: usize,
        /// How long.
        #[arg(long, default_value_t = 5)]
        seconds: u64,
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
        Command::Stream { to, name, subject } => publish::make_stream(&to, name, subject).await,
        Command::Publish { to, topic, in_flight, batch, size, seconds } => {
            let load = publish::Load {
                topic,
                in_flight,
                batch: batch.max(1),
                size,
                time: Duration::from_secs(seconds),
            };
            publish::run(&to, load).await
        }
        Command::Deliver { to, topic, listen, rate, size, seconds } => {
            let load = deliver::Load { topic, rate, size, time: Duration::from_secs(seconds) };
            Box::pin(deliver::run(&to, listen, load)).await
        }
    }
}
