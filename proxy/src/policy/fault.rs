//! Failures made on purpose. Pure: randomness is given.

use std::time::Duration;

/// What happens to which share of calls; shares in parts per million.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Share that waits.
    pub delay_ppm: u32,
    /// How long.
    pub delay: Duration,
    /// Share that fails.
    pub abort_ppm: u32,
    /// HTTP status of those.
    pub abort_status: u16,
    /// gRPC status of those; 0: as the HTTP status maps.
    pub abort_grpc_status: u16,
}

/// What happens to one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Wait first.
    pub delay: Option<Duration>,
    /// Then fail.
    pub abort: bool,
}

impl Fault {
    /// Decides, with two independent numbers below a million.
    #[must_use]
    pub fn decide(&self, (delay, abort): (u32, u32)) -> Fate {
        Fate {
            delay: (delay < self.delay_ppm).then_some(self.delay),
            abort: abort < self.abort_ppm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_kept() {
        let fault = Fault { delay_ppm: 50_000, abort_ppm: 10_000, ..Fault::default() };
        let fates = (0..1_000_000).step_by(100).map(|n| fault.decide((n, n)));
        let (mut delayed, mut aborted) = (0, 0);
        for fate in fates {
            delayed += u32::from(fate.delay.is_some());
            aborted += u32::from(fate.abort);
        }
        assert_eq!((delayed, aborted), (500, 100));
        assert_eq!(Fault::default().decide((0, 0)), Fate { delay: None, abort: false });
    }
}
