//! JSON access log: one line a call, written by a thread of its own so that a slow disk never holds up a call.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use anyhow::Context as _;
use prometheus::{IntCounter, Registry};
use serde::Serialize;

use crate::config::AccessLogTarget;

/// Lines waiting for the writer; more are dropped and counted.
const QUEUE_LINES: usize = 8192;
/// Wait for more lines after a first one.
const BATCH_TIME: Duration = Duration::from_millis(10);

/// One finished call.
#[derive(Debug, Serialize)]
pub struct Entry<'a> {
    /// RFC 3339.
    pub time: String,
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// Method.
    pub method: &'a str,
    /// Path and query as the application sent it.
    pub path: &'a str,
    /// The service called: `namespace/name:port`, or the application's port for inbound calls.
    pub service: &'a str,
    /// The route that matched.
    pub route: &'a str,
    /// SPIFFE id of the other side.
    pub peer: &'a str,
    /// Status sent to the caller.
    pub status: u16,
    /// From the trailers of a gRPC call.
    pub grpc_status: Option<u16>,
    /// RFC 9209 error type, where the mesh failed.
    pub error: Option<&'static str>,
    /// Tries made.
    pub attempts: u32,
    /// Until the last byte.
    pub duration_ms: f64,
    /// W3C trace context of the request.
    pub traceparent: Option<&'a str>,
}

/// Where calls are logged. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct AccessLog {
    lines: Option<(SyncSender<String>, IntCounter)>,
}

impl AccessLog {
    /// Opens the target and starts its writer thread.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(target: &AccessLogTarget, registry: &Registry) -> anyhow::Result<Self> {
        let output: Box<dyn Write + Send> = match target {
            AccessLogTarget::Off => return Ok(Self::default()),
            AccessLogTarget::Stdout => Box::new(std::io::stdout()),
            AccessLogTarget::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Box::new(file.with_context(|| format!("access log {}", path.display()))?)
            }
        };
        let dropped = IntCounter::new(
            "duet_access_log_dropped_lines_total",
            "Access log lines dropped because the writer could not keep up.",
        )?;
        registry.register(Box::new(dropped.clone()))?;
        let (sender, receiver) = sync_channel(QUEUE_LINES);
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_lines(&receiver, output))?;
        Ok(Self { lines: Some((sender, dropped)) })
    }

    /// Whether entries go anywhere; ask before building one.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.lines.is_some()
    }

    /// Logs one call.
    pub fn write(&self, entry: &Entry<'_>) {
        let Some((sender, dropped)) = &self.lines else {
            return;
        };
        let Ok(mut line) = serde_json::to_string(entry) else {
            return;
        };
        line.push('\n');
        match sender.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => dropped.inc(),
        }
    }
}

fn write_lines(lines: &Receiver<String>, mut output: Box<dyn Write + Send>) {
    while let Ok(mut batch) = lines.recv() {
        // Lines that come close together are written together, and wake nobody.
        std::thread::sleep(BATCH_TIME);
        for line in lines.try_iter() {
            batch.push_str(&line);
        }
        if let Err(error) = output.write_all(batch.as_bytes()).and_then(|()| output.flush()) {
            tracing::warn!(%error, "the access log cannot be written");
        }
    }
}
