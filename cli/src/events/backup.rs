//! `duet events backup`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::json;

use super::Session;

/// How many events the copy lacks.
const MISSING_EVENTS: &str = "duet-missing-events";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file to write; must not exist.
    file: PathBuf,
}

pub(super) fn backup(session: &Session, args: &Args) -> anyhow::Result<()> {
    let file = &args.file;
    if file.exists() {
        bail!("{} exists already", file.display());
    }
    // Made first: a copy that cannot be kept is not asked for.
    let partial = with_suffix(file, ".partial");
    // Events are for whoever may read the bus.
    let target = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .with_context(|| format!("{} cannot be written", partial.display()))?;
    let copied =
        session.client.download("/v1/backup", &[("bus", &session.bus)]).and_then(|mut source| {
            let missing = source.headers().get(MISSING_EVENTS).and_then(|n| n.to_str().ok());
            // An older control plane does not say.
            let missing = missing.and_then(|n| n.parse::<u64>().ok()).unwrap_or_default();
            Ok((write(source.body_mut(), target, &partial)?, missing))
        });
    let (bytes, missing) = match copied {
        Ok(copied) => copied,
        Err(error) => {
            // What is half a copy is no copy.
            fs::remove_file(&partial).unwrap_or_default();
            return Err(error);
        }
    };
    keep(&partial, file).with_context(|| format!("{} cannot be written", file.display()))?;
    // As text: a path that is no UTF-8 is no JSON.
    let shown = file.display().to_string();
    let answer =
        json!({ "bus": session.bus, "file": shown, "bytes": bytes, "missingEvents": missing });
    let text = format!("bus {}: {bytes} bytes in {shown}", session.bus);
    session.say(&answer, &text)?;
    if missing > 0 {
        bail!(
            "{missing} events are not in {shown}: the bus cannot read them any more, as its file is damaged where they are"
        );
    }
    Ok(())
}

/// Gives the copy its name, on disk too.
fn keep(partial: &Path, file: &Path) -> io::Result<()> {
    fs::rename(partial, file)?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Returns when it is on disk.
fn write(source: &mut impl Read, mut target: File, path: &Path) -> anyhow::Result<u64> {
    let copied = io::copy(source, &mut target).and_then(|bytes| {
        target.sync_all()?;
        Ok(bytes)
    });
    copied.with_context(|| format!("{}: the copy did not arrive whole", path.display()))
}
