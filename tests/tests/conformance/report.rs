//! What passed and what failed: line by line, and as tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::case::{Index, Test};

/// Of one case, or one condition.
#[derive(Debug)]
pub(crate) enum Outcome {
    Passed,
    Failed(String),
    /// Not for a mesh.
    NotScored,
}

impl From<Result<(), String>> for Outcome {
    fn from(result: Result<(), String>) -> Self {
        result.map_or_else(Self::Failed, |()| Self::Passed)
    }
}

/// Of one test.
#[derive(Debug)]
pub(crate) struct TestResult {
    pub(crate) name: String,
    features: Vec<String>,
    /// By name.
    pub(crate) cases: Vec<(String, Outcome)>,
    /// Conditions of routes that the control plane has to report.
    pub(crate) conditions: Vec<(String, Outcome)>,
    /// What `duet check` says about the objects; explains failures.
    pub(crate) findings: Vec<String>,
}

impl TestResult {
    pub(crate) fn of(test: &Test) -> Self {
        let (cases, conditions, findings) = (Vec::new(), Vec::new(), Vec::new());
        let (name, features) = (test.name.clone(), test.features.clone());
        Self { name, features, cases, conditions, findings }
    }

    /// Of a test whose cases could not even be tried.
    pub(crate) fn broken(test: &Test, why: &str) -> Self {
        let mut result = Self::of(test);
        let cases = test.cases().into_iter();
        result.cases = cases.map(|(name, _)| (name, Outcome::Failed(why.to_owned()))).collect();
        result
    }

    /// One line for each case and condition.
    pub(crate) fn lines(&self) -> String {
        let mut text = String::new();
        for (name, outcome) in self.cases.iter().chain(&self.conditions) {
            let line = match outcome {
                Outcome::Passed => format!("pass {}: {name}", self.name),
                Outcome::Failed(why) => format!("FAIL {}: {name}: {why}", self.name),
                Outcome::NotScored => format!("     {}: {name}: not for a mesh", self.name),
            };
            text.extend([&line, "\n"]);
        }
        if self.failed() > 0 {
            for finding in &self.findings {
                text.extend(["     duet check: ", finding, "\n"]);
            }
        }
        text
    }

    /// Cases that a mesh has to pass.
    fn scored(&self) -> usize {
        self.cases.iter().filter(|(_, outcome)| !matches!(outcome, Outcome::NotScored)).count()
    }

    fn passed(&self) -> usize {
        self.cases.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Passed)).count()
    }

    /// Cases and conditions.
    pub(crate) fn failed(&self) -> usize {
        let all = self.cases.iter().chain(&self.conditions);
        all.filter(|(_, outcome)| matches!(outcome, Outcome::Failed(_))).count()
    }
}

/// Cases passed and failed.
fn by_feature(results: &[TestResult]) -> BTreeMap<&str, (usize, usize)> {
    let mut found = BTreeMap::<&str, (usize, usize)>::new();
    for result in results {
        for feature in &result.features {
            let (passed, failed) = found.entry(feature).or_default();
            *passed += result.passed();
            *failed += result.scored() - result.passed();
        }
    }
    found
}

/// Of everything, as Markdown.
pub(crate) fn markdown(results: &[TestResult], index: Option<&Index>) -> String {
    let cases: usize = results.iter().map(TestResult::scored).sum();
    let passed: usize = results.iter().map(TestResult::passed).sum();
    let mut text = "# Gateway API conformance\n\n".to_owned();
    text.push_str(
        "Written by `tests/tests/conformance.rs`; its documentation says how it is run. The cases are those of Gateway \
         API's own\nconformance suite that a mesh can be asked, with parent Services in the place of Gateways.\n\n",
    );
    if let Some(Index { source, commit, commit_date, nearest_release, .. }) = index {
        let nearest = format!("{commit_date}, nearest release {nearest_release}");
        writeln!(text, "Source: {source}, commit `{commit}` ({nearest}).\n").unwrap();
    }
    let tests = results.len();
    writeln!(
        text,
        "{tests} tests with {cases} cases: {passed} passed, {} failed.\n",
        cases - passed
    )
    .unwrap();
    text.push_str("A case counts for every feature that its test needs.\n\n");
    text.push_str("| feature | cases passed | failed |\n|---|---:|---:|\n");
    for (feature, (passed, failed)) in by_feature(results) {
        writeln!(text, "| {feature} | {passed} | {failed} |").unwrap();
    }
    text.push_str("\n| test | cases | passed |\n|---|---:|---:|\n");
    for result in results {
        let (cases, passed) = (result.scored(), result.passed());
        writeln!(text, "| {} | {cases} | {passed} |", result.name).unwrap();
    }
    text
}
