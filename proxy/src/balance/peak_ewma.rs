//! Peak-sensitive moving average of latency, as Finagle and Linkerd use it: it jumps up to a slower sample at
//! once and comes down slowly, so that an endpoint that gets slow loses traffic within one response.

use std::time::Duration;

/// Estimate of an endpoint that has answered nothing yet.
pub const INITIAL: Duration = Duration::from_millis(30);
/// Time in which an old sample loses most of its weight.
const DECAY: Duration = Duration::from_secs(10);
/// What a failure or a 429 counts as, so that an endpoint that fails fast does not look fast.
pub const PENALTY: Duration = Duration::from_secs(1);

/// The estimate for one endpoint. Times are seconds of any steady clock.
#[derive(Clone, Copy, Debug)]
pub struct PeakEwma {
    estimate: f64,
    at: f64,
}

impl PeakEwma {
    /// Starts with [`INITIAL`].
    #[must_use]
    pub fn new(now: f64) -> Self {
        Self { estimate: INITIAL.as_secs_f64(), at: now }
    }

    /// Takes a sample in.
    pub fn observe(&mut self, sample: Duration, now: f64) {
        let sample = sample.as_secs_f64();
        let current = self.value(now);
        let weight = self.weight(now);
        self.estimate = if sample > current {
            sample
        } else {
            self.estimate * weight + sample * (1.0 - weight)
        };
        self.at = now;
    }

    /// The estimate now: without samples it fades, so that a penalised endpoint is tried again.
    #[must_use]
    pub fn value(&self, now: f64) -> f64 {
        self.estimate * self.weight(now)
    }

    fn weight(&self, now: f64) -> f64 {
        // Not the C library's: nothing else in a sidecar needs libm.so, which takes a third of a MiB.
        libm::exp(-(now - self.at).max(0.0) / DECAY.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_jumps_up_and_comes_down_slowly() {
        let mut ewma = PeakEwma::new(0.0);
        ewma.observe(Duration::from_millis(500), 0.1);
        assert!((ewma.value(0.1) - 0.5).abs() < 1e-9);
        ewma.observe(Duration::from_millis(1), 0.2);
        assert!(ewma.value(0.2) > 0.45);
        for n in 0..1000 {
            ewma.observe(Duration::from_millis(1), 0.2 + f64::from(n) / 10.0);
        }
        assert!(ewma.value(100.2) < 0.002);
    }
}
