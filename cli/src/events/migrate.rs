//! `duet events migrate`.

use anyhow::Context as _;
use serde_json::{Value, json};

use super::Session;
use crate::output::{self, Format};

/// Events of one request.
const STEP: u64 = 2000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Leave the events of this subscription behind; may be repeated.
    #[arg(long, value_name = "SUBSCRIPTION")]
    skip: Vec<String>,
    /// Move nothing and let publishes go on; the old events stay in a folder of the control plane.
    #[arg(long, conflicts_with = "skip")]
    leave_behind: bool,
}

pub(super) fn migrate(session: &Session, args: &Args) -> anyhow::Result<()> {
    let body = json!({
        "bus": session.bus,
        "skip": args.skip,
        "leaveBehind": args.leave_behind,
        "limit": STEP,
    });
    let mut moved = 0;
    loop {
        let answer = session.client.post("/v1/migrate", &body)?;
        moved += answer.get("moved").and_then(Value::as_u64).context("no number came back")?;
        let Some(folder) = answer.get("folder").and_then(Value::as_str) else {
            if session.format == Format::Text {
                // Goes on moving whoever reads.
                output::line(&format!("{moved} events moved so far"));
            }
            continue;
        };
        let done = json!({ "moved": moved, "folder": folder });
        let text = format!(
            "{moved} events moved; what every subscription had handled stays in {folder}, which may be deleted"
        );
        return session.say(&done, &text);
    }
}
