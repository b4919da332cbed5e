//! The patterns of `matches`, compiled once.

use regex::{Regex, RegexBuilder};

/// Largest pattern in KiB, compiled. A class such as `\w`, which knows all scripts, takes 49.
const MAX_KIB: usize = 256;
/// All patterns of a subscription together.
const MAX_TOTAL_KIB: usize = 1024;
/// Bytes for each of the automata that a search makes as it goes.
const CACHE_BYTES: usize = 256 << 10;
/// What a byte may cost for each KiB of the pattern, in units of the account: the slowest search there is looks at all
/// of it.
const UNITS: usize = 8;

/// Those of all expressions of a subscription.
#[derive(Debug, Default)]
pub(super) struct Patterns {
    all: Vec<Pattern>,
    kib: usize,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    /// No smaller than it is, and no more than twice as large.
    kib: usize,
}

impl Patterns {
    /// Compiles one, and returns its number.
    pub(super) fn add(&mut self, source: &str) -> Result<usize, String> {
        let pattern = Pattern::compile(source)?;
        self.kib += pattern.kib;
        if self.kib > MAX_TOTAL_KIB {
            return Err(format!("its patterns take more than {MAX_TOTAL_KIB} KiB together"));
        }
        self.all.push(pattern);
        Ok(self.all.len() - 1)
    }

    pub(super) fn get(&self, number: usize) -> Option<&Pattern> {
        self.all.get(number)
    }
}

impl Pattern {
    fn compile(source: &str) -> Result<Self, String> {
        let mut kib = 1;
        loop {
            let built =
                RegexBuilder::new(source).size_limit(kib << 10).dfa_size_limit(CACHE_BYTES).build();
            match built {
                Ok(regex) => return Ok(Self { regex, kib }),
                Err(regex::Error::CompiledTooBig(_)) if kib < MAX_KIB => kib *= 2,
                Err(regex::Error::CompiledTooBig(_)) => {
                    return Err(format!("{source:?} takes more than {MAX_KIB} KiB as a pattern"));
                }
                Err(error) => {
                    let text = error.to_string();
                    let reason = text.lines().last().unwrap_or_default();
                    let reason = reason.trim_start_matches("error: ");
                    return Err(format!("{source:?} is not a pattern: {reason}"));
                }
            }
        }
    }

    /// What a search may cost at most.
    pub(super) fn price(&self, text: &str) -> usize {
        (1 + text.len()).saturating_mul(self.kib * UNITS)
    }

    pub(super) fn is_match(&self, text: &str) -> bool {
        self.regex.is_match(text)
    }
}
