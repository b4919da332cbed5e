//! A destination as a worker uses it: compiled configuration, shared by all workers, and this worker's own
//! endpoints with their connections and latency estimates.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use duet_api::proto;
use http::request;
use parking_lot::Mutex;
use rand::Rng as _;
use tokio::time::Instant;

use crate::balance::peak_ewma::PeakEwma;
use crate::connect::{Pool, SharedConnector, Target};
use crate::discovery::{Endpoint, Snapshot};
use crate::error::{ErrorType, Failure};
use crate::filter::Filters;
use crate::policy::budget::{BudgetLimits, RetryBudget};
use crate::policy::retry::RetryPolicy;
use crate::route::RouteTable;
use crate::telemetry::metrics::ServiceMetrics;

const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest silence on a response where no policy says anything.
pub const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(300);

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

/// What happens to the requests that match.
#[derive(Debug)]
pub struct Rule {
    /// For people.
    pub name: Arc<str>,
    /// The route resource.
    pub route: Arc<str>,
    /// Changes.
    pub filters: Filters,
    /// When to try again.
    pub retry: RetryPolicy,
    /// Bound on the whole exchange; zero: none; absent: the default.
    pub request_timeout: Option<Duration>,
    /// Bound on one try.
    pub try_timeout: Option<Duration>,
    /// Longest silence.
    pub idle_timeout: Option<Duration>,
    backends: Vec<Weighted>,
    total_weight: u32,
}

#[derive(Debug)]
struct Weighted {
    /// Index into the configuration's backends, or why there is none.
    backend: Result<usize, String>,
    weight: u32,
    filters: Filters,
}

/// A service's port.
#[derive(Debug)]
pub struct Backend {
    name: Arc<str>,
    /// What is spoken there.
    pub protocol: proto::Protocol,
    /// Bound on connecting.
    pub connect_timeout: Duration,
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
    let backends: Vec<Backend> = raw.backends.iter().map(Backend::new).collect();
    let rule =
        |rule| Rule::compile(rule, &backends).map_err(|error| format!("{}: {error}", rule.name));
    Ok(Config {
        service: raw.service.as_str().into(),
        routes: RouteTable::compile(&raw.rules)?,
        rules: raw.rules.iter().map(rule).collect::<Result<_, _>>()?,
        backends,
        budget,
    })
}

impl Backend {
    fn new(raw: &proto::Backend) -> Self {
        Self {
            name: raw.name.as_str().into(),
            protocol: raw.protocol(),
            connect_timeout: duration(raw.connect_timeout).unwrap_or(DEFAULT_CONNECT_TIMEOUT),
        }
    }
}

fn duration(raw: Option<prost_types::Duration>) -> Option<Duration> {
    raw.and_then(|raw| Duration::try_from(raw).ok())
}

/// The path prefix that a rule matches, if it is one: what its filters may replace.
#[must_use]
pub fn prefix(rule: &proto::Rule) -> Option<&str> {
    match rule.r#match.as_ref()?.path.as_ref()?.kind.as_ref()? {
        proto::path_match::Kind::Prefix(prefix) => Some(prefix),
        proto::path_match::Kind::Exact(_) | proto::path_match::Kind::Regex(_) => None,
    }
}

impl Rule {
    fn compile(raw: &proto::Rule, backends: &[Backend]) -> Result<Self, String> {
        let prefix = prefix(raw);
        let weighted = |raw: &proto::WeightedBackend| {
            let index = backends.iter().position(|backend| *backend.name == *raw.backend);
            let backend = if raw.invalid.is_empty() {
                index.ok_or_else(|| format!("no backend {:?}", raw.backend))
            } else {
                Err(raw.invalid.clone())
            };
            let filters = Filters::compile(&raw.filters, prefix)?;
            Ok::<_, String>(Weighted { backend, weight: raw.weight, filters })
        };
        let weighted = raw.backends.iter().map(weighted).collect::<Result<Vec<_>, _>>()?;
        let total_weight =
            weighted.iter().try_fold(0_u32, |sum, next| sum.checked_add(next.weight));
        let timeouts = raw.timeouts.unwrap_or_default();
        let idle = duration(timeouts.idle).unwrap_or(DEFAULT_IDLE_TIMEOUT);
        Ok(Self {
            name: raw.name.as_str().into(),
            route: raw.route.as_str().into(),
            filters: Filters::compile(&raw.filters, prefix)?,
            retry: RetryPolicy::new(raw.retry.as_ref()),
            request_timeout: duration(timeouts.request),
            try_timeout: duration(timeouts.backend_request).filter(|limit| !limit.is_zero()),
            idle_timeout: Some(idle).filter(|limit| !limit.is_zero()),
            total_weight: total_weight.ok_or("the sum of the weights is too large")?,
            backends: weighted,
        })
    }

