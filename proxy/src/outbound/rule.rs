//! What happens to the requests that fall under one rule, compiled once for all workers.

use std::sync::Arc;
use std::time::Duration;

use duet_api::proto;
use rand::Rng as _;

use super::destination::{Backend, duration};
use super::session::Session;
use crate::error::{ErrorType, Failure};
use crate::filter::Filters;
use crate::policy::fault::Fault;
use crate::policy::hedge::{After, Hedging};
use crate::policy::retry::RetryPolicy;
use crate::route::RouteTable;

/// Longest silence on a response where no policy says anything.
pub const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// What happens to the requests that match.
#[derive(Debug)]
pub struct Rule {
    /// For people.
    pub name: Arc<str>,
    /// The route resource.
    pub route: Arc<str>,
    /// Changes.
    pub filters: Filters,
    /// Where copies go: index of the backend, and the share as a fraction.
    pub mirrors: Vec<(usize, u32, u32)>,
    /// When to try again.
    pub retry: RetryPolicy,
    /// Bound on the whole exchange; zero: none; absent: the default.
    pub request_timeout: Option<Duration>,
    /// Bound on one try.
    pub try_timeout: Option<Duration>,
    /// Longest silence.
    pub idle_timeout: Option<Duration>,
    /// Failures made on purpose, and which requests they are for.
    pub fault: Option<(Fault, RouteTable)>,
    /// Second tries beside slow first ones.
    pub hedging: Option<Arc<Hedging>>,
    /// Keeps clients at their endpoint.
    pub session: Option<Session>,
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

/// The path prefix that a rule matches, if it is one: what its filters may replace.
#[must_use]
pub fn prefix(rule: &proto::Rule) -> Option<&str> {
    match rule.r#match.as_ref()?.path.as_ref()?.kind.as_ref()? {
        proto::path_match::Kind::Prefix(prefix) => Some(prefix),
        proto::path_match::Kind::Exact(_) | proto::path_match::Kind::Regex(_) => None,
    }
}

