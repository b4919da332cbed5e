//! Which endpoint of which backend a try goes to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::request;
use rand::Rng as _;

use super::attempt::Tried;
use super::destination::{Backend, Balancer, Destination, HashOn};
use super::replica::{InFlight, Replica, millis};
use super::rule::Rule;
use super::session::Token;
use crate::balance::{maglev, next, pick};
use crate::error::{ErrorType, Failure};
use crate::filter::Filters;
use crate::http::cookie;
use crate::http::headers::FORWARDED_FOR;

/// Endpoints of the own zone are enough for all requests while at least this share of them is usable.
const ZONE_ENOUGH: f64 = 0.7;

/// The endpoints of one backend, of one worker.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// All of them, in a fixed order.
    pub replicas: Vec<Arc<Replica>>,
    /// Those of the own zone, where that comes first.
    pub local: Vec<usize>,
    /// The others.
    pub remote: Vec<usize>,
    /// For Maglev.
    pub table: maglev::Table,
    /// For round robin.
    pub cursor: AtomicUsize,
}

/// An endpoint that takes a request on.
#[derive(Debug)]
pub(super) struct Choice<'d> {
    pub backend: &'d Backend,
    pub endpoints: &'d Endpoints,
    pub filters: &'d Filters,
    pub replica: &'d Arc<Replica>,
    pub in_flight: InFlight,
}

/// Chooses for a try: the endpoint of the client's session if it can, else by weight and balancer; one that this call
/// has not tried, if there is one. `now` is of [`Destination::at`].
pub(super) fn choose<'d>(
    (destination, rule): (&'d Destination, &'d Rule),
    head: &request::Parts,
    session: Option<Token>,
    tried: &Tried<'d>,
    now: Duration,
) -> Result<Choice<'d>, Failure> {
    let of_session = |token| of_session((destination, rule), token, tried, now);
    if let Some(choice) = session.and_then(of_session) {
        return Ok(choice);
    }
    let (index, filters) = rule.choose()?;
    let Some((backend, endpoints)) = destination.backend(index) else {
        return Err(Failure::new(ErrorType::ProxyInternalError, "the backend is gone"));
    };
    let key = key(backend, destination, head);
    let search = Search { now, backend, endpoints, key };
    // Somebody else may claim a probe in between.
    for _ in 0..3 {
        let fresh = |replica: &Arc<Replica>| !tried.has(replica);
        let found = search.find(fresh).or_else(|| search.find(|_| true));
        let Some(replica) = found else { break };
        if let Some(probe) = replica.health.claim(millis(search.now)) {
            let in_flight = replica.enter(probe);
            return Ok(Choice { backend, endpoints, filters, replica, in_flight });
        }
    }
    Err(nobody(backend, endpoints))
}

fn nobody(backend: &Backend, endpoints: &Endpoints) -> Failure {
    let text = match endpoints.replicas.len() {
        0 => format!("{} has no endpoint that is ready", backend.name()),
        count => format!(
            "all {count} endpoints of {} failed too often and are left alone for a while",
            backend.name()
        ),
    };
    Failure::new(ErrorType::DestinationUnavailable, text)
}

fn of_session<'d>(
    (destination, rule): (&'d Destination, &'d Rule),
    token: Token,
    tried: &Tried<'d>,
    now: Duration,
) -> Option<Choice<'d>> {
    rule.backends().find_map(|(index, filters)| {
        let (backend, endpoints) = destination.backend(index)?;
        let mut replicas = endpoints.replicas.iter();
        let replica = replicas.find(|replica| replica.token == token.endpoint)?;
        if tried.has(replica) {
            return None;
        }
        let in_flight = replica.enter(replica.health.claim(millis(now))?);
        Some(Choice { backend, endpoints, filters, replica, in_flight })
    })
}

