//! Many requests, and how they are shared out. Shares are a matter of chance: some rounds may fail.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::StreamExt as _;

use super::case::{Case, Distribution, Mirror};
use super::check::{MIRRORED, Outcome};
use super::client::Ask;
use super::cluster::Cluster;

/// Requests at once.
const AT_ONCE: usize = 32;
const PAUSE: Duration = Duration::from_millis(50);

type Verdict = Result<(), String>;
type Exchange = (Ask, Outcome);

/// By the Deployment that answered.
pub(crate) async fn of_answers(cluster: &Cluster, case: &Case, expected: &Distribution) -> Verdict {
    rounds(expected, async || {
        let mut counts = BTreeMap::new();
        for (_, outcome) in many(cluster, case, expected.requests).await? {
            let by = outcome.answered().map_or("nobody", |arrival| &arrival.at.deployment);
            *counts.entry(by.to_owned()).or_default() += 1;
        }
        compare(&counts, &expected.weights, expected)
    })
    .await
}

/// By the mirrors that got a copy.
pub(crate) async fn of_copies(cluster: &Cluster, case: &Case, expected: &Distribution) -> Verdict {
    let share = |mirror: &Mirror| {
        let given = expected.weights.get(&mirror.backend).copied();
        let share = given.or(mirror.percent.map(|percent| percent / 100.0));
        let share = share.ok_or_else(|| format!("no share is given for {}", mirror.backend))?;
        Ok((mirror.backend.clone(), share))
    };
    let shares: BTreeMap<String, f64> =
        case.expect.mirrored_to.iter().map(share).collect::<Result<_, String>>()?;
    let copied = |mirror: &Mirror, exchanges: &[Exchange]| {
        let reached = |(ask, _): &&Exchange| {
            cluster.log.arrivals(&ask.id).iter().any(|arrival| mirror.is(arrival))
        };
        exchanges.iter().filter(reached).count()
    };
    rounds(expected, async || {
        let exchanges = many(cluster, case, expected.requests).await?;
        // Copies may come after the answers.
        let started = Instant::now();
        loop {
            let mirrors = case.expect.mirrored_to.iter();
            let counts = mirrors.map(|to| (to.backend.clone(), copied(to, &exchanges))).collect();
            match compare(&counts, &shares, expected) {
                Err(_early) if started.elapsed() < MIRRORED => tokio::time::sleep(PAUSE).await,
                verdict => return verdict,
            }
        }
    })
    .await
}

async fn rounds(expected: &Distribution, round: impl AsyncFn() -> Verdict) -> Verdict {
    let mut last = Ok(());
    for _ in 0..expected.max_rounds {
        last = round().await;
        if last.is_ok() {
            break;
        }
    }
    last
}

async fn many(cluster: &Cluster, case: &Case, requests: usize) -> Result<Vec<Exchange>, String> {
    let one = async |number: usize| {
        let mut ask = cluster.ask(case)?;
        // Something to go by for a mesh that would choose by a hash of the request.
        if number.is_multiple_of(2) {
            ask.headers.push(("x-jitter".to_owned(), uuid::Uuid::new_v4().to_string()));
        }
        let outcome = cluster.exchange(case, &ask).await?;
        Ok((ask, outcome))
    };
    let exchanges = futures::stream::iter(0..requests).map(one).buffer_unordered(AT_ONCE);
    let exchanges: Vec<Result<Exchange, String>> = exchanges.collect().await;
    exchanges.into_iter().collect()
}

fn compare(
    counts: &BTreeMap<String, usize>,
    shares: &BTreeMap<String, f64>,
    expected: &Distribution,
) -> Verdict {
    if let Some((stray, count)) = counts.iter().find(|(name, _)| !shares.contains_key(*name)) {
        return Err(format!("{count} requests were for {stray}"));
    }
    for (name, share) in shares {
        let count = counts.get(name).copied().unwrap_or_default();
        let found = count as f64 / expected.requests as f64;
        let is_close = (found - share).abs() <= expected.tolerance_abs;
        if !is_close || (*share == 0.0 && count > 0) {
            let requests = expected.requests;
            return Err(format!("{name} has {count} of {requests} requests, not {share}"));
        }
    }
    Ok(())
}
