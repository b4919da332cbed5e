//! Keeps one process running: starts it, starts it again when it ends, ends it when told to.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Stop;
use crate::output;
use crate::process::{GRACE, Log, Process, Spec, describe};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// A process that ran this long is healthy: the next crash is a first one.
const HEALTHY: Duration = Duration::from_secs(30);

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Started, with its process id.
    Started(u32),
    /// Ended by itself; will be started again.
    Crashed,
}

/// The wait before the next start after `crashes` in a row.
pub(crate) fn backoff(crashes: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << crashes.saturating_sub(1).min(16)).min(LONGEST_BACKOFF)
}

/// Runs until `stop`. `spec` is asked before each start, as ports are known only after the first.
pub(crate) async fn run(
    name: String,
    spec: impl Fn() -> Spec,
    log: Rc<Log>,
    (end, stop): (CancellationToken, Stop),
    told: impl Fn(Event),
) {
    let mut crashes = 0;
    while !end.is_cancelled() {
        let started = Instant::now();
        match Process::start(&spec(), &log) {
            Ok(mut process) => {
                told(Event::Started(process.pid()));
                tokio::select! {
                    ended = process.wait() => {
                        told(Event::Crashed);
                        let how = ended.map_or_else(|error| error.to_string(), describe);
                        output::note(&format!("{name} {how}; starting it again"));
                        // What it started and left behind would hold its port.
                        process.signal(rustix::process::Signal::KILL);
                    }
                    () = end.cancelled() => {
                        process.end(GRACE, stop.now.clone()).await;
                        return;
                    }
                }
            }
            Err(error) => output::note(&format!("{name}: {error:#}")),
        }
        crashes = if started.elapsed() > HEALTHY { 1 } else { crashes + 1 };
        tokio::select! {
            () = tokio::time::sleep(backoff(crashes)) => {}
            () = end.cancelled() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_ten_seconds() {
        assert_eq!(backoff(1), Duration::from_millis(200));
        assert_eq!(backoff(2), Duration::from_millis(400));
        assert_eq!(backoff(60), Duration::from_secs(10));
    }
}