/// What the balancer hashes; none where it does not, or the request has nothing to hash.
fn key(backend: &Backend, destination: &Destination, head: &request::Parts) -> Option<u64> {
    match backend.hash_on.as_ref()? {
        HashOn::Header(name) => head.headers.get(name).map(|v| maglev::hash(&v.as_bytes())),
        HashOn::Cookie(name) => cookie::find(&head.headers, name).map(|v| maglev::hash(&v)),
        HashOn::Source => {
            let forwarded = head.headers.get(FORWARDED_FOR).and_then(|value| value.to_str().ok());
            let first = forwarded.and_then(|list| list.split(',').next()).map(str::trim);
            Some(maglev::hash(&first.unwrap_or(destination.own_name())))
        }
    }
}

struct Search<'d> {
    /// One reading of the clock for all of it.
    now: Duration,
    backend: &'d Backend,
    endpoints: &'d Endpoints,
    key: Option<u64>,
}

impl<'d> Search<'d> {
    /// An endpoint that is usable now and `allowed`.
    fn find(&self, allowed: impl Fn(&Arc<Replica>) -> bool) -> Option<&'d Arc<Replica>> {
        let Endpoints { replicas, local, remote, .. } = self.endpoints;
        let millis = millis(self.now);
        let usable = |index: usize| {
            replicas.get(index).is_some_and(|one| one.health.is_usable(millis) && allowed(one))
        };
        let found = if local.is_empty() || remote.is_empty() {
            self.balance(None, &usable)
        } else {
            let well = local.iter().filter(|index| usable(**index)).count();
            #[allow(clippy::cast_precision_loss, reason = "a count of endpoints")]
            let share = well as f64 / local.len() as f64 / ZONE_ENOUGH;
            let stays = rand::rng().random_bool(share.clamp(0.0, 1.0));
            let (first, second) = if stays { (local, remote) } else { (remote, local) };
            self.balance(Some(first), &usable).or_else(|| self.balance(Some(second), &usable))
        };
        found.and_then(|index| replicas.get(index))
    }

    fn balance(&self, subset: Option<&[usize]>, usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let Endpoints { replicas, cursor, table, .. } = self.endpoints;
        let at = |n: usize| subset.map_or(n, |subset| subset.get(n).copied().unwrap_or(usize::MAX));
        let count = subset.map_or(replicas.len(), <[usize]>::len);
        let now = self.now.as_secs_f64();
        let share = |index: usize| {
            replicas.get(index).map_or(1.0, |one| one.share(self.backend.slow_start, now))
        };
        let cost = |n: usize| {
            let Some(replica) = replicas.get(at(n)) else { return f64::MAX };
            let cost = match self.backend.balancer {
                Balancer::LeastRequest => replica.load() + 1.0,
                Balancer::PeakEwma | Balancer::RoundRobin | Balancer::Random | Balancer::Maglev => {
                    replica.cost(now)
                }
            };
            cost / share(at(n))
        };
        let mut rng = rand::rng();
        let n = match (self.backend.balancer, self.key) {
            (Balancer::PeakEwma | Balancer::LeastRequest, _) => {
                pick(count, &mut rng, cost, |n| usable(at(n)))
            }
            (Balancer::Maglev, Some(key)) => {
                // The next places of the same key, where its endpoint cannot be used.
                let mut keys = std::iter::successors(Some(key), |key| Some(maglev::hash(key)));
                let found = keys
                    .by_ref()
                    .take(replicas.len() * 4)
                    .filter_map(|key| table.find(key))
                    .find(|index| usable(*index));
                return found.or_else(|| (0..replicas.len()).find(|index| usable(*index)));
            }
            (Balancer::RoundRobin | Balancer::Random | Balancer::Maglev, _) => {
                let start = if self.backend.balancer == Balancer::RoundRobin {
                    cursor.fetch_add(1, Ordering::Relaxed)
                } else {
                    rng.random_range(0..count.max(1))
                };
                let ramped = |n: usize| {
                    usable(at(n)) && (share(at(n)) >= 1.0 || rand::random::<f64>() < share(at(n)))
                };
                next(count, start, ramped).or_else(|| next(count, start, |n| usable(at(n))))
            }
        };
        n.map(at)
    }
}
