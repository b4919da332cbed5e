//! Bytes through upgraded connections.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

/// One write.
const PIECE: usize = 16 * 1024;

pub(crate) async fn run(
    address: SocketAddr,
    host: &str,
    time: Duration,
    connections: usize,
) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    let one = |_| async {
        let stream = open(address, host).await?;
        anyhow::Ok(echo(stream, end).await)
    };
    let echoed = futures::future::try_join_all((0..connections).map(one)).await?;
    let bytes: u64 = echoed.iter().sum();
    let report = format!("{{\"bytes\": {bytes}, \"seconds\": {}}}\n", time.as_secs());
    tokio::io::stdout().write_all(report.as_bytes()).await?;
    Ok(())
}

async fn open(address: SocketAddr, host: &str) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await.context("connect")?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET /ws HTTP/1.1\r\nhost: {host}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.context("the upgrade's answer")?);
    }
    if !head.starts_with(b"HTTP/1.1 101") {
        bail!("no upgrade: {}", String::from_utf8_lossy(&head));
    }
    Ok(stream)
}

/// Writes without pause, and counts what comes back.
async fn echo(stream: TcpStream, end: Instant) -> u64 {
    let (mut from, mut to) = stream.into_split();
    let writer = tokio::spawn(async move {
        let piece = [b'x'; PIECE];
        while to.write_all(&piece).await.is_ok() {}
    });
    let mut buffer = vec![0; 4 * PIECE];
    let mut bytes = 0;
    while let Ok(Ok(read @ 1..)) = timeout_at(end, from.read(&mut buffer)).await {
        bytes += read as u64;
    }
    writer.abort();
    bytes
}
