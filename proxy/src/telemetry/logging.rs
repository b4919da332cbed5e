//! Set-up of the process's own log.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::LogFormat;

/// Sends `tracing` events to standard error.
///
/// # Errors
/// When the filter does not parse. A log that is set up already stays.
pub fn init(format: Option<LogFormat>, filter: &str) -> anyhow::Result<()> {
    let filter: Targets = filter.parse().with_context(|| format!("--log-level {filter}"))?;
    let terminal = std::io::stderr().is_terminal();
    let default = if terminal { LogFormat::Text } else { LogFormat::Json };
    let builder =
        tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_writer(std::io::stderr);
    let outcome = match format.unwrap_or(default) {
        LogFormat::Text => {
            builder.with_ansi(terminal).with_target(false).finish().with(filter).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).finish().with(filter).try_init(),
    };
    if outcome.is_err() {
        tracing::debug!("the log was set up before");
    }
    Ok(())
}
