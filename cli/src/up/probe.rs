//! Whether something is there yet.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::config::App;
use super::state::Replica;

const POLL: Duration = Duration::from_millis(50);
/// Most of an answer that is read.
const MAX_BYTES: u64 = 64 << 10;

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
    let late = |_elapsed| anyhow!("waited {limit:?}");
    tokio::time::timeout(limit, asking).await.map_err(late)
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
        // A connection that is closed on half of an answer is reset, and servers complain of that in their logs.
        let (mut rest, mut stream) = (Vec::new(), stream.take(MAX_BYTES));
        tokio::time::timeout(POLL, stream.read_to_end(&mut rest)).await.ok();
        Ok::<_, std::io::Error>(head.starts_with(b"HTTP/1.1 2") || head.starts_with(b"HTTP/1.0 2"))
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), ask).await, Ok(Ok(true)))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Answers one probe, in two pieces, and says how the connection ended.
    async fn serve(listener: TcpListener, status: &str) -> std::io::Result<usize> {
        let (mut stream, _) = listener.accept().await?;
        let mut request = [0; 1024];
        assert!(stream.read(&mut request).await? > 0);
        stream.write_all(format!("HTTP/1.1 {status}\r\n").as_bytes()).await?;
        tokio::task::yield_now().await;
        stream.write_all(b"content-length: 2\r\n\r\nok").await?;
        stream.shutdown().await?;
        stream.read(&mut request).await
    }

    #[tokio::test]
    async fn an_answer_is_read_to_its_end_so_that_no_server_sees_a_reset() {
        for (status, good) in [("200 OK", true), ("204 No Content", true), ("503 Down", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let (said, ended) = tokio::join!(answers(&address, "/"), serve(listener, status));
            assert_eq!((said, ended.map_err(|error| error.kind())), (good, Ok(0)), "{status}");
        }
    }

    #[tokio::test]
    async fn who_keeps_the_connection_open_is_ready_all_the_same() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            stream
        };
        let (said, _open) = tokio::join!(answers(&address, "/"), server);
        assert!(said);
    }
}
