//! A destination as a worker uses it: compiled configuration, shared by all workers, and this worker's own
//! endpoints with their connections and latency estimates.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use duet_api::proto;
use http::{HeaderName, request};
use tokio::time::Instant;

use super::choose::Endpoints;
use super::replica::{Healths, Replica, Replicas, millis};
use super::rule::Rule;
use crate::balance::maglev;
use crate::connect::{SharedConnector, Target};
use crate::discovery::{Endpoint, Snapshot};
use crate::error::{ErrorType, Failure};
use crate::policy::budget::{BudgetLimits, RetryBudget};
use crate::policy::outlier::{Limits, Verdict};
use crate::route::RouteTable;
use crate::telemetry::metrics::ServiceMetrics;

const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// What the control plane says of a destination, compiled once for all workers.
#[derive(Debug)]
pub struct Config {
    /// `namespace/name:port`.
    pub service: Arc<str>,
    routes: RouteTable,
    rules: Vec<Rule>,
    backends: Vec<Backend>,
    budget: Arc<RetryBudget>,
}

/// A service's port, and how its endpoints are used.
#[derive(Debug)]
pub struct Backend {
    name: Arc<str>,
    /// What is spoken there.
    pub protocol: proto::Protocol,
    /// Bound on connecting.
    pub connect_timeout: Duration,
    /// How an endpoint is chosen.
    pub balancer: Balancer,
    /// What Maglev hashes.
    pub hash_on: Option<HashOn>,
    /// Time until a new endpoint gets its full share.
    pub slow_start: Option<Duration>,
    /// When an endpoint is left alone.
    pub outliers: Limits,
    prefer_zone: bool,
}

/// Load balancing algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of TrafficPolicy")]
pub enum Balancer {
    PeakEwma,
    LeastRequest,
    RoundRobin,
    Random,
    Maglev,
}

/// What Maglev hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashOn {
    /// A header's value.
    Header(HeaderName),
    /// A cookie's value.
    Cookie(String),
    /// Where the request comes from.
    Source,
}

/// Compiles the control plane's form; see [`crate::discovery::Compile`].
///
/// # Errors
/// When something in it cannot be used; names the rule.
pub fn compile(raw: &proto::Destination, former: Option<&Config>) -> Result<Config, String> {
    if raw.rules.is_empty() {
        return Err("a destination without rules".to_owned());
    }
    let limits = raw.retry_budget.map_or_else(BudgetLimits::default, |raw| BudgetLimits {
        percent: raw.percent,
        min_per_second: raw.min_per_second,
    });
    let budget = former.map(|former| &former.budget).filter(|budget| budget.limits() == limits);
    let budget = budget.map_or_else(|| Arc::new(RetryBudget::new(limits)), Arc::clone);
    let backends: Vec<Backend> =
        raw.backends.iter().map(Backend::compile).collect::<Result<_, _>>()?;
    let rule = |rule: &proto::Rule| {
        // Only rules with state of their own look for what they were before.
        let rules = former.filter(|_| rule.hedge.is_some()).map(|former| &former.rules);
        let before = rules.into_iter().flatten().find(|before| *before.name == *rule.name);
        Rule::compile(rule, &backends, before).map_err(|error| format!("{}: {error}", rule.name))
    };
    Ok(Config {
        service: raw.service.as_str().into(),
        routes: RouteTable::compile(&raw.rules)?,
        rules: raw.rules.iter().map(rule).collect::<Result<_, _>>()?,
        backends,
        budget,
    })
}

