//! The only place that prints: answers, plain lines, prefixed log lines, errors.

use std::io::{self, IsTerminal as _, Write};
use std::process::ExitCode;

use anyhow::Context as _;

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

/// The reader of an answer has gone, as `head` does once it has enough. Ends a command, and is nobody's mistake.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl std::fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nobody reads the answer any more")
    }
}

impl std::error::Error for ReaderGone {}

/// A line of the answer that a command is there for; what it prints while it goes on is a [`line()`].
///
/// # Errors
/// When it cannot be printed: an answer that is not whole must not look as if it were. [`ReaderGone`] when nobody reads.
pub(crate) fn answer(text: &str) -> anyhow::Result<()> {
    write(&mut io::stdout().lock(), text)
}

fn write(out: &mut impl Write, text: &str) -> anyhow::Result<()> {
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        outcome => outcome.context("the answer cannot be printed"),
    }
}

/// For a command whose exit code says something, too: it says so whether or not all of the answer was read.
///
/// # Errors
/// When the answer could not be printed for another reason.
pub(crate) fn read_or_not(printed: anyhow::Result<()>) -> anyhow::Result<()> {
    printed.or_else(|error| if error.is::<ReaderGone>() { Ok(()) } else { Err(error) })
}

/// The end of a command that failed, or that nobody reads any more.
pub(crate) fn failed(outcome: &anyhow::Error) -> ExitCode {
    if outcome.is::<ReaderGone>() {
        return ExitCode::SUCCESS;
    }
    error(outcome);
    ExitCode::FAILURE
}

/// A line of what is going on, for the user.
pub(crate) fn line(text: &str) {
    // A reader that left (`duet up | head`) is no reason to stop.
    writeln!(io::stdout().lock(), "{text}").ok();
}

/// A line about what is going on.
pub(crate) fn note(text: &str) {
    writeln!(io::stderr().lock(), "{}", paint(1, &format!("duet: {text}"))).ok();
}

/// What went wrong, with its causes.
fn error(error: &anyhow::Error) {
    writeln!(io::stderr().lock(), "{}", paint(31, &format!("error: {error:#}"))).ok();
}

/// A log line of a process: `number` chooses its colour.
pub(crate) fn log(number: usize, name: &str, width: usize, text: &str) {
    let colour = COLOURS.get(number % COLOURS.len()).copied().unwrap_or(0);
    line(&format!("{} {text}", paint(colour, &format!("{name:width$} |"))));
}

/// The completion script of a shell.
pub(crate) fn completion(
    shell: clap_complete::Shell,
    command: &mut clap::Command,
) -> anyhow::Result<()> {
    // Into memory first: the library panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "duet", &mut script);
    answer(String::from_utf8_lossy(&script).trim_end())
}

/// Colours only for people: a terminal, and no `NO_COLOR` (<https://no-color.org>).
fn paint(colour: u8, text: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if plain || !io::stdout().is_terminal() {
        return text.to_owned();
    }
    format!("\u{1b}[{colour}m{text}\u{1b}[0m")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_not_printed_whole_is_an_error() {
        let mut full = File::options().write(true).open("/dev/full").unwrap();
        let error = write(&mut full, "text").unwrap_err();
        assert!(format!("{error:#}").starts_with("the answer cannot be printed: "), "{error:#}");
        // Also where the text is kept for later.
        let error = write(&mut io::BufWriter::new(full), "text").unwrap_err();
        assert_eq!(failed(&error), ExitCode::FAILURE);
        assert!(read_or_not(Err(error)).is_err());
    }

    #[test]
    fn a_reader_may_leave() {
        let (reader, mut writer) = io::pipe().unwrap();
        write(&mut writer, "text").unwrap();
        drop(reader);
        let error = write(&mut writer, "text").unwrap_err();
        assert_eq!(failed(&error), ExitCode::SUCCESS);
        read_or_not(Err(error)).unwrap();
        // Another broken pipe is not the reader's.
        let other = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(failed(&other), ExitCode::FAILURE);
    }
}
