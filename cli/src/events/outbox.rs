//! `duet events outbox`: what a sidecar has accepted and its bus will never take. Asks the sidecar itself.

use std::path::Path;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use serde_json::{Value, json};

use super::Session;
use super::client::Client;
use super::show::table;
use super::tail::plain;
use crate::output::{self, Format};
use crate::run::find_mesh;
use crate::up::state;

/// Positions of one request.
const BATCH: usize = 100;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
    /// The sidecar's admin address, or a replica of a running `duet up`, such as orders-1.
    #[arg(
        long,
        global = true,
        default_value = "http://127.0.0.1:15000",
        value_name = "URL|REPLICA"
    )]
    sidecar: String,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List them.
    List(Which),
    /// Send them again, after what waits in the outbox.
    Redrive(Which),
    /// Remove them for good.
    Drop(Which),
}

/// Those to which all of it applies.
#[derive(Debug, clap::Args)]
struct Which {
    /// Published to this topic.
    #[arg(long)]
    topic: Option<String>,
    /// With this in the reason.
    #[arg(long)]
    reason: Option<String>,
    /// With this id.
    #[arg(long)]
    id: Option<String>,
    /// All of them.
    #[arg(long)]
    all: bool,
}

impl Args {
    /// `mesh` is the state folder of the `duet up` in which a replica is looked for.
    pub(super) fn client(&self, mesh: Option<&Path>) -> anyhow::Result<Client> {
        if self.sidecar.contains([':', '/']) {
            return Client::of_sidecar(&self.sidecar);
        }
        let folder = mesh.map_or_else(find_mesh, |folder| Ok(folder.to_owned()))?;
        let replicas = state::read(&folder)?.apps;
        match replicas.iter().find(|replica| replica.instance == self.sidecar) {
            Some(replica) => Client::of_sidecar(&replica.sidecar.admin),
            None => {
                let known: Vec<_> = replicas.iter().map(|known| known.instance.as_str()).collect();
                bail!("there is no replica {:?}; known are {}", self.sidecar, known.join(", "));
            }
        }
    }
}

impl Which {
    fn takes(&self, rejected: &Value) -> bool {
        let of = |path: &str| rejected.pointer(path).map(plain);
        let is = |wanted: &Option<String>, path| wanted.is_none() || of(path) == *wanted;
        let reason = self.reason.as_ref();
        is(&self.topic, "/topic")
            && is(&self.id, "/event/id")
            && reason.is_none_or(|part| of("/reason").is_some_and(|text| text.contains(part)))
    }
}

pub(super) fn outbox(session: &Session, args: &Args) -> anyhow::Result<()> {
    match &args.action {
        Action::List(which) => list(session, which),
        Action::Redrive(which) => change(session, which, "/outbox/redrive", "redriven"),
        Action::Drop(which) => change(session, which, "/outbox/drop", "dropped"),
    }
}

/// Oldest first.
fn find(session: &Session, which: &Which) -> anyhow::Result<Vec<Value>> {
    let mut found = Vec::new();
    let mut from = 0;
    loop {
        let query = [("bus", session.bus.as_str()), ("from", &from.to_string())];
        let answer = session.client.get("/outbox/rejected", &query)?;
        let page = answer.get("rejected").and_then(Value::as_array).context("no list came back")?;
        found.extend(page.iter().filter(|rejected| which.takes(rejected)).cloned());
        match answer.get("next").and_then(Value::as_u64) {
            Some(next) if next > from => from = next,
            _ => return Ok(found),
        }
    }
}

fn list(session: &Session, which: &Which) -> anyhow::Result<()> {
    let found = find(session, which)?;
    if session.format == Format::Json {
        return output::answer(&format!("{:#}", Value::Array(found)));
    }
    let rows = found.iter().map(|rejected| {
        let of = |path: &str| rejected.pointer(path).map_or_else(|| "-".to_owned(), plain);
        ["/topic", "/position", "/event/id", "/rejected", "/reason"].map(of).to_vec()
    });
    table(&["TOPIC", "POSITION", "ID", "SINCE", "REASON"], rows.collect())
}

fn change(session: &Session, which: &Which, path: &str, done: &str) -> anyhow::Result<()> {
    let given = [&which.topic, &which.reason, &which.id];
    if !which.all && given.iter().all(|given| given.is_none()) {
        bail!("say which: --topic, --reason or --id, or --all");
    }
    let found = find(session, which)?;
    let positions: Vec<String> =
        found.iter().filter_map(|it| it.get("position")).map(plain).collect();
    let mut changed = 0;
    for batch in positions.chunks(BATCH) {
        let mut query = vec![("bus", session.bus.as_str())];
        query.extend(batch.iter().map(|position| ("position", position.as_str())));
        let answer = session.client.post_query(path, &query)?;
        changed += answer.get(done).and_then(Value::as_u64).context("no number came back")?;
    }
    let answer = json!({ "matched": found.len(), done: changed });
    session.say(&answer, &format!("{changed} of {} rejected events {done}", found.len()))
}