impl Backend {
    pub(super) fn compile(raw: &proto::Backend) -> Result<Self, String> {
        use proto::hash_on::Kind;
        let hash_on = match raw.hash_on.as_ref().and_then(|on| on.kind.as_ref()) {
            None => None,
            Some(Kind::Header(name)) => {
                Some(HashOn::Header(name.parse().map_err(|_err| format!("header {name:?}"))?))
            }
            Some(Kind::Cookie(name)) => Some(HashOn::Cookie(name.clone())),
            Some(Kind::Source(_)) => Some(HashOn::Source),
        };
        Ok(Self {
            name: raw.name.as_str().into(),
            protocol: raw.protocol(),
            connect_timeout: duration(raw.connect_timeout).unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            balancer: match raw.load_balancer() {
                proto::LoadBalancer::PeakEwma => Balancer::PeakEwma,
                proto::LoadBalancer::LeastRequest => Balancer::LeastRequest,
                proto::LoadBalancer::RoundRobin => Balancer::RoundRobin,
                proto::LoadBalancer::Random => Balancer::Random,
                proto::LoadBalancer::Maglev => Balancer::Maglev,
            },
            hash_on,
            slow_start: duration(raw.slow_start),
            outliers: raw.outlier_detection.as_ref().map(outliers).unwrap_or_default(),
            prefer_zone: raw.prefer_zone,
        })
    }

    /// `namespace/name:port`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn endpoints(&self, found: &[Endpoint], replicas: Vec<Arc<Replica>>, zone: &str) -> Endpoints {
        let mut endpoints = Endpoints { replicas, ..Endpoints::default() };
        if self.balancer == Balancer::Maglev {
            let names: Vec<String> = found
                .iter()
                .map(|endpoint| format!("{}/{}", endpoint.address, endpoint.port))
                .collect();
            endpoints.table = maglev::Table::new(&names);
        }
        if self.prefer_zone && !zone.is_empty() {
            for (index, endpoint) in found.iter().enumerate() {
                let list = match *endpoint.zone == *zone {
                    true => &mut endpoints.local,
                    false => &mut endpoints.remote,
                };
                list.push(index);
            }
        }
        // Workers begin at different places, so that together they go around evenly.
        endpoints.cursor = AtomicUsize::new(rand::random::<u32>() as usize);
        endpoints
    }
}

