//! Whether the application accepts connections: readiness, registration and event delivery follow it. That it came up again
//! is told even if it was away too short a time to be seen away.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;

use crate::config::Config;
use crate::drain::Drain;
use crate::net;

use super::listener;

/// While it is not there: soon seen when it comes.
const AWAY_INTERVAL: Duration = Duration::from_millis(100);
/// While it is: soon seen when it goes.
const HERE_INTERVAL: Duration = Duration::from_millis(500);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Starts the probe of the first application port. Without one there is nothing to wait for: always ready.
pub(super) fn start(config: &Config, drain: &Drain) -> watch::Receiver<bool> {
    let Some(port) = config.app_ports.first() else {
        return watch::channel(true).1;
    };
    let address = SocketAddr::new(config.args.app_host, port.port);
    let (sender, receiver) = watch::channel(false);
    let force = drain.force.clone();
    drain.background.spawn(async move {
        let probe = async {
            let mut listener = None;
            loop {
                let connect = tokio::time::timeout(CONNECT_TIMEOUT, net::dial(address)).await;
                let accepts = matches!(connect, Ok(Ok(_)));
                drop(connect);
                let now = listener::at(address);
                // It came up again since the last time, and nobody saw it away.
                let again = now.is_some() && listener.is_some() && now != listener;
                listener = now.or(listener);
                sender.send_if_modified(|was| std::mem::replace(was, accepts) != accepts || again);
                tokio::time::sleep(if accepts { HERE_INTERVAL } else { AWAY_INTERVAL }).await;
            }
        };
        tokio::select! {
            () = probe => {}
            () = force.cancelled() => {}
        }
    });
    receiver
}