impl Rule {
    /// Compiles; `former` is the rule of the same name before, whose shared state goes on.
    pub(super) fn compile(
        raw: &proto::Rule,
        backends: &[Backend],
        former: Option<&Self>,
    ) -> Result<Self, String> {
        let prefix = prefix(raw);
        let position = |name: &str| backends.iter().position(|backend| backend.name() == name);
        let weighted = |raw: &proto::WeightedBackend| {
            let backend = if raw.invalid.is_empty() {
                position(&raw.backend).ok_or_else(|| format!("no backend {:?}", raw.backend))
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
        let filters = Filters::compile(&raw.filters, prefix)?;
        let backend_filters = weighted.iter().flat_map(|backend| backend.filters.mirrors());
        let mirrors = filters.mirrors().iter().chain(backend_filters).filter_map(|mirror| {
            Some((position(&mirror.backend)?, mirror.numerator, mirror.denominator))
        });
        Ok(Self {
            name: raw.name.as_str().into(),
            route: raw.route.as_str().into(),
            mirrors: mirrors.collect(),
            filters,
            retry: RetryPolicy::new(raw.retry.as_ref()),
            request_timeout: duration(timeouts.request),
            try_timeout: duration(timeouts.backend_request).filter(|limit| !limit.is_zero()),
            idle_timeout: Some(idle).filter(|limit| !limit.is_zero()),
            fault: raw.fault.as_ref().map(fault).transpose()?,
            hedging: hedging(raw.hedge.as_ref(), former),
            session: raw.session.as_ref().map(Session::compile).transpose()?,
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

    /// Every backend that there is, whatever its weight.
    pub fn backends(&self) -> impl Iterator<Item = (usize, &Filters)> {
        self.backends
            .iter()
            .filter_map(|weighted| Some((*weighted.backend.as_ref().ok()?, &weighted.filters)))
    }
}

/// The condition is a table of one rule, so that headers match as they do in routes.
fn fault(raw: &proto::Fault) -> Result<(Fault, RouteTable), String> {
    let status = |code: u32| u16::try_from(code).unwrap_or_default();
    let fault = Fault {
        delay_ppm: raw.delay_ppm,
        delay: duration(raw.delay).unwrap_or_default(),
        abort_ppm: raw.abort_ppm,
        abort_status: status(raw.abort_status),
        abort_grpc_status: status(raw.abort_grpc_status),
    };
    let condition = proto::Match { headers: raw.headers.clone(), ..proto::Match::default() };
    let condition = proto::Rule {
        name: "fault".to_owned(),
        r#match: Some(condition),
        ..proto::Rule::default()
    };
    Ok((fault, RouteTable::compile(&[condition])?))
}

fn hedging(raw: Option<&proto::Hedge>, former: Option<&Rule>) -> Option<Arc<Hedging>> {
    use proto::hedge::After as Raw;
    let raw = raw?;
    let after = match raw.after? {
        Raw::Percentile(percentile) => After::Percentile(percentile.clamp(1, 99)),
        Raw::Delay(delay) => After::Delay(Duration::try_from(delay).ok()?),
    };
    let former = former.and_then(|rule| rule.hedging.as_ref());
    let same = former.filter(|hedging| hedging.is(after, raw.max_percent));
    Some(same.map_or_else(|| Arc::new(Hedging::new(after, raw.max_percent)), Arc::clone))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(weights: &[(u32, bool)]) -> (Rule, Vec<Backend>) {
        let names: Vec<String> = (0..weights.len()).map(|n| format!("a/b{n}:80")).collect();
        let backend = |name: &String| proto::Backend { name: name.clone(), ..Default::default() };
        let backends: Vec<Backend> =
            names.iter().map(|name| Backend::compile(&backend(name)).unwrap()).collect();
        let weighted = weights.iter().zip(&names).map(|((weight, broken), name)| {
            let invalid = if *broken { format!("{name} is broken") } else { String::new() };
            let backend = name.clone();
            proto::WeightedBackend { backend, weight: *weight, invalid, filters: Vec::new() }
        });
        let raw = proto::Rule { backends: weighted.collect(), ..Default::default() };
        (Rule::compile(&raw, &backends, None).unwrap(), backends)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn backends_get_their_weight_and_broken_ones_fail_theirs(
            weights in prop::collection::vec((0_u32..20, any::<bool>()), 1..7),
        ) {
            let total: u32 = weights.iter().map(|(weight, _)| weight).sum();
            let (rule, _) = rule(&weights);
            let draws = 20_000;
            let (mut hits, mut failed) = (vec![0; weights.len()], 0);
            for _ in 0..draws {
                match rule.choose() {
                    Ok((index, _)) => hits[index] += 1,
                    Err(failure) => {
                        prop_assert_eq!(failure.status, http::StatusCode::INTERNAL_SERVER_ERROR);
                        failed += 1;
                    }
                }
            }
            if total == 0 {
                prop_assert_eq!(failed, draws);
                return Ok(());
            }
            let near = |count: i32, weight: u32| {
                let share = f64::from(count) / f64::from(draws);
                (share - f64::from(weight) / f64::from(total)).abs() < 0.025
            };
            for (hit, (weight, broken)) in hits.iter().zip(&weights) {
                prop_assert!(near(*hit, if *broken { 0 } else { *weight }), "{hits:?}");
                prop_assert!(*weight > 0 || *hit == 0);
            }
            let broken: u32 = weights.iter().filter(|(_, broken)| *broken).map(|(w, _)| w).sum();
            prop_assert!(near(failed, broken), "{failed} failed");
        }
    }

    #[test]
    fn weights_that_overflow_are_refused() {
        let backend = proto::WeightedBackend { weight: u32::MAX, ..Default::default() };
        let raw = proto::Rule { backends: vec![backend.clone(), backend], ..Default::default() };
        assert!(Rule::compile(&raw, &[], None).unwrap_err().contains("too large"));
    }
}