fn outliers(raw: &proto::OutlierDetection) -> Limits {
    let defaults = Limits::default();
    let millis = |raw: Option<prost_types::Duration>, default| {
        duration(raw).map_or(default, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    };
    Limits {
        consecutive_failures: raw.consecutive_failures,
        min_success_percent: raw.min_success_percent,
        min_requests: raw.min_requests,
        min_ejection: millis(raw.min_ejection, defaults.min_ejection),
        max_ejection: millis(raw.max_ejection, defaults.max_ejection),
        max_ejection_percent: raw.max_ejection_percent,
    }
}

pub(super) fn duration(raw: Option<prost_types::Duration>) -> Option<Duration> {
    raw.and_then(|raw| Duration::try_from(raw).ok())
}

/// What the destinations of one worker share.
#[derive(Debug)]
pub struct Context {
    /// Makes connections.
    pub connector: SharedConnector,
    /// Of all workers.
    pub healths: Healths,
    /// The sidecar's own zone; may be empty.
    pub zone: Arc<str>,
    /// The workload's own name.
    pub name: Arc<str>,
}

/// A destination, of one worker, at one version.
#[derive(Debug)]
pub struct Destination {
    config: Arc<Config>,
    /// Per backend of the configuration.
    endpoints: Vec<Endpoints>,
    /// Handles for counting.
    pub metrics: Arc<ServiceMetrics>,
    context: Arc<Context>,
}

impl Destination {
    /// Builds from a snapshot; replicas that are known keep their connections and estimates.
    #[must_use]
    pub fn new(
        snapshot: &Snapshot<Config>,
        replicas: &mut Replicas,
        metrics: Arc<ServiceMetrics>,
        context: &Arc<Context>,
    ) -> Self {
        let config = Arc::clone(&snapshot.config);
        let mut replica = |endpoint: &Endpoint| {
            let target = Target {
                address: endpoint.address,
                identity: endpoint.identity.clone(),
                port: endpoint.port,
            };
            Replica::at(target, replicas, &context.connector, &context.healths)
        };
        let mut of = |backend: &Backend| {
            let found = snapshot.endpoints.get(&backend.name);
            let found = found.map(|list| list.as_slice()).unwrap_or_default();
            let replicas = found.iter().map(&mut replica).collect();
            backend.endpoints(found, replicas, &context.zone)
        };
        let endpoints: Vec<Endpoints> = config.backends.iter().map(&mut of).collect();
        let known = endpoints.iter().map(|one| one.replicas.len()).sum::<usize>();
        metrics.endpoints.set(i64::try_from(known).unwrap_or(i64::MAX));
        replicas.retain(|_, replica| replica.strong_count() > 0);
        Self { config, endpoints, metrics, context: Arc::clone(context) }
    }

    /// `namespace/name:port`.
    #[must_use]
    pub fn service(&self) -> &Arc<str> {
        &self.config.service
    }

    /// Shared by all workers.
    #[must_use]
    pub fn budget(&self) -> &RetryBudget {
        &self.config.budget
    }

    /// There are backends, and none has an endpoint.
    #[must_use]
    pub fn is_deserted(&self) -> bool {
        !self.endpoints.is_empty() && self.endpoints.iter().all(|one| one.replicas.is_empty())
    }

    /// The rule that a request falls under.
    ///
    /// # Errors
    /// With status 404 when none matches (Gateway API).
    pub fn find(&self, head: &request::Parts) -> Result<&Rule, Failure> {
        let found = self.config.routes.find(head).and_then(|index| self.config.rules.get(index));
        found.ok_or_else(|| {
            let text = format!(
                "no route of {} matches {} {}",
                self.service(),
                head.method,
                head.uri.path()
            );
            Failure::new(ErrorType::DestinationNotFound, text)
                .with_status(http::StatusCode::NOT_FOUND)
        })
    }

    /// A backend of the configuration with its endpoints.
    #[must_use]
    pub fn backend(&self, index: usize) -> Option<(&Backend, &Endpoints)> {
        Some((self.config.backends.get(index)?, self.endpoints.get(index)?))
    }

    /// Index of a backend of this destination.
    #[must_use]
    pub fn position(&self, backend: &Backend) -> usize {
        let found = self.config.backends.iter().position(|one| std::ptr::eq(one, backend));
        found.unwrap_or(usize::MAX)
    }

    /// Whole seconds of the clock that all workers share, for budgets.
    #[must_use]
    pub fn seconds(&self) -> u64 {
        self.now().as_secs()
    }

    /// The clock that all workers share.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.context.healths.elapsed()
    }

    /// A moment on the clock that all workers share.
    #[must_use]
    pub fn at(&self, moment: Instant) -> Duration {
        self.context.healths.at(moment)
    }

    /// The calling workload.
    #[must_use]
    pub fn own_name(&self) -> &str {
        &self.context.name
    }

    /// Takes in whether an endpoint's answer was good.
    pub fn answered(
        &self,
        (backend, endpoints): (&Backend, &Endpoints),
        replica: &Replica,
        (good, probe): (bool, bool),
        now: Duration,
    ) {
        let (limits, now) = (&backend.outliers, millis(now));
        match replica.health.answered(good, probe, limits, now) {
            Verdict::Same => {}
            Verdict::Recovered => {
                self.metrics.policy("recovered");
                let address = replica.pool.target().address;
                tracing::info!(%address, service = %backend.name, "endpoint is well again");
            }
            Verdict::Eject => {
                let others = endpoints.replicas.iter();
                let ejected = others.filter(|one| one.health.is_ejected()).count();
                // One that was ejected and failed its probe is among them.
                let room = limits.most_ejected(endpoints.replicas.len());
                if probe || ejected < room {
                    let millis = replica.health.eject(limits, now, rand::random());
                    self.metrics.policy("ejected");
                    let address = replica.pool.target().address;
                    tracing::info!(%address, service = %backend.name, millis, "endpoint ejected");
                }
            }
        }
    }
}
