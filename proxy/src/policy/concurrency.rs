//! How many requests an application works on at once: a fixed limit, or one that is found by measuring latency. Pure: times
//! are microseconds of one steady clock, shared by all workers.
//!
//! The adaptive limit is a gradient, as in Netflix' concurrency-limits and Envoy: latency without load against latency
//! now says how much of what is in flight only waits. Latency without load is taken while there is little load; under
//! constant pressure the limit is lowered for a few requests now and then to measure it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

/// Limit before anything was measured.
const INITIAL: u32 = 100;
const LEAST: u32 = 3;
const MOST: u32 = 100_000;
/// Time and answers that one step of the limit takes.
const WINDOW: u64 = 100_000;
const WINDOW_ANSWERS: usize = 20;
/// Answers that are kept of a window; more of them change nothing.
const KEPT_ANSWERS: usize = 512;
/// Answers that measure latency without load.
const PROBE_ANSWERS: usize = 25;
/// A probe that gets too few answers ends.
const PROBE_TIME: u64 = 1_000_000;
/// Under pressure, the first probe and the others.
const FIRST_PROBE: u64 = 1_000_000;
const PROBE_INTERVAL: u64 = 10_000_000;
/// Latency that counts as no queue, against latency without load.
const TOLERANCE: f64 = 1.25;

/// One limit.
#[derive(Debug)]
pub struct Limiter {
    limit: AtomicU32,
    in_flight: AtomicU32,
    /// Most in flight in this window.
    peak: AtomicU32,
    /// A request was shed in this window.
    shed: AtomicBool,
    max: u32,
    adaptive: Option<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    window_start: u64,
    answers: Vec<u64>,
    /// Latency without load.
    base: Option<u64>,
    next_probe: u64,
    probe: Option<Probe>,
}

/// The limit is lowered to measure latency without load.
#[derive(Debug)]
struct Probe {
    start: u64,
    former_limit: u32,
}

impl Limiter {
    /// At most `max` (0: no bound), or an adaptive limit of at most that.
    #[must_use]
    pub fn new(max: u32, adaptive: bool) -> Self {
        let max = if max == 0 { MOST } else { max };
        Self {
            limit: AtomicU32::new(if adaptive { INITIAL.min(max) } else { max }),
            in_flight: AtomicU32::new(0),
            peak: AtomicU32::new(0),
            shed: AtomicBool::new(false),
            max,
            adaptive: adaptive.then(Mutex::default),
        }
    }

    /// The limit now.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Takes a request on; `false` sheds it. Each `true` is followed by one [`Limiter::leave`].
    pub fn enter(&self) -> bool {
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        if in_flight > self.limit() {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            self.shed.store(true, Ordering::Relaxed);
            return false;
        }
        if self.adaptive.is_some() {
            self.peak.fetch_max(in_flight, Ordering::Relaxed);
        }
        true
    }

    /// Takes a request on that must not be shed; followed by one [`Limiter::leave`].
    pub fn enter_always(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// A request is over. `answered`: when it began, and when the application answered it, if it did.
    pub fn leave(&self, answered: Option<(u64, u64)>) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        if let (Some(state), Some((began, now))) = (&self.adaptive, answered) {
            self.learn(&mut state.lock(), began, now);
        }
    }

    fn learn(&self, state: &mut State, began: u64, now: u64) {
        if state.window_start == 0 {
            (state.window_start, state.next_probe) = (now, now + FIRST_PROBE);
        }
        if let Some(probe) = &state.probe {
            // What began before waited in the old queue.
            if began >= probe.start {
                state.answers.push(now - began);
            }
            let over = now.saturating_sub(probe.start) > PROBE_TIME;
            if state.answers.len() >= PROBE_ANSWERS || over {
                self.end_probe(state, now);
            }
            return;
        }
        if state.answers.len() < KEPT_ANSWERS {
            state.answers.push(now.saturating_sub(began));
        }
        let enough = state.answers.len() >= WINDOW_ANSWERS;
        if enough && now.saturating_sub(state.window_start) >= WINDOW {
            self.step(state, now);
        }
    }

    fn end_probe(&self, state: &mut State, now: u64) {
        let Some(probe) = state.probe.take() else { return };
        if let Some(median) = median(&mut state.answers) {
            state.base = Some(median.max(1));
        }
        self.limit.store(probe.former_limit, Ordering::Relaxed);
        state.next_probe = now + PROBE_INTERVAL;
        self.next_window(state, now);
    }

