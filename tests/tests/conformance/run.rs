//! A test, run: its cases one after the other, each tried until it passes, as configuration arrives in its own time.

use std::time::{Duration, Instant};

use super::case::{Case, Condition, EachResponse, Suite, Test};
use super::check::mirrored;
use super::cluster::{Cluster, Finding};
use super::report::{Outcome, TestResult};
use super::shares;

/// A case that does not pass by then has failed.
const LIMIT: Duration = Duration::from_secs(5);
/// The same where the case begins with a change of the configuration.
const LIMIT_AFTER_CHANGE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);
/// A case has to pass this often in a row, as upstream's suite has it: one right answer can be chance.
const IN_A_ROW: usize = 3;

/// Runs every case of a test.
pub(crate) async fn test(suite: &Suite, test: &Test) -> TestResult {
    let cluster = match Cluster::start(suite, test).await {
        Ok(cluster) => cluster,
        Err(why) => return TestResult::broken(test, &why),
    };
    let mut result = TestResult::of(test);
    for (name, read) in test.cases() {
        let outcome = match read {
            Ok(case) if !case.is_scored() => Outcome::NotScored,
            Ok(case) => Outcome::from(self::case(&cluster, &case).await),
            Err(why) => Outcome::Failed(why),
        };
        result.cases.push((name, outcome));
    }
    let findings = cluster.findings();
    // What is in order has nothing to be found, or something that is in order too: only faults are looked for.
    for fault in test.route_conditions.iter().filter(|condition| condition.status == "False") {
        let Condition { route, kind, status, reason } = fault;
        let name = format!("condition {kind}={status} ({reason}) of {route}");
        result.conditions.push((name, Outcome::from(is_found(route, &findings))));
    }
    result.findings = findings.into_iter().map(|found| found.text).collect();
    result
}

async fn case(cluster: &Cluster, case: &Case) -> Result<(), String> {
    for step in &case.before {
        cluster.before(step)?;
    }
    if let Some(expected) = &case.expect.distribution {
        return shares::of_answers(cluster, case, expected).await;
    }
    if let Some(expected) = &case.expect.mirror_distribution {
        return shares::of_copies(cluster, case, expected).await;
    }
    let limit = if case.before.is_empty() { LIMIT } else { LIMIT_AFTER_CHANGE };
    let started = Instant::now();
    let (mut passed, needed) = (0, case.expect.repeat.unwrap_or(IN_A_ROW));
    while passed < needed {
        match once(cluster, case).await {
            Ok(()) => passed += 1,
            Err(why) if started.elapsed() > limit => return Err(why),
            Err(_not_yet) => {
                passed = 0;
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    Ok(())
}

/// One request, with all that is expected of it.
async fn once(cluster: &Cluster, case: &Case) -> Result<(), String> {
    let ask = cluster.ask(case)?;
    let outcome = cluster.exchange(case, &ask).await?;
    mirrored(&cluster.log, &ask, &case.expect).await?;
    match &case.expect.each_response {
        None => Ok(()),
        Some(EachResponse::Whoever(expect)) => outcome.check(expect, &ask),
        Some(EachResponse::ByBackend(expected)) => {
            let backend = &outcome.answered().ok_or("no backend answered")?.at.deployment;
            let expect = expected.get(backend).ok_or_else(|| format!("{backend} answered"))?;
            outcome.check(expect, &ask)
        }
    }
}

/// Outside of a cluster no status is written; what the control plane has to say of a route, `duet check` says too.
fn is_found(route: &str, findings: &[Finding]) -> Result<(), String> {
    match findings.iter().any(|found| found.is_of_route(route)) {
        true => Ok(()),
        false => Err("duet check finds nothing wrong with the route".to_owned()),
    }
}
