//! One child process: started in a process group of its own, its output prefixed and kept, watched, ended.
//!
//! Children are started from the main thread: the kernel's "parent died" signal is bound to the thread that
//! forked.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::output;

/// How long a process has to end by itself.
pub(crate) const GRACE: Duration = Duration::from_secs(10);
/// Last lines kept for error messages.
const KEPT_LINES: usize = 15;

/// What to start.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Program and arguments.
    pub(crate) command: Vec<String>,
    /// Added to the environment.
    pub(crate) env: Vec<(String, String)>,
    /// Working directory.
    pub(crate) folder: PathBuf,
}

/// Where a process's output goes.
#[derive(Debug)]
pub(crate) struct Log {
    name: String,
    number: usize,
    width: usize,
    file: Mutex<Option<File>>,
    last: Mutex<VecDeque<String>>,
}

impl Log {
    /// A log that is printed, and kept in `file` if one is given; what was there is moved to `….1`.
    pub(crate) fn open(
        name: &str,
        (number, width): (usize, usize),
        file: Option<&Path>,
    ) -> anyhow::Result<Rc<Self>> {
        let file = match file {
            Some(path) => {
                if path.exists() {
                    std::fs::rename(path, path.with_extension("log.1"))?;
                }
                Some(File::create(path).with_context(|| format!("log {}", path.display()))?)
            }
            None => None,
        };
        let (file, last) = (Mutex::new(file), Mutex::default());
        Ok(Rc::new(Self { name: name.to_owned(), number, width, file, last }))
    }

    fn line(&self, text: &str) {
        output::log(self.number, &self.name, self.width, text);
        if let Some(file) = &mut *self.file.lock() {
            // A full disk must not stop the mesh; the terminal still has the line.
            writeln!(file, "{text}").ok();
        }
        let mut last = self.last.lock();
        if last.len() == KEPT_LINES {
            last.pop_front();
        }
        last.push_back(text.to_owned());
    }

    /// The last lines, for an error message.
    pub(crate) fn tail(&self) -> String {
        self.last.lock().iter().map(|line| format!("\n  {line}")).collect()
    }

    async fn copy(self: Rc<Self>, stream: impl AsyncRead + Unpin) {
        let mut lines = BufReader::new(stream).split(b'\n');
        while let Ok(Some(line)) = lines.next_segment().await {
            self.line(String::from_utf8_lossy(&line).trim_end());
        }
    }
}

/// A running child.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid: u32,
}

impl Process {
    /// Starts it, with its output going to `log`. Must be called in a `LocalSet`.
    pub(crate) fn start(spec: &Spec, log: &Rc<Log>) -> anyhow::Result<Self> {
        let mut process = Self::spawn(spec, Stdio::piped)?;
        if let Some(stdout) = process.child.stdout.take() {
            tokio::task::spawn_local(Rc::clone(log).copy(stdout));
        }
        if let Some(stderr) = process.child.stderr.take() {
            tokio::task::spawn_local(Rc::clone(log).copy(stderr));
        }
        Ok(process)
    }

    /// Starts it with our own output.
    pub(crate) fn start_attached(spec: &Spec) -> anyhow::Result<Self> {
        Self::spawn(spec, Stdio::inherit)
    }

    fn spawn(spec: &Spec, output: fn() -> Stdio) -> anyhow::Result<Self> {
        let (program, arguments) = spec.command.split_first().context("an empty command")?;
        let mut command = Command::new(program);
        // Our own settings are not theirs: `DUET_TOKEN` of a shell must not reach every sidecar. The log filter may.
        let ours = |(name, _): &(OsString, OsString)| {
            name.as_encoded_bytes().starts_with(b"DUET_") && name != "DUET_LOG"
        };
        for (name, _) in std::env::vars_os().filter(ours) {
            command.env_remove(name);
        }
        let child = command
            .args(arguments)
            .envs(spec.env.iter().map(|(key, value)| (key, value)))
            .current_dir(&spec.folder)
            .stdin(Stdio::null())
            .stdout(output())
            .stderr(output())
            // Ctrl-C in the terminal must reach us only: we end the processes in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {program} in {}", spec.folder.display()))?;
        let pid = child.id().context("it ended at once")?;
        Ok(Self { child, pid })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end. Cancel safe.
    pub(crate) async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait().await?)
    }

    /// Sends a signal to it and all that it started.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(group) = self.group() {
            // Fails only when they are gone, which is what is wanted.
            kill_process_group(group, signal).ok();
        }
    }

    /// Ends it and all that it started: SIGTERM, then SIGKILL after `grace`, or as soon as `now` says so.
    pub(crate) async fn end(mut self, grace: Duration, now: CancellationToken) {
        self.signal(Signal::TERM);
        let gone = async {
            self.child.wait().await.map(|_status| ()).ok();
            while self.group().is_some_and(|group| test_kill_process_group(group).is_ok()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = gone => return,
            () = tokio::time::sleep(grace) => {}
            () = now.cancelled() => {}
        }
        self.signal(Signal::KILL);
        self.child.wait().await.map(|_status| ()).ok();
    }

    fn group(&self) -> Option<Pid> {
        i32::try_from(self.pid).ok().and_then(Pid::from_raw)
    }
}

/// How a process ended, in words.
pub(crate) fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}
