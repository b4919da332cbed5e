//! Whether something is there yet.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::config::App;
use super::state::Replica;

const POLL: Duration = Duration::from_millis(50);

/// The ports file of a process, once it is there.
pub(crate) async fn ports<T: DeserializeOwned>(file: &Path, limit: Duration) -> anyhow::Result<T> {
    within(limit, || async { file.exists() }).await?;
    let text = std::fs::read(file)?;
    serde_json::from_slice(&text).with_context(|| file.display().to_string())
}

/// Asks again and again until the answer is yes.
pub(crate) async fn within<F: Future<Output = bool>>(
    limit: Duration,
    ask: impl Fn() -> F,
) -> anyhow::Result<()> {
    let asking = async {
        while !ask().await {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(limit, asking).await.with_context(|| format!("waited {limit:?}"))
}

pub(crate) async fn ready(replica: &Replica, app: &App) -> bool {
    let address = format!("127.0.0.1:{}", replica.app.port);
    let own = match &app.readiness {
        Some(path) => answers(&address, path).await,
        None => TcpStream::connect(&address).await.is_ok(),
    };
    own && answers(&replica.sidecar.metrics, "/ready").await
}

/// Whether a `GET` is answered with 2xx.
pub(crate) async fn answers(address: &str, path: &str) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        Ok::<_, std::io::Error>(head.starts_with(b"HTTP/1.1 2") || head.starts_with(b"HTTP/1.0 2"))
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), ask).await, Ok(Ok(true)))
}
