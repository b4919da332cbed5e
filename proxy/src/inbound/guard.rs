//! What protects the application from its callers: rate limits, a bound on requests in progress, a bound on connections.
//! Shared by all workers; made anew only where the policy changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use duet_api::proto;
use http::{StatusCode, header, request};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{ErrorType, Failure};
use crate::policy::concurrency::Limiter;
use crate::policy::rate::{Gcra, PerCaller, Rate};
use crate::telemetry::metrics::ServiceMetrics;

/// When to ask again after being shed: long enough for a queue to drain.
const SHED_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Guards by port of the application.
pub type Guards = BTreeMap<u16, Arc<Guard>>;

/// What protects some ports.
#[derive(Debug)]
pub struct Guard {
    policy: proto::InboundPolicy,
    rate: Option<(Rate, Gcra)>,
    caller_rate: Option<(Rate, PerCaller)>,
    limiter: Option<Limiter>,
    /// Open connections; goes on when the policy changes.
    open: Arc<AtomicU32>,
    started: Instant,
}

/// A request that was let in; over when dropped.
#[derive(Debug)]
pub struct Permit {
    guard: Arc<Guard>,
    began: u64,
    answered: Option<u64>,
}

/// An open connection that counts; closed when dropped.
#[derive(Debug)]
pub struct Connected(Arc<AtomicU32>);

/// Follows the workload's configuration until told to stop.
pub async fn follow(
    mut workload: watch::Receiver<Option<Arc<proto::Workload>>>,
    guards: watch::Sender<Arc<Guards>>,
    stop: CancellationToken,
) {
    loop {
        let current = workload.borrow_and_update().clone();
        if let Some(current) = current {
            let next = next(&guards.borrow(), &current.inbound);
            guards.send_replace(Arc::new(next));
        }
        tokio::select! {
            changed = workload.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

fn next(former: &Guards, policies: &[proto::InboundPolicy]) -> Guards {
    let mut guards = Guards::new();
    for policy in policies {
        let ports: Vec<u16> =
            policy.ports.iter().filter_map(|port| u16::try_from(*port).ok()).collect();
        let before = ports.iter().find_map(|port| former.get(port));
        let guard = match before {
            Some(before) if before.policy == *policy => Arc::clone(before),
            _ => Arc::new(Guard::new(policy, before)),
        };
        guards.extend(ports.into_iter().map(|port| (port, Arc::clone(&guard))));
    }
    guards
}

impl Guard {
    fn new(policy: &proto::InboundPolicy, before: Option<&Arc<Self>>) -> Self {
        let rate = |raw: &proto::RateLimit| {
            let per = raw.per.and_then(|per| Duration::try_from(per).ok());
            Rate::new(raw.requests, per.unwrap_or(Duration::from_secs(1)), raw.burst)
        };
        Self {
            rate: policy.rate_limit.as_ref().map(|raw| (rate(raw), Gcra::default())),
            caller_rate: policy
                .caller_rate_limit
                .as_ref()
                .map(|raw| (rate(raw), PerCaller::default())),
            limiter: policy.concurrency.map(|raw| Limiter::new(raw.max, raw.adaptive)),
            open: before.map(|before| Arc::clone(&before.open)).unwrap_or_default(),
            started: Instant::now(),
            policy: policy.clone(),
        }
    }

    /// Lets a request in.
    ///
    /// # Errors
    /// With 429 or 503 and `Retry-After` where a limit is reached.
    pub fn admit(
        self: &Arc<Self>,
        caller: &Arc<str>,
        head: &request::Parts,
        metrics: &ServiceMetrics,
    ) -> Result<Permit, Failure> {
        let elapsed = self.started.elapsed();
        let now = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let service = &self.policy.service;
        // A caller over its own limit must not use up what belongs to all.
        if let Some((rate, callers)) = &self.caller_rate
            && let Err(wait) = callers.take(caller, *rate, now)
        {
            metrics.policy("caller_rate_limited");
            return Err(too_many(format!("{caller} calls {service} too often"), wait));
        }
        if let Some((rate, limit)) = &self.rate
            && let Err(wait) = limit.take(*rate, now)
        {
            metrics.policy("rate_limited");
            return Err(too_many(format!("{service} is called too often"), wait));
        }
        if let Some(limiter) = &self.limiter
            && !limiter.enter()
        {
            if is_health_check(head) {
                limiter.enter_always();
            } else {
                metrics.policy("shed");
                let text = format!("{service} is busy with {} requests", limiter.limit());
                let failure = Failure::new(ErrorType::ConnectionLimitReached, text);
                return Err(failure.with_retry_after(SHED_RETRY_AFTER));
            }
        }
        Ok(Permit { guard: Arc::clone(self), began: micros(elapsed), answered: None })
    }

    /// Counts a connection; `None`: there are too many.
    #[must_use]
    pub fn connect(&self) -> Option<Connected> {
        let open = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        let connected = Connected(Arc::clone(&self.open));
        let most = self.policy.max_connections;
        (most == 0 || open <= most).then_some(connected)
    }
}

fn too_many(text: String, wait: Duration) -> Failure {
    Failure::new(ErrorType::HttpRequestDenied, text)
        .with_status(StatusCode::TOO_MANY_REQUESTS)
        .with_retry_after(wait)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// gRPC's health service, and the kubelet: a busy application must not be taken for a dead one.
fn is_health_check(head: &request::Parts) -> bool {
    let agent = head.headers.get(header::USER_AGENT);
    head.uri.path().starts_with("/grpc.health.v1.Health/")
        || agent.is_some_and(|agent| agent.as_bytes().starts_with(b"kube-probe/"))
}

impl Permit {
    /// The application's answer is here. One that failed says nothing of how long work takes.
    pub fn answered(&mut self, status: StatusCode) {
        if !status.is_server_error() {
            self.answered = Some(micros(self.guard.started.elapsed()));
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(limiter) = &self.guard.limiter {
            limiter.leave(self.answered.map(|answered| (self.began, answered)));
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(ports: &[u32], max: u32) -> proto::InboundPolicy {
        proto::InboundPolicy {
            ports: ports.to_vec(),
            concurrency: Some(proto::Concurrency { adaptive: false, max }),
            max_connections: 1,
            ..proto::InboundPolicy::default()
        }
    }

    #[test]
    fn only_what_changed_is_made_anew_and_connections_go_on() {
        let first = next(&Guards::new(), &[policy(&[1, 2], 1), policy(&[3], 1)]);
        let connected = first[&1].connect().unwrap();
        assert!(first[&2].connect().is_none());
        let second = next(&first, &[policy(&[1, 2], 2), policy(&[3], 1)]);
        assert!(Arc::ptr_eq(&first[&3], &second[&3]) && !Arc::ptr_eq(&first[&1], &second[&1]));
        assert!(Arc::ptr_eq(&second[&1], &second[&2]));
        assert!(second[&1].connect().is_none());
        drop(connected);
        assert!(second[&1].connect().is_some());
    }
}
