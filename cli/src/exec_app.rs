//! The last step before an application runs: asks the kernel to end it when `duet` dies, then becomes it. The
//! wish survives `execve`, so the application needs to know nothing of it.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::Context as _;

/// `duet exec-app -- COMMAND`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Process id of the parent.
    #[arg(long)]
    parent: i32,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Never returns but with an error.
pub(crate) fn exec(args: &Args) -> anyhow::Result<ExitCode> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if parent != Some(args.parent) {
        anyhow::bail!("the parent process is gone");
    }
    let (program, rest) = args.command.split_first().context("no command")?;
    Err(Command::new(program).args(rest).exec()).with_context(|| format!("cannot run {program}"))
}