    fn step(&self, state: &mut State, now: u64) {
        let limit = self.limit();
        let peak = self.peak.load(Ordering::Relaxed);
        let pressed = self.shed.load(Ordering::Relaxed) || peak >= limit;
        let Some(latency) = median(&mut state.answers) else { return };
        let relaxed = !pressed && peak <= limit / 2;
        let base = match state.base {
            // Little load shows what the application takes by itself, also when that has changed.
            Some(base) if relaxed => latency.midpoint(base),
            Some(base) => base.min(latency),
            None => latency,
        };
        state.base = Some(base.max(1));
        if pressed && now >= state.next_probe {
            state.probe = Some(Probe { start: now, former_limit: limit });
            self.limit.store((limit / 4).max(LEAST).min(self.max), Ordering::Relaxed);
        } else if !relaxed {
            self.limit.store(self.next_limit(limit, base, latency), Ordering::Relaxed);
        }
        self.next_window(state, now);
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "latencies and limits are far below 2^52, and the result is clamped"
    )]
    fn next_limit(&self, limit: u32, base: u64, latency: u64) -> u32 {
        let gradient = (base as f64 * TOLERANCE / latency.max(1) as f64).clamp(0.5, 2.0);
        let next = f64::from(limit) * gradient;
        let next = next + next.sqrt();
        (next.min(f64::from(MOST)) as u32).clamp(LEAST, self.max.max(LEAST)).min(self.max)
    }

    fn next_window(&self, state: &mut State, now: u64) {
        state.answers.clear();
        state.window_start = now;
        self.peak.store(self.in_flight.load(Ordering::Relaxed), Ordering::Relaxed);
        self.shed.store(false, Ordering::Relaxed);
    }
}

fn median(answers: &mut [u64]) -> Option<u64> {
    let middle = answers.len() / 2;
    if answers.is_empty() { None } else { Some(*answers.select_nth_unstable(middle).1) }
}

#[cfg(test)]
mod tests {
    use std::collections::BinaryHeap;

    use super::*;

    #[test]
    fn a_fixed_limit_sheds_what_is_over_it() {
        let limiter = Limiter::new(2, false);
        assert!(limiter.enter() && limiter.enter() && !limiter.enter());
        limiter.leave(None);
        assert!(limiter.enter());
    }

    /// What became of a simulated load: good answers per second, and the longest latency, after two seconds.
    struct Outcome {
        goodput: f64,
        slowest: u64,
        limit: u32,
    }

    /// An application with `workers` that take `service` microseconds for each request; `rate` requests a second come.
    fn simulate(workers: usize, service: u64, rate: u64, seconds: u64) -> Outcome {
        let limiter = Limiter::new(0, true);
        let (mut ends, mut free) = (BinaryHeap::new(), vec![1_000_u64; workers]);
        let (mut good, mut slowest) = (0_u64, 0);
        for n in 0..rate * seconds {
            let now = 1_000 + n * 1_000_000 / rate;
            while let Some(std::cmp::Reverse((end, began))) = ends.peek().copied() {
                if end > now {
                    break;
                }
                ends.pop();
                limiter.leave(Some((began, end)));
                if end > 2_000_000 {
                    good += 1;
                    slowest = slowest.max(end - began);
                }
            }
            if limiter.enter() {
                let worker = free.iter_mut().min().unwrap();
                // Deterministic spread of 0.8 to 1.2.
                let time = service * (80 + n * 7919 % 41) / 100;
                *worker = (*worker).max(now) + time;
                ends.push(std::cmp::Reverse((*worker, now)));
            }
        }
        let measured = (seconds - 2) as f64;
        Outcome { goodput: good as f64 / measured, slowest, limit: limiter.limit() }
    }

    #[test]
    fn at_twice_the_capacity_goodput_stays_and_latency_is_bounded() {
        for (workers, service) in [(4, 10_000), (20, 10_000), (50, 100_000)] {
            let capacity = workers as u64 * 1_000_000 / service;
            let outcome = simulate(workers, service, capacity * 2, 30);
            let share = outcome.goodput / capacity as f64;
            assert!(share > 0.9, "{workers} workers: goodput {share}, limit {}", outcome.limit);
            let factor = outcome.slowest as f64 / service as f64;
            assert!(factor < 6.0, "{workers} workers: slowest {factor}, limit {}", outcome.limit);
        }
    }

    #[test]
    fn below_the_capacity_nothing_is_shed() {
        let outcome = simulate(20, 10_000, 1_000, 10);
        assert!(outcome.goodput > 999.0 * 0.99, "{}", outcome.goodput);
    }
}