    /// One of the backends, by weight: its index in the configuration, and its own filters.
    ///
    /// # Errors
    /// With status 500 for the share of a broken reference, and when there is nothing to choose from (Gateway API,
    /// `HTTPRouteRule.backendRefs`).
    pub fn choose(&self) -> Result<(usize, &Filters), Failure> {
        let broken = |text: String| Failure::new(ErrorType::ProxyConfigurationError, text);
        let mut ticket = match self.total_weight {
            0 => return Err(broken(format!("{}: no backend has any weight", self.name))),
            total if self.backends.len() > 1 => rand::rng().random_range(0..total),
            _ => 0,
        };
        for weighted in &self.backends {
            if ticket < weighted.weight {
                return match &weighted.backend {
                    Ok(index) => Ok((*index, &weighted.filters)),
                    Err(reason) => Err(broken(format!("{}: {reason}", self.name))),
                };
            }
            ticket -= weighted.weight;
        }
        Err(broken(format!("{}: no backend", self.name)))
    }
}

/// A destination, of one worker, at one version.
#[derive(Debug)]
pub struct Destination {
    config: Arc<Config>,
    /// Per backend of the configuration.
    endpoints: Vec<Vec<Arc<Replica>>>,
    /// Handles for counting.
    pub metrics: Arc<ServiceMetrics>,
    started: Instant,
}

/// One endpoint, of one worker: its connections and how it has been doing.
#[derive(Debug)]
pub struct Replica {
    /// Open connections.
    pub pool: Arc<Pool>,
    in_flight: AtomicU32,
    latency: Mutex<PeakEwma>,
}

/// Replicas of a worker by target, shared between destinations so that `orders` and `orders:80` use the same
/// connections.
pub type Replicas = HashMap<Target, std::sync::Weak<Replica>>;

impl Destination {
    /// Builds from a snapshot; replicas that are known keep their connections and estimates.
    #[must_use]
    pub fn new(
        snapshot: &Snapshot<Config>,
        replicas: &mut Replicas,
        connector: &SharedConnector,
        (metrics, started): (Arc<ServiceMetrics>, Instant),
    ) -> Self {
        let config = Arc::clone(&snapshot.config);
        let mut replica = |endpoint: &Endpoint| {
            let target = Target {
                address: endpoint.address,
                identity: endpoint.identity.clone(),
                port: endpoint.port,
            };
            if let Some(known) = replicas.get(&target).and_then(std::sync::Weak::upgrade) {
                return known;
            }
            let new = Arc::new(Replica {
                pool: Pool::new(target.clone(), Arc::clone(connector)),
                in_flight: AtomicU32::new(0),
                latency: Mutex::new(PeakEwma::new(started.elapsed().as_secs_f64())),
            });
            replicas.insert(target, Arc::downgrade(&new));
            new
        };
        let of = |backend: &Backend| snapshot.endpoints.get(&backend.name);
        let endpoints: Vec<Vec<Arc<Replica>>> = config
            .backends
            .iter()
            .map(|backend| of(backend).map(|list| list.iter().map(&mut replica).collect()))
            .map(Option::unwrap_or_default)
            .collect();
        let known = endpoints.iter().map(Vec::len).sum::<usize>();
        metrics.endpoints.set(i64::try_from(known).unwrap_or(i64::MAX));
        replicas.retain(|_, replica| replica.strong_count() > 0);
        Self { config, endpoints, metrics, started }
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
        !self.endpoints.is_empty() && self.endpoints.iter().all(Vec::is_empty)
    }

    /// Whole seconds of the worker's clock, for the budget.
    #[must_use]
    pub fn seconds(&self) -> u64 {
        self.started.elapsed().as_secs()
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
    pub fn backend(&self, index: usize) -> Option<(&Backend, &[Arc<Replica>])> {
        let backend = self.config.backends.get(index)?;
        Some((backend, self.endpoints.get(index).map(Vec::as_slice).unwrap_or_default()))
    }

    /// Seconds of the worker's clock, for latency estimates.
    #[must_use]
    pub fn clock(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

impl Backend {
    /// `namespace/name:port`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Replica {
    /// What one more request would cost: expected latency times the requests that it would share with.
    #[must_use]
    pub fn cost(&self, now: f64) -> f64 {
        let in_flight = f64::from(self.in_flight.load(Ordering::Relaxed));
        self.latency.lock().value(now) * (in_flight + 1.0)
    }

    /// Takes in how long a try took.
    pub fn observe(&self, sample: Duration, now: f64) {
        self.latency.lock().observe(sample, now);
    }

    /// Counts a request in flight until dropped.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }
}

/// A request in flight at a replica.
#[derive(Debug)]
pub struct InFlight(Arc<Replica>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
