//! The admin port: `/metrics`, `/live` and `/ready`, plain HTTP, nothing that changes state; and how a port for people
//! and their tools is served, which the operator's is, too. Imports nothing but libraries.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use prometheus::{Encoder as _, TextEncoder};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A client that does not say what it wants is let go after this.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// No connection takes requests for longer than this; scrapers connect again.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(300);
/// For what is in flight when the process ends, and on the admin port also when a connection's time is over.
const GRACE: Duration = Duration::from_secs(5);
/// A client that takes nothing of its answer is let go after this.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections at once.
const MAX_CONNECTIONS: usize = 256;

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Every metric of the process.
    pub registry: prometheus::Registry,
    /// Everything is bound and loaded, and no drain has begun.
    pub ready: Arc<AtomicBool>,
}

impl Admin {
    fn router(self) -> Router {
        Router::new()
            .route("/metrics", get(metrics))
            .route("/live", get(async || "live\n"))
            .route("/ready", get(ready))
            .with_state(self)
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let encoder = TextEncoder::new();
    let mut text = Vec::new();
    match encoder.encode(&admin.registry.gather(), &mut text) {
        Ok(()) => {
            ([(header::CONTENT_TYPE, encoder.format_type().to_owned())], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn ready(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    match admin.ready.load(Ordering::Acquire) {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

/// What becomes of an answer that is under way when its connection's time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overtime {
    /// It has a few seconds more: no answer of this port takes long.
    Cut,
    /// It ends in its own time, as long as the client takes it: a backup is as long as its bus.
    Finish,
}

/// Serves until `stop`.
pub async fn serve(
    listener: TcpListener,
    admin: Admin,
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    serve_router(listener, (admin.router(), Overtime::Cut), tracker, stop).await;
}

/// Serves any pages until `stop`, with the bounds that a port for people and their tools needs.
pub async fn serve_router(
    listener: TcpListener,
    (router, overtime): (Router, Overtime),
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = async {
        while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file handles, most likely: let some be closed.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let (router, stop) = (router.clone(), stop.clone());
            tracker.spawn(async move {
                serve_connection(stream, router, overtime, stop).await;
                drop(slot);
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        () = stop.cancelled() => {}
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    overtime: Overtime,
    stop: CancellationToken,
) {
    let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
    server.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    let service = TowerToHyperService::new(router);
    let connection = server.serve_connection(TokioIo::new(Taken::new(stream)), service);
    tokio::pin!(connection);
    let grace = tokio::select! {
        outcome = connection.as_mut() => return log(outcome),
        () = stop.cancelled() => Some(GRACE),
        () = tokio::time::sleep(CONNECTION_LIFETIME) => (overtime == Overtime::Cut).then_some(GRACE),
    };
    connection.as_mut().graceful_shutdown();
    let over = async {
        match grace {
            Some(grace) => tokio::time::sleep(grace).await,
            None => {
                stop.cancelled().await;
                tokio::time::sleep(GRACE).await;
            }
        }
    };
    tokio::select! {
        outcome = connection => log(outcome),
        () = over => tracing::debug!("admin connection: cut in the middle of an answer"),
    }
}

fn log(outcome: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    match outcome {
        Ok(()) => tracing::debug!("admin connection closed"),
        Err(error) => tracing::debug!("admin connection: {error}"),
    }
}

/// A stream whose other end has to take what is written: a write that stays undone is an error in the end. What takes
/// its time on this side does not count.
struct Taken<S> {
    stream: S,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Taken<S> {
    fn new(stream: S) -> Self {
        Self { stream, stalled: None }
    }

    fn bounded<T>(
        &mut self,
        context: &mut Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.stalled = None;
            return outcome;
        }
        let started = || Box::pin(tokio::time::sleep(STALL_TIMEOUT));
        ready!(self.stalled.get_or_insert_with(started).as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Taken<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Taken<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.bounded(context, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.bounded(context, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(context);
        self.bounded(context, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(context);
        self.bounded(context, outcome)
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, Bytes};
    use futures::stream;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::time::{Instant, sleep};

    use super::*;

    const REQUEST: &[u8] = b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n";
    /// Longer than a connection's life.
    const PIECES: u32 = 10;

    /// An answer that comes piece by piece, one in 100 s.
    fn slow() -> Router {
        let page = async || {
            Body::from_stream(stream::unfold(0, async |piece| {
                sleep(Duration::from_secs(100)).await;
                let bytes = Ok::<_, io::Error>(Bytes::from("piece"));
                (piece < PIECES).then_some((bytes, piece + 1))
            }))
        };
        Router::new().route("/slow", get(page))
    }

    /// A client's end after it asked, and when the connection is over.
    async fn ask(
        router: Router,
        overtime: Overtime,
        stop: &CancellationToken,
    ) -> (DuplexStream, tokio::task::JoinHandle<Duration>) {
        let (mut client, server) = duplex(1 << 10);
        client.write_all(REQUEST).await.unwrap();
        let (stop, begun) = (stop.clone(), Instant::now());
        let served = tokio::spawn(async move {
            serve_connection(server, router, overtime, stop).await;
            begun.elapsed()
        });
        (client, served)
    }

    async fn read(mut client: DuplexStream) -> String {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_under_way_outlives_its_connection_on_the_operators_port() {
        let (client, served) = ask(slow(), Overtime::Finish, &CancellationToken::new()).await;
        let answer = read(client).await;
        assert_eq!(answer.matches("piece").count(), 10, "{answer}");
        // The end of the chunks, and of the connection.
        assert!(answer.ends_with("0\r\n\r\n"), "{answer}");
        assert_eq!(served.await.unwrap().as_secs(), 1100);
    }

    #[tokio::test(start_paused = true)]
    async fn it_does_not_on_the_admin_port() {
        let (client, served) = ask(slow(), Overtime::Cut, &CancellationToken::new()).await;
        let answer = read(client).await;
        assert!(answer.contains("piece") && !answer.ends_with("0\r\n\r\n"), "{answer}");
        assert_eq!(served.await.unwrap(), CONNECTION_LIFETIME + GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_process_does_not_wait_for_an_answer() {
        for (overtime, before) in
            [(Overtime::Cut, 150), (Overtime::Finish, 150), (Overtime::Finish, 450)]
        {
            let stop = CancellationToken::new();
            let (client, served) = ask(slow(), overtime, &stop).await;
            let before = Duration::from_secs(before);
            let (_answer, ()) = tokio::join!(read(client), async {
                sleep(before).await;
                stop.cancel();
            });
            assert_eq!(served.await.unwrap(), before + GRACE);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_takes_nothing_of_an_answer_is_let_go() {
        let large = Router::new().route("/slow", get(async || vec![0_u8; 1 << 20]));
        for overtime in [Overtime::Cut, Overtime::Finish] {
            let stop = CancellationToken::new();
            let (client, served) = ask(large.clone(), overtime, &stop).await;
            assert_eq!(served.await.unwrap(), STALL_TIMEOUT);
            drop(client);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_client_that_says_nothing() {
        let (client, server) = duplex(1 << 10);
        let begun = Instant::now();
        serve_connection(server, slow(), Overtime::Finish, CancellationToken::new()).await;
        assert!(begun.elapsed() <= HEADER_TIMEOUT * 2, "{:?}", begun.elapsed());
        drop(client);
    }
}
