//! Noticing a peer that vanished without a word.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::PingPong;
use tokio::time::{Instant, Sleep};

use super::Shared;

const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Pings after some silence, but only while streams are open: servers count other pings against us.
pub(super) struct KeepAlive {
    pings: PingPong,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
}

impl KeepAlive {
    pub(super) fn new(pings: PingPong) -> Self {
        Self { pings, timer: Box::pin(tokio::time::sleep(PING_INTERVAL)), waiting: false }
    }

    /// Ready when the peer is gone.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, shared: &Shared) -> Poll<()> {
        loop {
            if self.waiting
                && let Poll::Ready(answer) = self.pings.poll_pong(cx)
            {
                if answer.is_err() {
                    // The connection itself says why.
                    return Poll::Pending;
                }
                self.waiting = false;
                self.timer.as_mut().reset(Instant::now() + PING_INTERVAL);
            }
            ready!(self.timer.as_mut().poll(cx));
            if self.waiting {
                return Poll::Ready(());
            }
            let active = shared.active.swap(false, Ordering::Relaxed);
            let idle = shared.streams.load(Ordering::Relaxed) == 0;
            self.waiting = !active && !idle && self.pings.send_ping(h2::Ping::opaque()).is_ok();
            let wait = if self.waiting { PING_TIMEOUT } else { PING_INTERVAL };
            self.timer.as_mut().reset(Instant::now() + wait);
        }
    }
}
