//! What the sidecar tells about itself: metrics, access log, its own log. Imports nothing but `config`.

pub mod access_log;
pub mod logging;
pub mod metrics;
