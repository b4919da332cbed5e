//! The only place that prints: plain lines, prefixed log lines, errors.

use std::io::{IsTerminal as _, Write as _};

/// Colours that are readable on light and dark; red is kept for errors.
const COLOURS: [u8; 10] = [36, 33, 32, 35, 34, 96, 93, 92, 95, 94];

/// How a command prints what it found.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Printing {
    /// How to print.
    #[arg(short, long, default_value = "text", global = true)]
    output: Format,
    /// The same as `--output json`.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    Text,
    Json,
}

impl Printing {
    pub(crate) fn format(self) -> Format {
        if self.json { Format::Json } else { self.output }
    }
}

/// A line for the user.
pub(crate) fn line(text: &str) {
    // A reader that left (`duet up | head`) is no reason to stop.
    writeln!(std::io::stdout().lock(), "{text}").ok();
}

/// A line about what is going on.
pub(crate) fn note(text: &str) {
    writeln!(std::io::stderr().lock(), "{}", paint(1, &format!("duet: {text}"))).ok();
}

/// What went wrong, with its causes.
pub(crate) fn error(error: &anyhow::Error) {
    writeln!(std::io::stderr().lock(), "{}", paint(31, &format!("error: {error:#}"))).ok();
}

/// A log line of a process: `number` chooses its colour.
pub(crate) fn log(number: usize, name: &str, width: usize, text: &str) {
    let colour = COLOURS.get(number % COLOURS.len()).copied().unwrap_or(0);
    line(&format!("{} {text}", paint(colour, &format!("{name:width$} |"))));
}

/// The completion script of a shell.
pub(crate) fn completion(shell: clap_complete::Shell, command: &mut clap::Command) {
    clap_complete::generate(shell, command, "duet", &mut std::io::stdout());
}

/// Colours only for people: a terminal, and no `NO_COLOR` (<https://no-color.org>).
fn paint(colour: u8, text: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if plain || !std::io::stdout().is_terminal() {
        return text.to_owned();
    }
    format!("\u{1b}[{colour}m{text}\u{1b}[0m")
}
